"""A channel between two processes of one machine: messages over a pair of connected sockets, tensors in shared memory.

One process makes the pair and hands one end down to the other, so there is no address that a third could connect to.
The memory is a file that both map and that has no name: its handle travels over the sockets, nobody else reaches it,
and nothing is left behind, however the processes end.
"""

import json
import os
import socket
import tempfile
import threading
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

import psutil
import torch
from torch import Tensor

from .protocol import decode, encode, layout, pack, size_of, write

SMALLEST = 1 << 24  # bytes of shared memory to start with
ROOM_TO_GROW = 1 << 26  # at most, beyond what a message needs: a VAE's weights travel once
HANDLES = "/proc/self/fd" if os.path.isdir("/proc/self/fd") else "/dev/fd"


class Channel:
    """One end. Either side may send; the first to need more memory makes it for both."""

    def __init__(self, connection: Connection):
        """connection: one end of multiprocessing.Pipe(), which is a pair of Unix sockets."""
        self.connection = connection
        self._blob = torch.empty(0, dtype=torch.uint8)
        self._sending = threading.Lock()

    def send(self, kind: str, value: Any = None) -> None:
        """Send a message; its tensors may be on any device. Raises NotPlain, OSError if the other side is gone."""
        tensors: list[Tensor] = []
        data = pack(value, tensors)
        specs, size = layout(tensors)
        with self._sending:
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
        if json.loads(message)["kind"] != "memory":
            return message, self._blob[: size_of(message)]
        with self._socket() as own:
            _, handles, _, _ = socket.recv_fds(own, 1, 1)
        if not handles:
            raise EOFError
        self._map(handles[0], decode(message, self._blob)[1])
        return self.receive_raw()

    def close(self) -> None:
        """Hang up, and let go of the shared memory."""
        with suppress(OSError):
            self.connection.close()
        self._blob = self._blob[:0].clone()

    def _require(self, size: int) -> None:
        """Shared memory of at least so many bytes. The other side maps it before it reads what comes after."""
        if size <= self._blob.numel():
            return
        size = max(SMALLEST, size + min(size, ROOM_TO_GROW))
        handle = nameless_file(size)
        try:
            self.connection.send_bytes(encode("memory", size))
            with self._socket() as own:
                socket.send_fds(own, [b"\0"], [handle])
        except OSError:
            os.close(handle)
            raise
        self._map(handle, size)

    def _map(self, handle: int, size: int) -> None:
        try:
            self._blob = torch.from_file(f"{HANDLES}/{handle}", shared=True, size=size, dtype=torch.uint8)
        finally:
            os.close(handle)

    def _socket(self) -> socket.socket:
        """The connection as a socket, which can send file handles; to be closed."""
        return socket.fromfd(self.connection.fileno(), socket.AF_UNIX, socket.SOCK_STREAM)


def nameless_file(size: int) -> int:
    """A handle of a new file of so many bytes that has no name, its memory set aside.

    On Linux it is no part of /dev/shm, to which Docker gives 64 MB. Raises RuntimeError where there is no room.
    """
    if hasattr(os, "memfd_create"):
        handle = os.memfd_create("skein")
    else:
        handle, name = tempfile.mkstemp(prefix="skein-")
        os.unlink(name)
    try:
        if size > psutil.virtual_memory().available:
            raise OSError("more than is available")
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(handle, 0, size)  # now, or writing to it could kill the process later
        else:
            os.truncate(handle, size)
    except OSError as error:
        os.close(handle)
        raise RuntimeError(
            f"There is no room for {size / 1e9:.1f} GB of shared memory; close other programs, or choose a smaller "
            "size."
        ) from error
    return handle
