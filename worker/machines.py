"""Workers on several machines, seen from a worker: how the first learns that another is gone.

One machine runs ComfyUI; its launcher is node 0 of torchrun and holds a key-value store. Workers on other machines find
there how they are to be set up, and say there that they live and what they die of: NCCL notices neither.
"""

import json
import os
import socket
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from torch.distributed import DistError, TCPStore

BEAT_SECONDS, GONE_SECONDS = 1.0, 10.0
SETTINGS, FAILED, ALIVE = "skein/settings", "skein/failed", "skein/alive"
JOIN_SECONDS = 300


def across() -> bool:
    """Whether there are workers on other machines."""
    return int(os.environ.get("GROUP_WORLD_SIZE", "1")) > 1


def is_away() -> bool:
    """Whether ComfyUI's process is on another machine."""
    return os.environ["GROUP_RANK"] != "0"


def store() -> TCPStore:
    """A connection of its own to the launcher's store, for one thread."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return TCPStore(address, port, is_master=False, timeout=timedelta(seconds=JOIN_SECONDS))


def share_settings(settings: dict) -> None:
    """On ComfyUI's machine: tell the others how ComfyUI is set up here, but for what is this machine's own."""
    own = ("comfyui", "devices", "address", "key")
    store().set(SETTINGS, json.dumps({name: value for name, value in settings.items() if name not in own}))


def shared_settings() -> dict:
    """On another machine: what share_settings has told; waits for it."""
    return json.loads(store().get(SETTINGS))


def keep_saying_alive(rank: int) -> None:
    """On another machine: say so from now on, and end this process when the launcher of ComfyUI's machine is gone."""

    def beat() -> None:
        try:
            connection, count = store(), 0
            while True:
                count += 1
                connection.set(f"{ALIVE}/{rank}", str(count))
                time.sleep(BEAT_SECONDS)
        except (DistError, RuntimeError):
            os._exit(1)

    threading.Thread(target=beat, daemon=True).start()


def last_words(rank: int, kind: str, value: dict) -> None:
    """On another machine: what this worker dies of, for ComfyUI's process."""
    who = f"Worker {rank} (on {socket.gethostname()})"
    store().set(FAILED, json.dumps({"kind": kind, "value": {**value, "who": who}}))


def watch(away: range, tell: Callable[[str, Any], None]) -> None:
    """On the first rank: tell ComfyUI's process when a rank on another machine has failed or fallen silent."""

    def look() -> None:
        connection, seen = store(), dict.fromkeys(away, (b"", time.monotonic()))
        while True:
            time.sleep(BEAT_SECONDS)
            if connection.check([FAILED]):
                failure = json.loads(connection.get(FAILED))
                return tell(failure["kind"], failure["value"])
            for rank in away:
                count = connection.get(f"{ALIVE}/{rank}") if connection.check([f"{ALIVE}/{rank}"]) else b""
                if count != seen[rank][0]:
                    seen[rank] = (count, time.monotonic())
                elif count and time.monotonic() - seen[rank][1] > GONE_SECONDS:
                    who = f"Worker {rank} (on another machine)"
                    return tell("error", {"text": "it has fallen silent", "who": who})

    threading.Thread(target=look, daemon=True).start()
