#!/usr/bin/env python3
"""Install the pack as ComfyUI-Manager's "Install via Git URL" does, with its real cm-cli, and start ComfyUI with it.

    python3 scripts/dev.py scripts/manager.py

cm-cli clones the Repository of pyproject.toml, which git is told to find in this checkout: what is committed is what is
installed. ComfyUI is a copy with nothing else in custom_nodes. The manager's environment is `.dev/comfyui-manager`; it
sees ComfyUI's packages, and what the pack's requirements.txt asks for comes from the Python registry.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from dev import ROOT, install_tool

HOME = ROOT / ".dev" / "comfyui-manager"
WANTED = "comfyui-manager==4.2.2"  # what ComfyUI 0.30.0 asks for in its manager_requirements.txt


def install_manager() -> Path:
    """The path of `cm-cli`."""
    return install_tool(HOME, WANTED) / "cm-cli"


def repository() -> str:
    """The pack's address, as pyproject.toml has it. Python 3.10 reads no TOML by itself."""
    return re.findall(r'^Repository = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[0]


def install_pack(comfyui: Path) -> Path:
    """The pack's folder in a ComfyUI, after cm-cli has put it there."""
    environment = {
        **os.environ,
        "COMFYUI_PATH": str(comfyui),
        "PYTHONPATH": sysconfig.get_path("purelib"),
        "GIT_CONFIG_COUNT": "1",
        "GIT_CONFIG_KEY_0": f"url.{ROOT.as_uri()}.insteadOf",
        "GIT_CONFIG_VALUE_0": repository(),
    }
    command = [str(install_manager()), "install", repository(), "--mode", "local", "--exit-on-fail"]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    said = [line for line in done.stdout.splitlines() if "it/s]" not in line]  # git's progress
    print("\n".join(said), file=sys.stderr)
    if done.returncode or not any("[INSTALLED]" in line for line in said):
        sys.exit("cm-cli did not install the pack")
    (folder,) = (path for path in (comfyui / "custom_nodes").iterdir() if (path / "pyproject.toml").exists())
    return folder


def main() -> None:
    from pack import load_pack

    load_pack()
    from skein.demo.server import ComfyServer, comfyui_path

    with tempfile.TemporaryDirectory() as room:
        comfyui = Path(room) / "ComfyUI"
        shutil.copytree(comfyui_path(), comfyui, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.rmtree(comfyui / "custom_nodes")
        (comfyui / "custom_nodes").mkdir()
        folder = install_pack(comfyui)
        with ComfyServer(comfyui_path(), pack=folder, name=folder.name) as server:
            nodes = sorted(name for name in server.get("/object_info") if name.startswith("Skein"))
    print(f"installed as custom_nodes/{folder.name}; ComfyUI has {len(nodes)} nodes of it: {', '.join(nodes)}")


if __name__ == "__main__":
    main()
