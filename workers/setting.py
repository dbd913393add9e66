"""What makes a group of workers, and how its processes are started: by a launcher (worker/launch.py), each worker with
one end of a pair of sockets. The other end is this process's."""

import json
import os
import platform
import socket
import subprocess
import sys
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path

from .environment import ENDPOINT
from .transport import Channel

LAUNCHER = Path(__file__).resolve().parent.parent / "worker" / "launch.py"
ALLOCATOR = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")  # before and since PyTorch 2.9
SEGMENTS = "expandable_segments:True"  # 0.9 of 24 GB were free and too scattered to be used without


@dataclass(frozen=True)
class Setting:
    """What makes a group: another setting is another group.

    devices: of this machine. degrees: see Mesh. options: of ComfyUI's command line, as JSON. nodes, endpoint: machines,
    and host:port of this one's launcher where there are several.
    """

    comfyui: str
    devices: tuple[str, ...]
    degrees: tuple[int, int]
    options: str
    nodes: int = 1
    endpoint: str = ""

    def threads(self) -> int:
        return max((os.cpu_count() or 1) // len(self.devices), 1)

    def listener(self) -> socket.socket | None:
        """Where there are several machines: a socket that listens for the others, at the endpoint alone. Raises
        ValueError."""
        if self.nodes == 1:
            return None
        host, port = self.endpoint.rsplit(":", 1)
        try:
            return socket.create_server((host, int(port)))
        except OSError as error:
            raise ValueError(
                f"{ENDPOINT} is {self.endpoint}, where ComfyUI cannot listen ({error.strerror or error}); set it to "
                "this machine's own address and a free port."
            ) from error


def choose_allocator(environment: dict[str, str]) -> None:
    """A worker's, in its environment: the user's choice, or segments that grow."""
    for name in ALLOCATOR:
        if "cudaMallocAsync" in environment.get(name, ""):  # ComfyUI's own choice
            del environment[name]
    wsl = "microsoft" in platform.release().lower()  # its driver has not always had what segments need
    if not wsl and not any(name in environment for name in ALLOCATOR):
        environment |= dict.fromkeys(ALLOCATOR, SEGMENTS)


def launch(setting: Setting) -> tuple[subprocess.Popen, dict[int, Channel]]:
    """Start workers; their launcher, which ends them when its standard input is closed, and the channels by rank.
    Raises ValueError where no other machine could join."""
    listener, pairs = setting.listener(), [Pipe() for _ in setting.devices]
    handed: list[Connection | socket.socket] = [other for _, other in pairs]
    handed += [listener] if listener else []
    told = {
        "comfyui": setting.comfyui,
        "devices": setting.devices,
        "degrees": setting.degrees,
        "options": json.loads(setting.options),
        "channels": [other.fileno() for _, other in pairs],
        "nodes": setting.nodes,
        "node": 0,
        "endpoint": setting.endpoint,
        "listener": listener.fileno() if listener else None,
    }
    environment = {**os.environ, "SKEIN_WORKERS": json.dumps(told)}
    choose_allocator(environment)
    environment.setdefault("OMP_NUM_THREADS", str(setting.threads()))
    environment.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(min(setting.threads(), 32)))  # 32: PyTorch's most
    try:
        process = subprocess.Popen(
            [sys.executable, str(LAUNCHER)], env=environment, cwd=setting.comfyui, start_new_session=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            pass_fds=[each.fileno() for each in handed],
        )  # fmt: skip
    finally:
        for each in handed:
            each.close()  # so that this process notices when a worker has ended
    return process, {rank: Channel(own) for rank, (own, _) in enumerate(pairs)}
