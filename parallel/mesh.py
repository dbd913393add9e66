"""The processes that share one video: who they are, which tokens and heads each has, and sums over all of them.

Ranks are ordered in groups: neighbours exchange heads for tokens (Ulysses), the groups form rings. Tokens are dealt
out in the order of the ranks, so each Ulysses group has one stretch of the video.
"""

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def split(count: int, parts: int) -> list[int]:
    """`count` in `parts` whole numbers that differ by one at most, the larger first."""
    return [count // parts + (i < count % parts) for i in range(parts)]


class Mesh:
    """This process among all. Made by each rank at the same time, because process groups are.

    ulysses: size of the groups that exchange heads for tokens; the world's size divided by it is the number of groups.
    """

    def __init__(self, device: torch.device, ulysses: int, timeout: timedelta):
        self.device = device
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.ulysses_size, self.ring_size = ulysses, self.world // ulysses
        self.ulysses_rank, self.ring_rank = self.rank % ulysses, self.rank // ulysses
        self.ulysses_group: Any = None  # a ProcessGroup
        self.ring_group: Any = None
        for first in range(0, self.world, ulysses):
            members = list(range(first, first + ulysses))
            group = dist.new_group(members, timeout=timeout)  # by all ranks, members or not
            if self.rank in members:
                self.ulysses_group = group
        for first in range(ulysses):
            members = list(range(first, self.world, ulysses))
            group = dist.new_group(members, timeout=timeout)
            if self.rank in members:
                self.ring_group, self.ring_members = group, members

    def group_tokens(self, tokens: list[int]) -> list[int]:
        """Image tokens of each Ulysses group, from those of each rank."""
        size = self.ulysses_size
        return [sum(tokens[i * size : (i + 1) * size]) for i in range(self.ring_size)]

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
