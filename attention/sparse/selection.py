"""Which blocks of keys each block of queries attends to: as few as leave the attention's error below what is accepted.

A block of keys is kept for a block of queries where its share of the softmax of mean query times mean key is above a
limit. The limit is found for each head in each call, by what it does to some of the queries, whose attention is
computed over all keys. One limit for all queries of a head leaves out least for a given sum of what is lost. What is
left out enters as one term a block: its mean key with the weight of all of its keys, and its mean value.

Letters: B batch, H heads, h those of this process, S tokens, D head dim, N blocks of queries, M blocks of keys,
R sampled queries, C limits.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...plan import SparseConfig
from . import plain
from .plain import BLOCK

DENSITIES = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.6, 0.7, 0.8, 0.9)  # that limits are tried for
ALL = -1e30  # the limit below all scores
SAMPLED = 64  # queries of each head
ROUNDING = 0.4  # of a type's epsilon: what two attention kernels differ by, relative (0.0031 in bfloat16)
DEVIATIONS = 2.0  # standard deviations by which all queries may be worse than those that were sampled
PRICES = tuple(2.0 ** (power / 8) for power in range(-64, 320))  # of an error in blocks computed, to weigh limits by
GOLDEN = (math.sqrt(5) - 1) / 2


@dataclass
class Pooled:
    """Means of a tensor's blocks of tokens, (B, H, N, D) float32, and how many tokens each block has, (N,) float32."""

    means: Tensor
    counts: Tensor


@dataclass
class Chosen:
    """kept: which blocks of keys a block of queries attends to, (B, h, N, M). k, v: their means. error: relative, of
    the layer's output on the sampled queries, (B,). errors: of each head's, (B, h)."""

    kept: Tensor
    k: Pooled
    v: Pooled
    error: Tensor
    errors: Tensor

    @property
    def density(self) -> Tensor:
        """The share of blocks that are kept, (B, h)."""
        return self.kept.mean(dim=(2, 3), dtype=torch.float32)


class _Measured(NamedTuple):
    """Of sampled queries, for each limit (B, h, C): the squares of what their output is off, and the variance of that
    sum; the squares of the output itself; the share of blocks that is kept. The first limit loses nothing."""

    lost: Tensor
    variance: Tensor
    size: Tensor
    density: Tensor


@dataclass(frozen=True)
class Heads:
    """The heads of this process among all: from `first` on. gather: of a table (B, h, C), that of all processes' heads
    (B, H, C)."""

    gather: Callable[[Tensor], Tensor] = lambda table: table
    first: int = 0


ALONE = Heads()


def parts_for(device: torch.device) -> ModuleType:
    """The module that has `means`, `block_outputs` and `add_tail` for a device: Triton's, or plain torch."""
    if device.type == "cuda" and torch.utils._triton.has_triton():
        from . import sparse_triton

        return sparse_triton
    return plain


def pool(x: Tensor) -> Pooled:
    """Of x (B, H, S, D); the last block may be shorter."""
    means = parts_for(x.device).means(x)
    counts = torch.full((means.shape[2],), float(BLOCK), device=x.device)
    counts[-1:] = float(x.shape[2] - (means.shape[2] - 1) * BLOCK)
    return Pooled(means, counts)


def choose(
    q: Tensor, k: Tensor, v: Tensor, text: range, config: SparseConfig, turn: int = 0, heads: Heads = ALONE
) -> Chosen:
    """The fewest blocks that keep the relative error of a layer's output below config.max_error, or those that another
    rule takes, for q, k, v (B, h, S, D).

    text: tokens that attend to all, and to which all attend. turn: other queries are sampled in each.
    """
    pooled_q, pooled_k, pooled_v = (pool(x) for x in (q, k, v))
    scores = _scores(pooled_q, pooled_k, text, by_deviation=config.rule == "tau")
    rows = sampled_rows(q.shape[2], text, q.device, turn)
    sampled = q[:, :, rows]
    of_rows = scores[:, :, rows // BLOCK]  # (B, h, R, M)
    limits = _limits(of_rows, config)
    outs, sums = parts_for(q.device).block_outputs(sampled, k, v)
    tail = (sampled, pooled_k, pooled_v) if config.tail else None
    measured = _measure(outs, sums, of_rows.unsqueeze(3) >= limits[:, :, None, :, None], tail)
    measured = _Measured(*heads.gather(torch.cat(measured, dim=-1)).split(limits.shape[-1], dim=-1))
    lost, size = measured.lost, measured.size[..., 0]
    rounding = (ROUNDING * torch.finfo(q.dtype).eps) ** 2
    if config.rule == "max_error":
        choice = _cheapest(measured, config.max_error**2 - rounding)
    else:
        choice = torch.ones_like(size, dtype=torch.long)
    lost = lost.gather(-1, choice.unsqueeze(-1)).squeeze(-1)
    own = slice(heads.first, heads.first + q.shape[1])
    limit = limits.gather(-1, choice[:, own].unsqueeze(-1)).unsqueeze(-1)
    error = (lost.sum(dim=1) / size.sum(dim=1).clamp(min=1e-30) + rounding).sqrt()
    errors = (lost / size.clamp(min=1e-30) + rounding).sqrt()[:, own]
    return Chosen(scores >= limit, pooled_k, pooled_v, error, errors)


def shares(q: Pooled, k: Pooled) -> Tensor:
    """What each block of keys has of the softmax, in shares of a block if all were equal: (B, H, N, M) float32."""
    scores = q.means @ k.means.transpose(-1, -2) * q.means.shape[-1] ** -0.5
    return torch.softmax(scores + k.counts.log(), dim=-1) * len(k.counts)


def deviations(q: Pooled, k: Pooled) -> Tensor:
    """By how many standard deviations the score of each block of keys is above the mean of its row: (B, H, N, M)."""
    scores = q.means @ k.means.transpose(-1, -2)
    deviation, mean = torch.std_mean(scores, dim=-1, keepdim=True)
    return (scores - mean) / deviation.clamp(min=1e-30)


def _scores(q: Pooled, k: Pooled, text: range, by_deviation: bool) -> Tensor:
    """Infinite for blocks of keys with text, and for all where queries have text; and for the largest of each row, for
    a kernel must have one."""
    found = deviations(q, k) if by_deviation else shares(q, k)
    found.scatter_(-1, found.argmax(dim=-1, keepdim=True), float("inf"))
    if len(text):
        blocks = slice(text.start // BLOCK, (text.stop - 1) // BLOCK + 1)
        found[:, :, blocks], found[..., blocks] = float("inf"), float("inf")
    return found


def _limits(scores: Tensor, config: SparseConfig) -> Tensor:
    """Limits to choose from, of the scores of some rows (B, h, R, M): first one below all, (B, h, C)."""
    batch, heads = scores.shape[:2]
    if config.rule == "tau":
        limits = scores.new_full((batch, heads, 1), config.tau)
    else:
        densities = DENSITIES if config.rule == "max_error" else (config.density,)
        ordered = scores.flatten(2).sort(dim=-1, descending=True).values
        last = ordered.shape[-1] - 1
        limits = ordered[..., [min(int(density * last), last) for density in reversed(densities)]]
    return F.pad(limits, (1, 0), value=ALL)


def _cheapest(measured: _Measured, square: float) -> Tensor:
    """The limit of each head, (B, H), that together compute least with a relative error below the square root."""
    accepted = measured.size[..., 0].sum(dim=1).clamp(min=1e-30)[:, None, None] * max(square, 1e-24)
    error, variance = measured.lost / accepted, measured.variance / accepted.square()
    prices = error.new_tensor(PRICES)
    choices = (measured.density.unsqueeze(-1) + error.unsqueeze(-1) * prices).argmin(dim=2)  # of each price, (B, H, P)
    total, spread = (x.gather(2, choices).sum(dim=1) for x in (error, variance))  # (B, P)
    enough = total + DEVIATIONS * spread.sqrt() <= 1
    choice = choices.gather(2, enough.int().argmax(dim=-1)[:, None, None].expand(-1, choices.shape[1], 1)).squeeze(-1)
    return torch.where(enough.any(dim=-1, keepdim=True), choice, 0)


def sampled_rows(tokens: int, text: range, device: torch.device, turn: int = 0) -> Tensor:
    """Queries spread over the image's, (R,), the same wherever they are asked for. The text is in front of the image or
    behind it."""
    start, stop = (0, text.start) if text.start else (text.stop, tokens)
    count = min(SAMPLED, stop - start)
    places = torch.arange(count, device=device)
    within = ((places + count * turn).double() * GOLDEN).frac()  # of each piece of the image: the golden ratio spreads
    return (start + ((places + within) * ((stop - start) / count)).long()).clamp(max=stop - 1)


def _measure(outs: Tensor, sums: Tensor, kept: Tensor, tail: tuple[Tensor, Pooled, Pooled] | None) -> _Measured:
    """What each limit does to the sampled queries.

    outs, sums: over each block of keys (plain.block_outputs). kept: (B, h, R, C, M). tail: the queries (B, h, R, D),
    keys and values, if what is left out enters by its means.
    """
    total = sums.logsumexp(dim=-1, keepdim=True)
    weights = (sums - total).exp().to(outs.dtype)
    weighed = kept * weights.unsqueeze(3)  # (B, h, R, C, M)
    out, norm = _product(weighed, outs), weighed.sum(dim=-1, keepdim=True, dtype=torch.float32)
    exact = out[:, :, :, :1] / norm[:, :, :, :1]
    if tail is not None:
        queries, k, v = tail
        scores = queries.float() @ k.means.transpose(-1, -2) * queries.shape[-1] ** -0.5 + k.counts.log()
        left = (scores - total).exp().unsqueeze(3) * ~kept
        out = out + (left.flatten(2, 3) @ v.means).view_as(out)
        norm = norm + left.sum(dim=-1, keepdim=True)
    off = (out / norm.clamp(min=1e-30) - exact).square().sum(dim=4)  # (B, h, R, C)
    lost, variance = off.sum(dim=2), off.var(dim=2, unbiased=False) * off.shape[2]
    size = exact.square().sum(dim=(2, 4)).expand_as(lost)
    return _Measured(lost, variance, size, kept.mean(dim=(2, 4), dtype=torch.float32))


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Of matrices (..., X, Y) and (..., Y, Z) in float32."""
    if a.dtype == torch.float32:
        return a @ b
    try:
        found = torch.bmm(a.flatten(0, -3), b.flatten(0, -3), out_dtype=torch.float32)
    except (TypeError, RuntimeError):  # before PyTorch 2.8, and on devices without it
        return torch.stack([x.float() @ y.float() for x, y in zip(a.flatten(0, 1), b.flatten(0, 1))]).unflatten(
            0, a.shape[:2]
        )
    return found.unflatten(0, a.shape[:-2])
