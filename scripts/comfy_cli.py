#!/usr/bin/env python3
"""ComfyUI's command line tool, which publishes node packs to the registry: in an environment of its own.

    python3 scripts/comfy_cli.py

Makes `.dev/comfy-cli` where it is not there yet and prints the path of its `comfy`. Not in ComfyUI's environment,
because its requirements are not ComfyUI's. Only the standard library is used here.
"""

from pathlib import Path

from dev import ROOT, install_tool

HOME = ROOT / ".dev" / "comfy-cli"
WANTED = "comfy-cli==1.23.0"


def install() -> Path:
    """The path of `comfy`."""
    return install_tool(HOME, WANTED) / "comfy"


if __name__ == "__main__":
    print(install())
