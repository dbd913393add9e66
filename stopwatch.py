"""Times on the device that computes, without making the host wait for it."""

import threading
import time
from collections.abc import Callable
from typing import Protocol

import torch


class Timed(Protocol):
    """What a stopwatch writes to."""

    ms: float | None


class Stopwatch:
    """Times spans on the device they run on, without making the host wait for it."""

    def __init__(self, device: torch.device):
        self._cuda = device.type == "cuda"
        self._lock = threading.Lock()  # ComfyUI's multi-GPU clones call on several threads
        self._spans: list[tuple[Timed, Callable[[], float | None]]] = []  # None: has not ended on the device

    def start(self) -> Callable[[Timed], None]:
        """Start a span; at its end, call the result with what its time is for."""
        if not self._cuda:
            begun = time.perf_counter()

            def stop(timed: Timed) -> None:
                elapsed = 1000 * (time.perf_counter() - begun)
                self._spans.append((timed, lambda: elapsed))

            return stop
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        first.record()

        def stop_cuda(timed: Timed) -> None:
            last.record()
            self._spans.append((timed, lambda: first.elapsed_time(last) if last.query() else None))

        return stop_cuda

    def look(self) -> list[Timed]:
        """Write the times that are known by now, without waiting; returns what they are for."""
        found: list[Timed] = []
        with self._lock:
            while self._spans and (elapsed := self._spans[0][1]()) is not None:
                timed, _ = self._spans.pop(0)
                timed.ms = elapsed
                found.append(timed)
        return found

    def read(self) -> None:
        """Write all times into what they are for. Waits for the device."""
        if self._cuda:
            torch.cuda.synchronize()
        for timed, elapsed in self._spans:
            timed.ms = elapsed()
        self._spans.clear()
