"""Starts the workers of one machine, one a device, and ends them: all together, and with ComfyUI.

    python launch.py                                          by ComfyUI, which tells the rest in SKEIN_WORKERS
    python launch.py --join 10.0.0.1:29500 --nnodes 2 ...     by a person, on another machine; --help has the rest

Runs as a script and imports nothing of the pack or of PyTorch. ComfyUI holds the other end of its standard input: the
operating system closes it however ComfyUI ends, and that ends this process and the workers. Workers see this process go
and end too (bootstrap.py).

Nothing listens here. Each worker is handed its end of a channel to ComfyUI, and all of one machine meet in a file: one
without a name, which only they have open.
"""

import argparse
import contextlib
import json
import os
import select
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

BOOTSTRAP = Path(__file__).resolve().parent / "bootstrap.py"
PACK = BOOTSTRAP.parents[2]
LOOK_SECONDS = 0.1


def settings_from_person() -> dict:
    """The settings of workers that join those of ComfyUI on another machine, which tells the rest of them."""
    parser = argparse.ArgumentParser(description="Join the workers of a ComfyUI on another machine.")
    parser.add_argument("--join", required=True, metavar="HOST:PORT", help="SKEIN_RDZV_ENDPOINT of that ComfyUI")
    parser.add_argument("--nnodes", required=True, type=int, help="how many machines there are; SKEIN_NNODES")
    parser.add_argument("--node-rank", required=True, type=int, help="this machine among them: 1, 2, ...")
    parser.add_argument("--devices", required=True, help="GPUs of this machine, such as 0,1")
    parser.add_argument("--comfyui", default=str(PACK.parent.parent), help="folder of this machine's ComfyUI")
    options = parser.parse_args()
    if not 0 < options.node_rank < options.nnodes:
        parser.error(f"--node-rank must be from 1 to {options.nnodes - 1}; ComfyUI's own machine is 0.")
    devices = options.devices.replace(" ", "").split(",")
    return {
        "comfyui": options.comfyui,
        "devices": devices,
        "channels": [None] * len(devices),
        "nodes": options.nnodes,
        "node": options.node_rank,
        "endpoint": options.join,
        "listener": None,
    }


@contextlib.contextmanager
def meeting_place(settings: dict) -> Iterator[tuple[str, list[int]]]:
    """Within: the file in which the workers of one machine meet, and the handles that they need for it."""
    if settings["nodes"] > 1:
        yield "", []
    elif sys.platform == "linux":
        handle = os.memfd_create("skein-store")
        yield f"/proc/self/fd/{handle}", [handle]
    else:
        with tempfile.TemporaryDirectory(prefix="skein-") as folder:  # for this user alone
            yield os.path.join(folder, "store"), []


def start(settings: dict, rank: int, store: str, handles: list[int]) -> subprocess.Popen:
    """One worker. rank: on this machine."""
    channel, listener = settings["channels"][rank], settings["listener"] if rank == 0 else None
    told = {**settings, "channel": channel, "listener": listener, "store": store}
    world = str(len(settings["devices"]))
    environment = {
        **{name: value for name, value in os.environ.items() if name != "SKEIN_WORKERS"},
        "SKEIN_WORKER": json.dumps(told),
        "SKEIN_LAUNCHER_PID": str(os.getpid()),
        **{"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world},
    }
    own = [handle for handle in (channel, listener) if handle is not None]
    return subprocess.Popen([sys.executable, str(BOOTSTRAP)], env=environment, pass_fds=[*own, *handles])


def supervise(workers: list[subprocess.Popen], with_comfyui: bool) -> None:
    """Wait until one of the workers has ended, or ComfyUI; then end all."""
    parent = os.getppid()
    while all(worker.poll() is None for worker in workers):
        if not with_comfyui:
            select.select([], [], [], LOOK_SECONDS)
        elif os.getppid() != parent or (select.select([0], [], [], LOOK_SECONDS)[0] and not os.read(0, 4096)):
            break
    for worker in workers:
        worker.kill()
    for worker in workers:
        worker.wait()


def main() -> None:
    by_comfyui = "SKEIN_WORKERS" in os.environ
    settings = json.loads(os.environ["SKEIN_WORKERS"]) if by_comfyui else settings_from_person()
    with meeting_place(settings) as (store, handles):
        workers = [start(settings, rank, store, handles) for rank in range(len(settings["devices"]))]
        for handle in (*settings["channels"], settings["listener"]):
            if handle is not None:
                os.close(handle)  # so that ComfyUI notices when a worker has ended
        supervise(workers, by_comfyui)


if __name__ == "__main__":
    main()
