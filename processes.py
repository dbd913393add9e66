"""The processes that compute, ComfyUI's own and the workers: what they do, how full and busy their devices are.

Changes come from the sampling thread and from those of the worker group; live.py shows them.
"""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from . import devices, events

LOOK_SECONDS = 1.0  # between two looks at memory and utilisation
TEXT_LENGTH = 600  # of an error: a message is small

# States of a process. "ended" was asked for, "failed" was not.
STARTING, LOADING, READY, RUNNING, ENDED, FAILED = "starting", "loading", "ready", "running", "ended", "failed"


@dataclass
class Process:
    """A process that computes: ComfyUI's own (rank None) or a worker. Bytes, milliseconds, shares of 1."""

    rank: int | None
    device: str
    state: str = READY
    pid: int | None = None
    memory_used: int | None = None
    memory_total: int | None = None
    utilisation: int | None = None  # percent
    step_ms: float | None = None
    exchange_share: float | None = None
    text: str = ""  # why it failed


own = Process(None, "cpu", pid=os.getpid())  # ComfyUI's
_workers: list[Process] = []
_last_look = 0.0


def all_processes() -> list[Process]:
    """ComfyUI's own, then the workers by rank."""
    return [own, *_workers]


def begin(device: torch.device) -> None:
    """Sampling begins in this process, or with it as the one that asks."""
    own.device, own.state = str(device), RUNNING


def paced(step_ms: float) -> None:
    """Those that run take so long from the beginning of a call to that of the next."""
    for process in all_processes():
        if process.state == RUNNING:
            process.step_ms = step_ms


def rest() -> None:
    """Sampling has ended: an interrupt is not told to workers, so their state is set here."""
    for process in all_processes():
        if process.state in (LOADING, RUNNING):
            process.state = READY


def look(at_once: bool = False) -> None:
    """See how full and busy the devices are, once in a while and only for who listens."""
    global _last_look
    now = time.monotonic()
    if not events.listened_to() or (not at_once and now - _last_look < LOOK_SECONDS):
        return
    _last_look = now
    known = devices.memory_of(torch.device(own.device))
    if known is not None:
        own.memory_used, own.memory_total = known
    for process in all_processes():
        if process.state in (ENDED, FAILED):
            continue
        used, process.utilisation = devices.load_of(torch.device(process.device))
        if used is not None:
            process.memory_used = used


def started(names: Sequence[str]) -> None:
    """New workers, on devices such as "0" or "cpu"; in the place of those before."""
    with events.lock:
        _workers[:] = [
            Process(rank, name if name == "cpu" else f"cuda:{name}", STARTING) for rank, name in enumerate(names)
        ]
        events.changed()


def changed(rank: int | None = None, **values: Any) -> None:
    """Something of one worker, or of all (None), has changed: fields of Process."""
    with events.lock:
        for process in _workers:
            if rank is None or process.rank == rank:
                for name, value in values.items():
                    setattr(process, name, value[:TEXT_LENGTH] if isinstance(value, str) else value)
        events.changed()


def stand(state: str) -> None:
    """All workers are in this state now."""
    if any(process.state != state for process in _workers):
        changed(state=state)


def filled(readings: Sequence[dict]) -> None:
    """The workers' memory, as they see it."""
    with events.lock:
        known = {process.rank: process for process in _workers}
        for reading in readings:
            if reading["rank"] in known:
                process = known[reading["rank"]]
                process.memory_used, process.memory_total = reading["used"], reading["total"]
        events.changed()


def gone(rank: int | None, state: str, text: str = "") -> None:
    """All workers are gone; `rank` is the one that it began with."""
    with events.lock:
        for process in _workers:
            first = rank is None or process.rank == rank
            process.state = state if first else ENDED
            process.text = text[:TEXT_LENGTH] if first else ""
            process.memory_used = process.utilisation = None
        events.changed()
