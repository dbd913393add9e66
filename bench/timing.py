"""Times of what runs on a device, and the ceilings of a card."""

import os
import statistics
import time
from collections.abc import Callable

import torch


def device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu, {os.cpu_count()} cores"


class Clock:
    """Points in time on a device: events on a GPU, the host's clock elsewhere."""

    def __init__(self, device: torch.device | str):
        self.cuda = torch.device(device).type == "cuda"

    def now(self):
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, first, last) -> float:
        """Seconds between two points; waits for the second."""
        if not self.cuda:
            return last - first
        last.synchronize()
        return first.elapsed_time(last) / 1000


def median_seconds(run: Callable[[], object], device: torch.device | str, repeats: int = 20, warm_up: int = 2) -> float:
    clock = Clock(device)
    times = []
    for _ in range(warm_up + repeats):
        first = clock.now()
        run()
        times.append(clock.between(first, clock.now()))
    return statistics.median(times[warm_up:])


def ceilings() -> dict[str, float]:
    """What this card does at best: a large bf16 product in TFLOP/s, a copy in TB/s, on random data."""
    if not torch.cuda.is_available():
        return {}
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    matmul = median_seconds(lambda: a @ b, "cuda")
    source = torch.randn(1 << 30, device="cuda", dtype=torch.bfloat16)
    target = torch.empty_like(source)
    copy = median_seconds(lambda: target.copy_(source), "cuda")
    return {"matmul_tflops": 2 * 8192**3 / matmul / 1e12, "copy_tb_s": 2 * source.nbytes / copy / 1e12}
