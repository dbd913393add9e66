"""Block-sparse attention as it is written down, in float32, on any device: for checks and for CPUs.

Letters: B batch, H heads, S tokens, D head dim, N blocks of queries, M blocks of keys.
"""

import torch
from torch import Tensor

from .selection import BLOCK, Pooled


def sparse_attention(q: Tensor, k: Tensor, v: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """Attention of (B, H, S, D) over the kept blocks (B, H, N, M): (B, S, H, D), and the log-sum-exp (B, H, S)."""
    columns = kept.repeat_interleave(BLOCK, dim=3)[..., : k.shape[2]]
    keys, values = k.float().transpose(-1, -2), v.float()
    outs, sums = [], []
    for block, part in enumerate(q.split(BLOCK, dim=2)):
        scores = part.float() @ keys * q.shape[-1] ** -0.5
        scores = scores.masked_fill(~columns[:, :, block, None], float("-inf"))
        sums.append(scores.logsumexp(dim=-1))
        outs.append((scores - sums[-1].unsqueeze(-1)).exp() @ values)
    return torch.cat(outs, dim=2).transpose(1, 2).to(q.dtype), torch.cat(sums, dim=2)


def pooled_attention(q: Tensor, k: Pooled, v: Pooled, kept: Tensor) -> tuple[Tensor, Tensor]:
    """The same over what is left out, each block as its means with the weight of all of its keys. A query for which
    nothing is left out has a log-sum-exp of minus infinity, and zeros."""
    outs, sums = [], []
    weight = k.counts.log()
    for block, part in enumerate(q.split(BLOCK, dim=2)):
        scores = part.float() @ k.means.transpose(-1, -2) * q.shape[-1] ** -0.5 + weight
        scores = scores.masked_fill(kept[:, :, block, None], float("-inf"))
        sums.append(scores.logsumexp(dim=-1))
        outs.append(torch.softmax(scores, dim=-1).nan_to_num() @ v.means)
    return torch.cat(outs, dim=2).transpose(1, 2).to(q.dtype), torch.cat(sums, dim=2)


def merged(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> Tensor:
    """Two attentions over different keys as one, (B, S, H, D). At least one of them has keys for each query."""
    (a, a_sum), (b, b_sum) = first, second
    share = torch.sigmoid(a_sum - b_sum).transpose(1, 2).unsqueeze(-1)
    return (share * a.float() + (1 - share) * b.float()).to(a.dtype)
