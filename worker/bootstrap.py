"""What launch.py starts, one a device: makes the pack and ComfyUI importable, then runs the worker.

A script, because in ComfyUI the pack's folder has any name. Everything that must be set before ComfyUI's model
management is imported is set here: the device of this rank, and the command line options of ComfyUI's own process.
"""

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

import rendezvous  # beside this script

PACK = Path(__file__).resolve().parents[1]


def end_with_launcher() -> None:
    """End this process when the launcher has ended, also in the middle of a collective."""
    launcher = int(os.environ["SKEIN_LAUNCHER_PID"])
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


def main() -> None:
    faulthandler.enable()
    end_with_launcher()
    settings = json.loads(os.environ.pop("SKEIN_WORKER"))
    rendezvous.bind_to_one_network(settings)
    store = rendezvous.open_store(settings)
    if settings["nodes"] > 1:
        settings = rendezvous.meet(settings, store)
    prepare_comfyui(settings)
    pack = ModuleType("skein")
    pack.__path__ = [str(PACK)]
    sys.modules["skein"] = pack
    from skein.worker.serve import serve

    serve(settings, store)


if __name__ == "__main__":
    main()
