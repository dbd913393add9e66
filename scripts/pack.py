"""Make this checkout importable as the package `skein`, for tests and benchmarks without a server."""

import os
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parent.parent


def load_pack() -> ModuleType:
    """Make `skein` and ComfyUI's library importable, whatever the checkout's folder is called.

    The rooms are importable one by one; the entry point with the nodes is not run, so that machines which lack what
    only ComfyUI's server needs can use the engine.
    COMFYUI_PATH names the ComfyUI folder; without a GPU its CPU mode is switched on. With SKEIN_WITHOUT_COMFYUI
    (`make quick`) ComfyUI is not made importable, and a module that imports it raises ModuleNotFoundError.
    """
    if "skein" in sys.modules:
        return sys.modules["skein"]
    if os.environ.get("SKEIN_WITHOUT_COMFYUI"):
        _package("skein.workers", ROOT / "workers")  # its __init__ imports what only ComfyUI's process uses
    else:
        _make_comfyui_importable()
    return _package("skein", ROOT)


def _package(name: str, folder: Path) -> ModuleType:
    """A package over a folder, without its __init__."""
    module = ModuleType(name)
    module.__path__ = [str(folder)]
    sys.modules[name] = module
    return module


def _make_comfyui_importable() -> None:
    path = os.environ.get("COMFYUI_PATH")
    if not path:
        sys.exit("Run this through `make` or `python3 scripts/dev.py`, or set COMFYUI_PATH to a ComfyUI folder.")
    sys.path.insert(0, path)
    import comfy.cli_args
    import torch

    if not torch.cuda.is_available():
        comfy.cli_args.args.cpu = True  # before anything asks for a device
