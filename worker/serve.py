"""A worker's conversation with ComfyUI's process.

Rank 0 talks to it and hands each message to the others; all then do the same. Whatever fails on any rank is told to
ComfyUI's process, which ends the group. What all ranks refuse alike is told too, and the group stays.
"""

import contextlib
import logging
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import comfy.model_management as memory
import torch
import torch.distributed as dist
from torch import Tensor

from .. import devices, report
from ..out_of_memory import is_out_of_memory
from ..parallel.exchange import join
from ..parallel.mesh import Mesh
from ..workers.protocol import decode, size_of
from ..workers.questions import QUESTIONS
from ..workers.transport import Channel
from . import rendezvous
from .worker import Worker

PATIENCE = timedelta(hours=1)  # for a collective; ComfyUI's process has deadlines of its own, and ends a stuck group
FOREVER = timedelta(days=3650)  # for the next message
LAST_SECONDS = 30  # what a worker that has failed waits for its end


def serve(settings: dict, store: dist.Store) -> None:
    """Join the group and do what ComfyUI's process asks, until it or the launcher is gone."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    logging.basicConfig(stream=sys.stdout, level=logging.INFO, format=f"[{rank}] %(message)s", force=True)
    channel = None if settings["node"] else Channel(Connection(settings["channel"]))
    tell = channel.send if channel else partial(rendezvous.last_words, settings, rank)
    with ended_by_failure(tell), torch.inference_mode():
        if channel is None:
            rendezvous.keep_saying_alive(settings, rank)
        elif rank == 0 and settings["nodes"] > 1:
            away = range(int(os.environ["LOCAL_WORLD_SIZE"]), world)
            rendezvous.watch(rendezvous.open_store(settings), away, channel.send)
        device = memory.get_torch_device()
        join(device, PATIENCE, store, rank, world)
        mesh = Mesh(device, tuple(settings["degrees"]), PATIENCE)
        mail: Any = dist.new_group(backend="gloo", timeout=FOREVER)
        if channel:
            channel.send("ready", {"pid": os.getpid()})
        report.deliver_to(channel.send if channel and mesh.rank == 0 else lambda kind, data: None)
        worker = Worker(mesh)
        while True:
            if answer_question(worker, channel, mail) == "decode_strip":
                memory.soft_empty_cache()  # the strip itself: ComfyUI's process could not ask for it


def answer_question(worker: Worker, channel: Channel | None, mail: Any) -> str:
    """Do what the next message says, on every rank alike; its kind. Nothing of it or of the answer is held afterwards.

    mail: a group for what is not on the device.
    """
    first = channel if worker.mesh.rank == 0 else None
    kind, value = decode(*hand_out(first, worker.mesh, mail))
    question = QUESTIONS[kind]
    try:
        answer = getattr(worker, kind)(**value)
    except Exception as error:
        if channel is None or not leaves_a_worker_sound(error):
            raise
        worker.end()
        channel.send("refused", {"text": described(error), "error": type(error).__name__, "words": str(error)})
        return kind
    if kind != "call":
        tell_memory(worker.mesh, mail)  # and so done on every rank
    if channel and (first or question.everybody):
        channel.send("done", answer)
    return kind


def leaves_a_worker_sound(error: Exception) -> bool:
    """Whether a worker can go on after an error: a user's mistake or what PyTorch says of shapes, not a GPU's failure.
    RuntimeError's subclasses are other matters: out of memory, a broken connection."""
    mistake = type(error) in (RuntimeError, TypeError) and "CUDA" not in str(error)
    return isinstance(error, ValueError) or (mistake and not is_out_of_memory(error))


def described(error: BaseException) -> str:
    return str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"


def hand_out(channel: Channel | None, mesh: Mesh, mail: Any) -> tuple[bytes, Tensor]:
    """The next message on every rank, its tensors' bytes on this rank's device. channel: on the first rank."""
    message, blob = channel.receive_raw() if channel else (b"", torch.empty(0, dtype=torch.uint8))
    if mesh.world > 1:
        length = torch.tensor([len(message)])
        dist.broadcast(length, 0, group=mail)
        text = torch.frombuffer(bytearray(message or bytes(int(length))), dtype=torch.uint8)
        dist.broadcast(text, 0, group=mail)
        message = text.numpy().tobytes()
    size = size_of(message)
    blob = blob.to(mesh.device) if channel else torch.empty(size, dtype=torch.uint8, device=mesh.device)
    if mesh.world > 1 and size:
        dist.broadcast(blob, 0)
    return message, blob


@contextlib.contextmanager
def ended_by_failure(tell: Callable[[str, Any], None]) -> Iterator[None]:
    """Within: an exception is told to ComfyUI's process, which then ends this one. The end of ComfyUI ends it too."""
    try:
        yield
    except EOFError:
        os._exit(0)
    except BaseException as error:
        traceback.print_exc(file=sys.stdout)
        sys.stdout.flush()
        kind = "full" if is_out_of_memory(error) else "error"
        with contextlib.suppress(OSError, EOFError, RuntimeError):
            tell(kind, {"text": described(error)})
            # To be ended: leaving now would let the other ranks fail for lack of this one, and tell of that.
            time.sleep(LAST_SECONDS)
        os._exit(1)


def tell_memory(mesh: Mesh, mail: Any) -> None:
    """Report how full the devices of all ranks are. Waits for all of them."""
    own = torch.tensor(devices.memory_of(mesh.device) or (-1, -1))
    readings = [torch.empty_like(own) for _ in range(mesh.world)]
    dist.all_gather(readings, own, group=mail)
    known = [(rank, *(None if value < 0 else value for value in each.tolist())) for rank, each in enumerate(readings)]
    report.memory([{"rank": rank, "used": used, "total": total} for rank, used, total in known])
