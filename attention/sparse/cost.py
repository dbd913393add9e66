"""What sparse attention costs on a device beside dense attention, and by which kernel: measured, once in a process.

Letters: B batch, H heads, S tokens, D head dim, N blocks of queries, M blocks of keys.
"""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from ...out_of_memory import is_out_of_memory
from ..kernels import Problem
from .kernels import SPARSE_KERNELS, SparseKernel
from .plain import sparse_attention_of_rows
from .selection import Chosen, sampled_rows

TOLERANCE = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 3e-2}  # relative, against plain attention
NO_KERNEL = float("inf")
MEASURED: dict[tuple, "Cost"] = {}


@dataclass(frozen=True)
class Cost:
    """Milliseconds of an attention: dense; sparse, fixed + density x whole. kernel: None if no kernel can."""

    kernel: SparseKernel | None
    dense: float
    fixed: float
    whole: float

    def pays(self, density: float) -> bool:
        """Whether sparse attention of this density is faster than dense."""
        return self.fixed + density * self.whole < self.dense

    def agreed(self, largest: Callable[[list[float]], list[float]]) -> "Cost":
        """The same on all processes: the slowest one's."""
        dense, fixed, whole = largest([self.dense, self.fixed, self.whole])
        return replace(self, dense=dense, fixed=fixed, whole=whole)


def measure(
    q: Tensor, k: Tensor, v: Tensor, dense: Callable[[], Tensor], choose: Callable[[], Chosen],
    tail: Callable[[Tensor, Tensor, Chosen], Tensor], say: Callable[[str], None], anyway: bool,
) -> Cost:  # fmt: skip
    """The cost of an attention of q, k, v (B, H, S, D), by its own data.

    dense: computes it in full. choose: the blocks. tail: adds what is left out to an output and its log-sum-exp. say:
    told why no kernel runs, where none does. anyway: kernels are tried even if choosing alone takes longer.
    """
    dense_ms = _milliseconds(dense, q.device)
    best = Cost(None, dense_ms, 0.0, NO_KERNEL)
    obstacles = {kernel: kernel.obstacle(Problem.of(q)) for kernel in SPARSE_KERNELS}
    failures: list[str] = []
    kernels = [kernel for kernel, obstacle in obstacles.items() if obstacle is None]
    with _noting(failures, "choosing blocks"):
        if kernels:
            fixed_ms = _milliseconds(choose, q.device)
            if fixed_ms >= dense_ms and not anyway:
                say(f"choosing blocks takes {fixed_ms:.2f} ms, dense attention {dense_ms:.2f} ms")
                return best
            chosen = choose()
            for kernel in kernels:
                with _noting(failures, kernel.label):
                    fixed, whole = _times(kernel, q, k, v, chosen, tail)
                    if whole < best.whole:
                        best = Cost(kernel, dense_ms, fixed_ms + fixed, whole)
    if best.kernel is None:
        say("; ".join([*filter(None, obstacles.values()), *failures]))
    return best


@contextmanager
def _noting(failures: list[str], what: str) -> Iterator[None]:
    """Within: what is raised is noted; a package may raise anything. Out of memory is raised again."""
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error):
            raise
        failures.append(f"{what} failed ({type(error).__name__}: {str(error).partition(chr(10))[0]})")
        logging.getLogger("skein").warning("Skein sparse attention: %s", failures[-1])


def _times(
    kernel: SparseKernel, q: Tensor, k: Tensor, v: Tensor, chosen: Chosen,
    tail: Callable[[Tensor, Tensor, Chosen], Tensor],
) -> tuple[float, float]:  # fmt: skip
    """Milliseconds of the tail, and of a kernel if all blocks were kept. Raises RuntimeError if it computes something
    else than attention over the kept ones."""
    _require_right(kernel, q, k, v, chosen.kept)
    out, lse = kernel.run(q, k, v, chosen.kept)
    whole = _milliseconds(partial(kernel.run, q, k, v, chosen.kept), q.device) / float(chosen.density.mean())
    return _milliseconds(partial(tail, out, lse, chosen), q.device), whole


def _require_right(kernel: SparseKernel, q: Tensor, k: Tensor, v: Tensor, kept: Tensor) -> None:
    """Raises RuntimeError if a kernel does not compute attention over the kept blocks, on some of the queries."""
    rows = sampled_rows(q.shape[2], range(0), q.device)[::4]
    expected = sparse_attention_of_rows(q, k, v, kept, rows)
    found = kernel.run(q, k, v, kept)[0][:, rows].float()
    error = float((found - expected).norm() / expected.norm().clamp(min=1e-12))
    if not error < TOLERANCE.get(q.dtype, 3e-2):
        raise RuntimeError(f"relative error {error:.2g} against plain attention over the same blocks")


def _milliseconds(run: Callable[[], object], device: torch.device) -> float:
    """The time of a call, after a first one that may compile."""
    run()
    _wait(device)
    started = time.perf_counter()
    run()
    _wait(device)
    return 1000 * (time.perf_counter() - started)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
