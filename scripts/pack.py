"""Import this checkout as the package `skein`, as ComfyUI would, for tests and benchmarks without a server."""

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parent.parent


def load_pack() -> ModuleType:
    """Make `skein` and ComfyUI's library importable, whatever the checkout's folder is called.

    COMFYUI_PATH names the ComfyUI folder; without a GPU its CPU mode is switched on.
    """
    if "skein" in sys.modules:
        return sys.modules["skein"]
    path = os.environ.get("COMFYUI_PATH")
    if not path:
        sys.exit("Run this through `make` or `python3 scripts/dev.py`, or set COMFYUI_PATH to a ComfyUI folder.")
    sys.path.insert(0, path)
    import comfy.cli_args
    import torch

    if not torch.cuda.is_available():
        comfy.cli_args.args.cpu = True  # before anything asks for a device
    spec = importlib.util.spec_from_file_location("skein", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["skein"] = module
    spec.loader.exec_module(module)
    return module
