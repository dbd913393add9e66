"""One rank's strip of the frame, and what the ranks tell each other so that each computes its strip of the whole.

A frame is cut along one of its two sides into strips, in the order of the ranks; neighbours share an edge. Cuts lie
between latent columns, and every layer of a decoder scales all strips alike, so a strip's share of the frame is the
same in each layer. A strip of one rank is the whole frame and tells nobody anything.

B batch, C channels, T frames, G groups, W world size.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Strip:
    """dim: -1 if columns are dealt out, -2 if rows. parts: latent columns (rows) of each rank."""

    dim: int
    parts: tuple[int, ...]
    rank: int = 0

    @property
    def world(self) -> int:
        return len(self.parts)

    def cut(self, latent: Tensor) -> Tensor:
        """This rank's strip of a latent."""
        return latent.narrow(self.dim, sum(self.parts[: self.rank]), self.parts[self.rank])

    def overwrite_edges(self, x: Tensor, reach: int) -> None:
        """Put the neighbours' columns over the outermost `reach` ones of this rank's, in place, where there are
        neighbours. x has these columns beyond its own: they were padding."""
        own = x.shape[self.dim] - 2 * reach
        left, right = self._swap(x.narrow(self.dim, reach, reach), x.narrow(self.dim, own, reach))
        if left is not None:
            x.narrow(self.dim, 0, reach).copy_(left)
        if right is not None:
            x.narrow(self.dim, own + reach, reach).copy_(right)

    def extended(self, x: Tensor, reach: int) -> Tensor:
        """x with `reach` more columns on both sides: the neighbours', or zeros at the edge of the frame."""
        first, last = x.narrow(self.dim, 0, reach), x.narrow(self.dim, x.shape[self.dim] - reach, reach)
        left, right = self._swap(first, last)
        edges = (torch.zeros_like(first) if edge is None else edge for edge in (left, right))
        return torch.cat([next(edges), x, next(edges)], self.dim)

    def _swap(self, to_left: Tensor, to_right: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """What both neighbours send for what they are sent; None where there is none.

        One by one: edges are small, so it does not matter how long their memory is kept (parallel/exchange.py).
        """
        received: list[Tensor | None] = [None, None]
        operations = []
        for side, (neighbour, sent) in enumerate([(self.rank - 1, to_left), (self.rank + 1, to_right)]):
            if 0 <= neighbour < self.world:
                sent = sent.contiguous()
                room = received[side] = torch.empty_like(sent)
                operations.append(dist.P2POp(dist.isend, sent, neighbour))
                operations.append(dist.P2POp(dist.irecv, room, neighbour))
        for work in dist.batch_isend_irecv(operations) if operations else []:
            work.wait()
        return received[0], received[1]

    def moments(self, mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance over all strips from those over this one: (B, G) each, float32."""
        if self.world == 1:
            return mean, variance
        own = torch.stack([mean, variance])
        told = [torch.empty_like(own) for _ in self.parts]
        dist.all_gather(told, own)
        means, variances = torch.stack(told).unbind(1)
        weights = torch.tensor(self.parts, dtype=own.dtype, device=own.device).view(-1, 1, 1) / sum(self.parts)
        mean = (weights * means).sum(0)
        return mean, (weights * (variances + (means - mean) ** 2)).sum(0)

    def gather(self, part: Tensor) -> Tensor:
        """The whole of what is spread over the strips, (..., H, W) on every rank. At the latent's resolution."""
        if self.world == 1:
            return part
        sizes = [part.shape[self.dim] * count // self.parts[self.rank] for count in self.parts]
        parts = []
        for rank, size in enumerate(sizes):
            shape = list(part.shape)
            shape[self.dim] = size
            each = part.contiguous() if rank == self.rank else part.new_empty(shape)
            dist.broadcast(each, rank)  # because gloo gathers equal sizes only
            parts.append(each)
        return torch.cat(parts, self.dim)


def longer_side(latent: Tensor) -> int:
    """The dimension to cut a latent (..., H, W) along."""
    return -1 if latent.shape[-1] >= latent.shape[-2] else -2
