"""What torchrun starts, one a device: makes the pack and ComfyUI importable, then runs the worker.

    torchrun ... bootstrap.py [--comfyui FOLDER] [--devices 0,1]    on a machine that joins another's ComfyUI

A script, because in ComfyUI the pack's folder has any name. Everything that must be set before ComfyUI's model
management is imported is set here: the device of this rank, and the command line options of ComfyUI's own process.
"""

import argparse
import ctypes
import faulthandler
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from types import ModuleType

import machines  # beside this script

PACK = Path(__file__).resolve().parent.parent


def end_with_launcher() -> None:
    """End this process when the launcher has ended, also in the middle of a collective."""
    launcher = int(os.environ.get("SKEIN_LAUNCHER_PID", os.getppid()))
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG

    def watch() -> None:
        while os.getppid() == launcher:
            time.sleep(0.2)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def prepare_comfyui(settings: dict) -> None:
    """ComfyUI's library with the options of the process that asked."""
    sys.path[0] = settings["comfyui"]  # in the place of this script's folder, whose files have ordinary names
    import comfy.cli_args

    for name, value in settings["options"].items():
        setattr(comfy.cli_args.args, name, value)
    if settings["options"]["fast"]:
        comfy.cli_args.args.fast = {comfy.cli_args.PerformanceFeature(value) for value in settings["options"]["fast"]}
    import torch

    if settings["devices"][0] == "cpu":
        torch.set_num_threads(max((os.cpu_count() or 1) // int(os.environ["LOCAL_WORLD_SIZE"]), 1))
    else:
        torch.cuda.set_device(int(settings["devices"][int(os.environ["LOCAL_RANK"])]))


def read_settings() -> dict:
    """How ComfyUI is set up: from its process, or on another machine from the first worker and the command line."""
    if "SKEIN_WORKER" in os.environ:
        settings = json.loads(os.environ["SKEIN_WORKER"])
        if machines.across() and os.environ["RANK"] == "0":
            machines.share_settings(settings)
        return settings
    parser = argparse.ArgumentParser()
    parser.add_argument("--comfyui", default=str(PACK.parent.parent), help="folder of this machine's ComfyUI")
    parser.add_argument("--devices", help="such as 0,1 (default: as many GPUs as there are processes)")
    options = parser.parse_args()
    count = int(os.environ["LOCAL_WORLD_SIZE"])
    devices = options.devices.split(",") if options.devices else [str(i) for i in range(count)]
    if len(devices) != count:
        sys.exit(f"--devices names {len(devices)}, but torchrun starts {count} processes here; make them equal.")
    return {**machines.shared_settings(), "comfyui": options.comfyui, "devices": devices, "address": None}


def main() -> None:
    faulthandler.enable()
    end_with_launcher()
    settings = read_settings()
    prepare_comfyui(settings)
    pack = ModuleType("skein")
    pack.__path__ = [str(PACK)]
    sys.modules["skein"] = pack
    from skein.worker.serve import serve

    serve(settings)


if __name__ == "__main__":
    main()
