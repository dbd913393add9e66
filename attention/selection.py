"""Which kernel runs: what can run is found, checked on real data, timed, and given up when it fails.

Letters: B batch, H heads, S tokens, D head dim.
"""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from ..out_of_memory import is_out_of_memory
from ..plan import AttentionConfig
from .kernels import KERNELS, Kernel, Problem, plain_attention

logger = logging.getLogger("skein")

Attention = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]  # q, k, v (B, H, S, D), mask to (B, S, H, D)

CHECK_QUERIES, CHECK_KEYS = 64, 512
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 3e-2}  # relative; exact kernels
TOLERANCE_8BIT = 0.25  # on Gaussian scores FP8 is off by 8 %; this only tells broken from rough
TIMED_QUERIES = 16384  # against all keys: kernels differ in what they do once for all keys
PYTORCHS = ("cudnn", "flash2")  # kernels that PyTorch has
TIMES: dict[tuple, float] = {}  # milliseconds of kernels on problems that this process has met


class Selection:
    """The kernel of one run for each kind of problem it meets. Not made for several threads on one device.

    say: told what has been found out so far whenever there is more.
    """

    def __init__(
        self,
        config: AttentionConfig,
        stock: Attention,
        kernels: Sequence[Kernel] = KERNELS,
        say: Callable[[str], None] = lambda reason: None,
    ):
        self.config = config
        self.stock = stock
        self._kernels = kernels
        self._tell = say
        self._chosen: dict[tuple, Kernel | None] = {}
        self._failed: set[str] = set()  # labels
        self._missing: dict[str, str] = {}  # labels of kernels that this GPU would run -> the package they lack
        self.reasons: list[str] = []  # what was found out, in words

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, exact: bool = True) -> Tensor:
        """Attention of (B, H, S, D) queries, keys and values as (B, S, H, D), on the best kernel that works; with a
        mask, which fast kernels do not take, on ComfyUI's own.

        exact: no 8-bit kernel, even where the configuration allows it. Out of memory is raised, not caught.
        """
        while mask is None and (kernel := self.kernel_for(q, k, v, exact)) is not None:
            with self._giving_up(kernel):
                return kernel.run(q, k, v)
        return self.stock(q, k, v, mask)

    def kernel_for(self, q: Tensor, k: Tensor, v: Tensor, exact: bool = True) -> Kernel | None:
        """The kernel that attend() runs; None for ComfyUI's own attention."""
        exact = exact or not self.config.allow_8bit
        key = (q.device, q.dtype, q.shape[1], q.shape[3], exact)
        if key not in self._chosen or ((chosen := self._chosen[key]) is not None and chosen.label in self._failed):
            self._chosen[key] = self._choose(q, k, v, exact)
        return self._chosen[key]

    def _choose(self, q: Tensor, k: Tensor, v: Tensor, exact: bool) -> Kernel | None:
        wanted, problem = self.config.kernel, Problem.of(q)
        working = [kernel for kernel in self._runnable(problem, exact, wanted) if self._works(kernel, q, k, v)]
        if not working and wanted not in ("auto", "stock"):  # the named one cannot run: what auto would take
            working = [kernel for kernel in self._runnable(problem, exact, "auto") if self._works(kernel, q, k, v)]
        if working:
            several = len(working) > 1 and q.device.type == "cuda"
            chosen = self._fastest(working, q, k, v) if several else working[0]
            if not several:
                self.say(f"{working[0].label} runs")
            if chosen is not None and chosen.name in PYTORCHS:
                for missing in self._missing.values():
                    self.say(f"it can be faster: {missing}")
            return chosen
        if not exact:
            return self._choose(q, k, v, exact=True)
        if wanted != "stock":
            others = self.config.allow_8bit and self._runnable(problem, False, wanted)
            self.say(f"ComfyUI's own attention runs{' in the exact steps' if others else ': no other kernel can'}")
        return None

    def _fastest(self, kernels: list[Kernel], q: Tensor, k: Tensor, v: Tensor) -> Kernel | None:
        times: dict[str, float] = {}
        for kernel in kernels:
            with self._giving_up(kernel):
                times[kernel.label] = _milliseconds(kernel, q, k, v)
        timed = [kernel for kernel in kernels if kernel.label in times]
        if not timed:
            return None
        best = min(timed, key=lambda kernel: times[kernel.label])
        found = ", ".join(f"{label} {ms:.2f} ms" for label, ms in times.items())
        self.say(f"{best.label} runs: the fastest of {found} on {min(TIMED_QUERIES, q.shape[2])} queries")
        return best

    def _runnable(self, problem: Problem, exact: bool, wanted: str) -> list[Kernel]:
        """The kernels of this name, or of all ("auto"), that the configuration admits and this machine has; says why a
        named one is not among them."""
        if wanted == "stock":
            return []
        named = [kernel for kernel in self._kernels if wanted in ("auto", kernel.name)]
        admitted = [kernel for kernel in named if kernel.exact or not exact]
        if wanted != "auto" and any(not kernel.exact for kernel in admitted):
            admitted = [kernel for kernel in admitted if not kernel.exact]
        runnable = []
        for kernel in admitted:
            if kernel.label in self._failed:
                continue
            obstacle = kernel.obstacle(problem)
            if obstacle is None:
                runnable.append(kernel)
            elif wanted != "auto":
                self.say(f"{kernel.label} cannot run: {obstacle}", logging.WARNING)
            elif "pip install" in obstacle:
                self._missing[kernel.label] = obstacle
            else:
                logger.debug("Skein attention: %s not taken, %s", kernel.label, obstacle)
        return runnable

    def _works(self, kernel: Kernel, q: Tensor, k: Tensor, v: Tensor) -> bool:
        """Compare with plain attention on a slice of the real data."""
        q, k, v = q[:1, :, :CHECK_QUERIES], k[:1, :, :CHECK_KEYS], v[:1, :, :CHECK_KEYS]
        if not kernel.exact:  # these want as many queries as keys
            k, v = k[:, :, : q.shape[2]], v[:, :, : q.shape[2]]
        error = float("nan")
        with self._giving_up(kernel):
            error = _relative_error(kernel.run(q, k, v), plain_attention(q, k, v))
        if kernel.label in self._failed:
            return False
        tolerance = TOLERANCE.get(q.dtype, 3e-2) if kernel.exact else TOLERANCE_8BIT
        if not error < tolerance:
            self._give_up(kernel, f"relative error {error:.2g} against plain attention")
            return False
        return True

    @contextmanager
    def _giving_up(self, kernel: Kernel) -> Iterator[None]:
        """Within: what a kernel raises ends its use; its package may raise anything. Out of memory is raised again."""
        try:
            yield
        except Exception as error:
            if is_out_of_memory(error) or (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()):
                raise  # a kernel that no CUDA graph can hold runs without one
            self._give_up(kernel, f"{type(error).__name__}: {error}")

    def _give_up(self, kernel: Kernel, why: str) -> None:
        self._failed.add(kernel.label)
        self.say(f"{kernel.label} failed and is not used again in this run ({why})", logging.WARNING)

    def say(self, reason: str, level: int = logging.INFO) -> None:
        """Tell the user what was found out, once a run."""
        if reason not in self.reasons:
            self.reasons.append(reason)
            self._tell("; ".join(self.reasons))
            logger.log(level, "Skein attention: %s", reason)


def _relative_error(out: Tensor, reference: Tensor) -> float:
    """Not a number where the output is not finite, which no tolerance admits."""
    reference = reference.float()
    return float((out.float() - reference).norm() / reference.norm().clamp(min=1e-12))


def _milliseconds(kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, repeats: int = 2) -> float:
    """Time of a kernel on some of the queries, after a first run that may compile; measured once in a process."""
    key = (kernel.label, Problem.of(q))
    if key not in TIMES:
        q, k, v = q[:1, :, :TIMED_QUERIES], k[:1], v[:1]
        kernel.run(q, k, v)
        torch.cuda.synchronize(q.device)
        started = time.perf_counter()
        for _ in range(repeats):
            kernel.run(q, k, v).flatten(2).contiguous()  # as a block wants it: some kernels give another layout
        torch.cuda.synchronize(q.device)
        TIMES[key] = 1000 * (time.perf_counter() - started) / repeats
    return TIMES[key]
