"""The processes that share one video: who they are, how they are arranged, which tokens and heads each has.

Ranks are ordered in groups: neighbours exchange heads for tokens (Ulysses), the groups form rings. Tokens are dealt
out in the order of the ranks, so each Ulysses group has one stretch of the video.
"""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..stopwatch import Stopwatch
from .exchange import new_group

logger = logging.getLogger("skein")

MARGIN = 1.1  # another arrangement is taken if it is faster by so much: results then differ in rounding only by reason
TRIAL_SECONDS = 0.2  # for each arrangement, or one run: short ones are disturbed by whatever else goes on


def split(count: int, parts: int) -> list[int]:
    """`count` in `parts` whole numbers that differ by one at most, the larger first."""
    return [count // parts + (i < count % parts) for i in range(parts)]


class Arrangement:
    """All ranks as groups of `ulysses` neighbours, and as many rings across the groups.

    Made by each rank at the same time, because process groups are.
    """

    def __init__(self, ulysses: int, timeout: timedelta):
        rank, world = dist.get_rank(), dist.get_world_size()
        if world % ulysses:
            raise ValueError(f"{world} devices cannot form groups of {ulysses}; set both degrees to 0.")
        self.ulysses_size, self.ring_size = ulysses, world // ulysses
        self.ulysses_rank, self.ring_rank = rank % ulysses, rank // ulysses
        neighbours = [list(range(first, first + ulysses)) for first in range(0, world, ulysses)]
        rings = [list(range(first, world, ulysses)) for first in range(ulysses)]
        self.ulysses_group = _group_of(rank, neighbours, timeout)
        self.ring_group = _group_of(rank, rings, timeout, beside_kernels=True)

    def __str__(self) -> str:
        return f"Ulysses {self.ulysses_size} x ring {self.ring_size}"

    def group_tokens(self, tokens: list[int]) -> list[int]:
        """Image tokens of each Ulysses group, from those of each rank."""
        size = self.ulysses_size
        return [sum(tokens[i * size : (i + 1) * size]) for i in range(self.ring_size)]


def _group_of(rank: int, groups: list[list[int]], timeout: timedelta, beside_kernels: bool = False) -> Any:
    """This rank's process group among groups that cover all ranks; None where it would be alone."""
    if len(groups[0]) == 1:
        return None
    if len(groups) == 1 and not beside_kernels:
        return dist.group.WORLD
    made = [new_group(members, timeout, beside_kernels) for members in groups]  # by all ranks, members or not
    return next(group for group, members in zip(made, groups) if rank in members)


@dataclass
class _Span:
    ms: float | None = None


class Mesh:
    """This process among all. Made by each rank at the same time.

    degrees: ranks that exchange heads for tokens, and groups of them in a ring. Where both are 0, each size of groups
    is possible, and the one that proves fastest is taken.
    """

    def __init__(self, device: torch.device, degrees: tuple[int, int], timeout: timedelta):
        self.device = device
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        ulysses, ring = degrees
        if ulysses or ring:
            sizes = [ulysses or max(self.world // ring, 1)]
        else:
            sizes = [n for n in range(self.world, 0, -1) if self.world % n == 0]
        self.arrangements = [Arrangement(size, timeout) for size in sizes]
        self._fastest: dict[tuple, Arrangement] = {}
        self._stopwatch = Stopwatch(device)
        self._spans: list[_Span] = []

    def total(self, value: Tensor) -> Tensor:
        """The sum over all ranks, in place."""
        dist.all_reduce(value)
        return value

    def gather_tokens(self, part: Tensor, tokens: list[int]) -> Tensor:
        """The whole of a (B, S_rank, C) that is spread over the ranks, on each of them: (B, S, C)."""
        batch, _, channels = part.shape
        parts = [part.new_empty(batch, count, channels) for count in tokens]
        parts[self.rank] = part.contiguous()
        # Broadcasts, because gloo gathers equal sizes only.
        for source, each in enumerate(parts):
            dist.broadcast(each, source)
        return torch.cat(parts, dim=1)

    @contextmanager
    def exchanging(self) -> Iterator[None]:
        """Within: time that parallelism costs, for exchange_seconds()."""
        stop = self._stopwatch.start()
        yield
        self._spans.append(_Span())
        stop(self._spans[-1])

    def exchange_seconds(self) -> float:
        """The time on this rank's device spent in exchanges since the last question. Waits for the device."""
        self._stopwatch.read()
        spans, self._spans = self._spans, []
        return sum(span.ms or 0.0 for span in spans) / 1000

    def fastest(
        self, among: Sequence[Arrangement], problem: tuple, need: int, run: Callable[[Arrangement], Tensor]
    ) -> Arrangement:
        """The arrangement that does a problem fastest, the same on all ranks; measured once for each problem.

        among: the first is preferred. problem: equal on all ranks. need: bytes that a trial takes; where one rank has
        not as much, the first is taken untried.
        """
        if problem not in self._fastest:
            room = _free_bytes(self.device) >= need
            times = [self._seconds(run, each) for each in among] if self._least(room) else [0.0]
            best = next(i for i, seconds in enumerate(times) if seconds <= MARGIN * min(times))
            self._fastest[problem] = among[best]
            found = ", ".join(f"{each} {1000 * seconds:.1f} ms" for each, seconds in zip(among, times))
            logger.info("Skein context parallel: %s (an attention with %s)", among[best], found)
            self.exchange_seconds()
        return self._fastest[problem]

    def _seconds(self, run: Callable[[Arrangement], Tensor], arrangement: Arrangement) -> float:
        """The shortest of some runs on the slowest rank, after a first one that may connect, choose and compile."""
        run(arrangement)
        times: list[float] = []
        while sum(times) < TRIAL_SECONDS:  # the same on all ranks
            self._least(0.0)  # all begin together
            started = time.perf_counter()
            run(arrangement)
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            times.append(-self._least(started - time.perf_counter()))
        return min(times)

    def largest(self, values: list[float]) -> list[float]:
        """Of each number, all ranks' largest."""
        largest = torch.tensor(values, device=self.device, dtype=torch.float32)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return largest.tolist()

    def _least(self, value: float) -> float:
        """The smallest of all ranks' values."""
        least = torch.tensor([float(value)], device=self.device)
        dist.all_reduce(least, dist.ReduceOp.MIN)
        return float(least)


def _free_bytes(device: torch.device) -> float:
    if device.type != "cuda":
        return float("inf")
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused
