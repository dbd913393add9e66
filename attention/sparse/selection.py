"""Which blocks of keys each block of queries attends to: as few as leave the attention's error below what is accepted.

A block of keys is kept for a block of queries where its share of the softmax of mean query times mean key is above a
limit. The limit is found for each head in each call: by what it does to some of the queries, whose attention is computed
over all keys. One limit for all queries of a head leaves out least for a given sum of what is lost. What is left out
enters as one term a block: its mean key with the weight of all of its keys, and its mean value.

Letters: B batch, H heads, S tokens, D head dim, N blocks of queries, M blocks of keys, R sampled queries, C limits.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 128  # tokens
DENSITIES = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.6, 0.7, 0.8, 0.9)  # that limits are tried for
ALL = -1.0  # the limit below all shares
SAMPLED = 64  # queries of each head
MARGIN = 0.9  # of the accepted error: all queries may do worse than those that were sampled
PRICES = tuple(2.0**power for power in range(-8, 40))  # of an error in blocks computed, that limits are weighed by
CHUNK = 1 << 27  # values of the sampled queries' scores at a time


@dataclass
class Pooled:
    """Means of a tensor's blocks of tokens, (B, H, N, D) float32, and how many tokens each block has, (N,)."""

    means: Tensor
    counts: Tensor


@dataclass
class Chosen:
    """kept: which blocks of keys a block of queries attends to, (B, H, N, M). error: relative, of the layer's output on
    the sampled queries, (B,). errors: of each head's, (B, H)."""

    kept: Tensor
    error: Tensor
    errors: Tensor

    @property
    def density(self) -> Tensor:
        """The share of blocks that are kept, (B, H)."""
        return self.kept.float().mean(dim=(2, 3))


def pool(x: Tensor) -> Pooled:
    """Of x (B, H, S, D); the last block may be shorter."""
    tokens = x.shape[2]
    whole, rest = divmod(tokens, BLOCK)
    means = x[:, :, : whole * BLOCK].unflatten(2, (whole, BLOCK)).mean(dim=3, dtype=torch.float32)
    counts = torch.full((whole + (rest > 0),), BLOCK, device=x.device)
    if rest:
        means = torch.cat([means, x[:, :, -rest:].mean(dim=2, keepdim=True, dtype=torch.float32)], dim=2)
        counts[-1] = rest
    return Pooled(means, counts)


def shares(q: Pooled, k: Pooled, text: range) -> Tensor:
    """What each block of keys has of the softmax, in shares of a block if all were equal: (B, H, N, M) float32.
    Infinite for blocks with text, and for all where queries have text. text: of queries and of keys."""
    scores = q.means @ k.means.transpose(-1, -2) * q.means.shape[-1] ** -0.5
    found = torch.softmax(scores + k.counts.log(), dim=-1) * len(k.counts)
    if len(text):
        blocks = slice(text.start // BLOCK, (text.stop - 1) // BLOCK + 1)
        found[:, :, blocks], found[..., blocks] = float("inf"), float("inf")
    return found


def choose(q: Tensor, k: Tensor, v: Tensor, text: range, max_error: float, tail: bool = True) -> Chosen:
    """The fewest blocks that keep the relative error of a layer's output below max_error, for q, k, v (B, H, S, D).

    text: tokens that attend to all, and to which all attend. tail: whether what is left out enters by its means.
    """
    pooled_q, pooled_k, pooled_v = (pool(x) for x in (q, k, v))
    found = shares(pooled_q, pooled_k, text)
    rows = sampled_rows(q.shape[2], text, q.device)
    limits = _limits(found[:, :, rows // BLOCK])
    at_a_time = max(CHUNK // (k.shape[0] * len(rows) * k.shape[2]), 1)  # heads
    pieces = zip(*(x.split(at_a_time, dim=1) for x in (q, k, v, found, limits, pooled_k.means, pooled_v.means)))
    measured = [_errors(*piece, rows, pooled_k.counts, tail) for piece in pieces]
    lost, size, density = (torch.cat(each, dim=1) for each in zip(*measured))
    choice = _cheapest(density, lost, size, MARGIN * max_error)
    lost = lost.gather(-1, choice.unsqueeze(-1)).squeeze(-1)
    return Chosen(
        found >= limits.gather(-1, choice.unsqueeze(-1)).unsqueeze(-1),
        (lost.sum(dim=1) / size.sum(dim=1)).sqrt(),
        (lost / size).sqrt(),
    )


def _limits(found: Tensor) -> Tensor:
    """Below all shares, and for each of DENSITIES the limit that leaves it of these shares (B, H, R, M): (B, H, C)."""
    ordered = found.flatten(2).sort(dim=-1, descending=True).values
    places = [int(density * ordered.shape[-1]) for density in reversed(DENSITIES)]
    return F.pad(ordered[..., places], (1, 0), value=ALL)


def _cheapest(density: Tensor, lost: Tensor, size: Tensor, max_error: float) -> Tensor:
    """The limit of each head, (B, H), that together compute least with an error below max_error.

    density, lost: of each head and limit, (B, H, C); the first limit loses nothing. size: square of the output, (B, H).
    """
    error = lost / size.sum(dim=1)[:, None, None] / max_error**2
    prices = density.new_tensor(PRICES)
    choices = (density.unsqueeze(-1) + error.unsqueeze(-1) * prices).argmin(dim=2)  # of each price, (B, H, P)
    total = error.gather(2, choices).sum(dim=1)  # (B, P)
    enough = total <= 1
    choice = choices.gather(2, enough.int().argmax(dim=-1)[:, None, None].expand(-1, choices.shape[1], 1)).squeeze(-1)
    return torch.where(enough.any(dim=-1, keepdim=True), choice, 0)


def sampled_rows(tokens: int, text: range, device: torch.device) -> Tensor:
    """Queries spread over the image's, (R,), others in each call. The text is in front of the image or behind it."""
    start, stop = (0, text.start) if text.start else (text.stop, tokens)
    count = min(SAMPLED, stop - start)
    places = (torch.arange(count, device=device) + torch.rand(count, device=device)) * ((stop - start) / count)
    return (start + places.long()).clamp(max=stop - 1)


def _errors(
    q: Tensor, k: Tensor, v: Tensor, found: Tensor, limits: Tensor, k_means: Tensor, v_means: Tensor, rows: Tensor,
    counts: Tensor, tail: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Of the sampled queries: squares of what their output is off under each limit, (B, H, C), and of the output itself,
    (B, H); the share of blocks that is kept, (B, H, C)."""
    scale, missing = q.shape[-1] ** -0.5, -k.shape[2] % BLOCK
    sampled = q[:, :, rows].float()  # (B, H, R, D)
    scores = sampled @ k.float().transpose(-1, -2) * scale
    largest = scores.amax(dim=-1, keepdim=True)
    weights = F.pad((scores - largest).exp(), (0, missing)).unflatten(-1, (-1, BLOCK))
    values = F.pad(v.float(), (0, 0, 0, missing)).unflatten(2, (-1, BLOCK))
    mass = weights.sum(dim=-1)  # (B, H, R, M)
    sums = (weights.transpose(2, 3) @ values).transpose(2, 3)  # (B, H, R, M, D)
    exact = sums.sum(dim=3) / mass.sum(dim=3, keepdim=True)

    kept = (found[:, :, rows // BLOCK].unsqueeze(3) >= limits[:, :, None, :, None]).float()  # (B, H, R, C, M)
    total, norm = kept @ sums, kept @ mass.unsqueeze(-1)  # (B, H, R, C, D), (B, H, R, C, 1)
    if tail:
        pooled = (sampled @ k_means.transpose(-1, -2) * scale - largest).exp() * counts
        left = (1 - kept) * pooled.unsqueeze(3)
        total, norm = total + left @ v_means.unsqueeze(2), norm + left.sum(dim=-1, keepdim=True)
    off = (total / norm.clamp(min=1e-30) - exact.unsqueeze(3)).square().sum(dim=(2, 4))
    off[..., 0] = 0.0  # all is kept
    return off, exact.square().sum(dim=(2, 3)), kept.mean(dim=(2, 4))
