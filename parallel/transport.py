"""A channel between two processes of one machine: messages over an authenticated connection, tensors in shared memory.

The memory is a file that both map and that has no name: nothing is left behind, however they end. It lies in /dev/shm
if that has room (Docker gives it 64 MB), and else among the temporary files, where the operating system keeps it in
memory just as well.
"""

import json
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .protocol import decode, encode, layout, pack, size_of, write

SMALLEST = 1 << 24  # bytes of shared memory to start with
ROOM_TO_GROW = 1 << 26  # at most, beyond what a message needs: a VAE's weights travel once
SHARED_MEMORY = Path("/dev/shm")


class Channel:
    """One end. Either side may send; the first to need more memory makes it for both."""

    def __init__(self, connection: Connection):
        _send_at_once(connection)
        self.connection = connection
        self._blob = torch.empty(0, dtype=torch.uint8)

    def send(self, kind: str, value: Any = None) -> None:
        """Send a message; its tensors may be on any device. Raises NotPlain, OSError if the other side is gone."""
        tensors: list[Tensor] = []
        data = pack(value, tensors)
        specs, size = layout(tensors)
        self._require(size)
        write(self._blob, tensors, specs)
        self.connection.send_bytes(encode(kind, data, specs, size))

    def receive(self) -> tuple[str, Any]:
        """The next message, its tensors as views of the shared memory: copy what outlives the answer. Raises
        EOFError."""
        return decode(*self.receive_raw())

    def receive_raw(self) -> tuple[bytes, Tensor]:
        """The next message as it came, and the bytes of its tensors."""
        message = self.connection.recv_bytes()
        if json.loads(message)["kind"] == "memory":
            _, memory = decode(message, self._blob)
            self._map(memory["path"], memory["size"])
            self.connection.send_bytes(encode("mapped", None))
            return self.receive_raw()
        return message, self._blob[: size_of(message)]

    def close(self) -> None:
        """Hang up, and let go of the shared memory."""
        with suppress(OSError):
            self.connection.close()
        self._blob = self._blob[:0].clone()

    def _require(self, size: int) -> None:
        """Shared memory of at least so many bytes, mapped by both sides."""
        if size <= self._blob.numel():
            return
        size = max(SMALLEST, size + min(size, ROOM_TO_GROW))
        with shared_file(size) as path:
            self._map(path, size)
            data = pack({"path": path, "size": size}, [])
            self.connection.send_bytes(encode("memory", data))
            if json.loads(self.connection.recv_bytes())["kind"] != "mapped":
                raise ConnectionError("the other side has something else to say")

    def _map(self, path: str, size: int) -> None:
        self._blob = torch.from_file(path, shared=True, size=size, dtype=torch.uint8)


def _send_at_once(connection: Connection) -> None:
    """Let no message wait until the other side has acknowledged the one before, which takes TCP 40 ms: a worker reports
    before it answers. Other connections do not wait."""
    with suppress(OSError), socket.fromfd(connection.fileno(), socket.AF_INET, socket.SOCK_STREAM) as own:
        own.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


@contextmanager
def shared_file(size: int) -> Iterator[str]:
    """Within: the path of a new file of so many bytes, this user's, with its memory set aside.

    On Linux the file has lost its name already and is reached through this process, so it goes however this one ends.
    Raises RuntimeError where there is no room.
    """
    roomy = SHARED_MEMORY.is_dir() and shutil.disk_usage(SHARED_MEMORY).free > 2 * size
    for folder in [SHARED_MEMORY, None] if roomy else [None]:
        handle, name = tempfile.mkstemp(prefix="skein-", dir=folder)
        through = f"/proc/{os.getpid()}/fd/{handle}"
        try:
            if nameless := os.path.exists(through):
                os.unlink(name)
            if reserve(handle, size):
                yield through if nameless else name
                return
        finally:
            os.close(handle)
            if not nameless:
                os.unlink(name)
    raise RuntimeError(
        f"There is no room for {size / 1e9:.1f} GB in {SHARED_MEMORY} or {tempfile.gettempdir()}; make some, or start "
        "ComfyUI with TMPDIR set to a folder that has it."
    )


def reserve(handle: int, size: int) -> bool:
    """Make an open file so long, its memory set aside; whether there is room."""
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(handle, 0, size)  # now, or writing to it could kill the process later
        else:
            os.truncate(handle, size)
    except OSError:
        return False
    return True
