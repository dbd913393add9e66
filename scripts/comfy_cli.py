#!/usr/bin/env python3
"""ComfyUI's command line tool, which publishes node packs to the registry: in an environment of its own.

    python3 scripts/comfy_cli.py

Makes `.dev/comfy-cli` where it is not there yet and prints the path of its `comfy`. Not in ComfyUI's environment,
because its requirements are not ComfyUI's. Only the standard library is used here.
"""

import shutil
import sys
from pathlib import Path

from dev import READY, ROOT, run, say

HOME = ROOT / ".dev" / "comfy-cli"
WANTED = "comfy-cli==1.23.0"


def install() -> Path:
    """The path of `comfy`; an interrupted installation is begun again."""
    ready, comfy = HOME / READY, HOME / "bin" / "comfy"
    if not (ready.exists() and ready.read_text() == WANTED and comfy.exists()):
        say(f"installing {WANTED}")
        shutil.rmtree(HOME, ignore_errors=True)
        run(sys.executable, "-m", "venv", HOME)
        run(HOME / "bin" / "python", "-m", "pip", "install", "-q", "--disable-pip-version-check", WANTED)
        ready.write_text(WANTED)
    return comfy


if __name__ == "__main__":
    print(install())
