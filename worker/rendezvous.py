"""Where workers meet: in a file on one machine, at an address on several.

On several machines the first of ComfyUI's own workers holds a key-value store at the address that the user has named.
Workers on the others learn there how they are to be set up, and say there that they live and what they die of: NCCL
notices neither. The store knows no password: whoever reaches the address can write to it.
"""

import json
import os
import socket
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import psutil
from torch.distributed import DistError, FileStore, Store, TCPStore

BEAT_SECONDS, GONE_SECONDS = 1.0, 10.0
PROCESSES, SETTINGS, FAILED, ALIVE = "skein/processes", "skein/settings", "skein/failed", "skein/alive"
JOIN_SECONDS = 300
OWN = ("comfyui", "devices", "channels", "channel", "nodes", "node", "endpoint", "listener", "store")  # not shared


def bind_to_one_network(settings: dict) -> None:
    """Have gloo and NCCL listen on one network interface only, through this process's environment: the loopback on
    one machine; on several that of the address at which they meet, where the user has not named one."""
    alone = settings["nodes"] == 1
    name = interface_to("127.0.0.1" if alone else settings["endpoint"].rsplit(":", 1)[0])
    wanted = {"GLOO_SOCKET_IFNAME": name, "NCCL_SOCKET_IFNAME": f"={name}", "NCCL_RAS_ENABLE": "0"}
    os.environ |= wanted if alone else {key: os.environ.get(key, value) for key, value in wanted.items()}


def interface_to(host: str) -> str:
    """The network interface by which this machine reaches another, or itself."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:  # sends nothing
        probe.connect((host, 9))
        own = probe.getsockname()[0]
    return next(name for name, addresses in psutil.net_if_addrs().items() if any(a.address == own for a in addresses))


def open_store(settings: dict) -> Store:
    """The store of this group; a connection of its own for one thread."""
    if settings["nodes"] == 1:
        return FileStore(settings["store"], len(settings["devices"]))
    host, port = settings["endpoint"].rsplit(":", 1)
    patience = timedelta(seconds=JOIN_SECONDS)
    if settings["listener"] is None:
        return TCPStore(host, int(port), is_master=False, timeout=patience)
    return TCPStore(
        host, int(port), is_master=True, timeout=patience, wait_for_workers=False, master_listen_fd=settings["listener"]
    )


def meet(settings: dict, store: Store) -> dict:
    """On several machines: find this process's rank among all, and how ComfyUI is set up on the first machine; waits
    for the others. Returns this machine's settings."""
    node, local = settings["node"], int(os.environ["LOCAL_RANK"])
    if local == 0:
        store.set(f"{PROCESSES}/{node}", str(len(settings["devices"])))
        if node == 0:
            store.set(SETTINGS, json.dumps({name: value for name, value in settings.items() if name not in OWN}))
    counts = [int(store.get(f"{PROCESSES}/{each}")) for each in range(settings["nodes"])]
    os.environ |= {"RANK": str(sum(counts[:node]) + local), "WORLD_SIZE": str(sum(counts))}
    own = {name: settings[name] for name in OWN}
    return {**json.loads(store.get(SETTINGS)), **own, "listener": None}  # the store has it now


def keep_saying_alive(settings: dict, rank: int) -> None:
    """On another machine: say so from now on, and end this process when the first machine's store is gone."""

    def beat() -> None:
        try:
            connection, count = open_store(settings), 0
            while True:
                count += 1
                connection.set(f"{ALIVE}/{rank}", str(count))
                time.sleep(BEAT_SECONDS)
        except (DistError, RuntimeError):
            os._exit(1)

    threading.Thread(target=beat, daemon=True).start()


def last_words(settings: dict, rank: int, kind: str, value: dict) -> None:
    """On another machine: what this worker dies of, for ComfyUI's process."""
    who = f"Worker {rank} (on {socket.gethostname()})"
    open_store(settings).set(FAILED, json.dumps({"kind": kind, "value": {**value, "who": who}}))


def watch(store: Store, away: range, tell: Callable[[str, Any], None]) -> None:
    """On the first rank: tell ComfyUI's process when a rank on another machine has failed or fallen silent.

    store: a connection for this alone.
    """

    def look() -> None:
        seen = dict.fromkeys(away, (b"", time.monotonic()))
        while True:
            time.sleep(BEAT_SECONDS)
            if store.check([FAILED]):
                failure = json.loads(store.get(FAILED))
                return tell("full" if failure["kind"] == "full" else "error", failure["value"])
            for rank in away:
                count = store.get(f"{ALIVE}/{rank}") if store.check([f"{ALIVE}/{rank}"]) else b""
                if count != seen[rank][0]:
                    seen[rank] = (count, time.monotonic())
                elif count and time.monotonic() - seen[rank][1] > GONE_SECONDS:
                    who = f"Worker {rank} (on another machine)"
                    return tell("error", {"text": "it no longer answers", "who": who})

    threading.Thread(target=look, daemon=True).start()
