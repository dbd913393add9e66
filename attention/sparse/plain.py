"""The steps of block-sparse attention in plain torch, computed in float32, on any device: for CPUs, and for checks.

Letters: B batch, H heads, S tokens, D head dim, N blocks of queries, M blocks of keys, R sampled queries.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 128  # tokens
CHUNK = 1 << 25  # values of scores at a time


def means(x: Tensor) -> Tensor:
    """Means of the blocks of tokens of x (B, H, S, D): (B, H, N, D) float32; the last block may be shorter."""
    whole, rest = divmod(x.shape[2], BLOCK)
    found = x[:, :, : whole * BLOCK].unflatten(2, (whole, BLOCK)).mean(dim=3, dtype=torch.float32)
    if not rest:
        return found
    return torch.cat([found, x[:, :, -rest:].mean(dim=2, keepdim=True, dtype=torch.float32)], dim=2)


def block_outputs(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Attention of queries (B, H, R, D) over each block of keys by itself: outputs (B, H, R, M, D) and the log-sum-exp
    of the scores (B, H, R, M), for keys and values (B, H, S, D)."""
    heads = max(CHUNK // (k.shape[0] * q.shape[2] * k.shape[2]), 1)
    pieces = [_block_outputs(*piece) for piece in zip(*(x.split(heads, dim=1) for x in (q, k, v)))]
    outs, sums = (torch.cat(each, dim=1) for each in zip(*pieces))
    return outs, sums


def _block_outputs(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    missing = -k.shape[2] % BLOCK
    scores = F.pad(q.float() @ k.float().transpose(-1, -2) * q.shape[-1] ** -0.5, (0, missing), value=float("-inf"))
    scores = scores.unflatten(-1, (-1, BLOCK))  # (B, H, R, M, BLOCK)
    sums = scores.logsumexp(dim=-1)
    weights = (scores - sums.unsqueeze(-1)).exp()
    values = F.pad(v.float(), (0, 0, 0, missing)).unflatten(2, (-1, BLOCK))
    return (weights.transpose(2, 3) @ values).transpose(2, 3), sums


def sparse_attention(q: Tensor, k: Tensor, v: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """Attention of (B, H, S, D) over the kept blocks (B, H, N, M), of which there is at least one for each block of
    queries: (B, S, H, D), and the log-sum-exp (B, H, S)."""
    batch, heads, tokens, head_dim = q.shape
    out, sums = q.new_empty(batch, tokens, heads, head_dim), q.new_empty(batch, heads, tokens, dtype=torch.float32)
    places = torch.arange(k.shape[2], device=q.device).split(BLOCK)
    for sample in range(batch):
        for head in range(heads):
            keys, values = k[sample, head].float(), v[sample, head].float()
            for block, rows in enumerate(q[sample, head].split(BLOCK)):
                among = torch.cat([places[i] for i in kept[sample, head, block].nonzero().flatten().tolist()])
                scores = rows.float() @ keys[among].T * head_dim**-0.5
                lse = scores.logsumexp(dim=-1)
                these = slice(block * BLOCK, block * BLOCK + len(rows))
                sums[sample, head, these] = lse
                out[sample, these, head] = ((scores - lse.unsqueeze(-1)).exp() @ values[among]).to(q.dtype)
    return out, sums


def sparse_attention_of_rows(q: Tensor, k: Tensor, v: Tensor, kept: Tensor, rows: Tensor) -> Tensor:
    """What `sparse_attention` gives for some rows (R,), (B, R, H, D) float32."""
    outs, sums = block_outputs(q[:, :, rows], k, v)
    weights = torch.softmax(sums.masked_fill(~kept[:, :, rows // BLOCK], float("-inf")), dim=-1)
    return (weights.unsqueeze(-2) @ outs).squeeze(-2).transpose(1, 2)


def add_tail(
    out: Tensor, sums: Tensor, q: Tensor, k_means: Tensor, v_means: Tensor, counts: Tensor, kept: Tensor
) -> Tensor:
    """Attention (B, S, H, D) over the kept blocks, with its log-sum-exp (B, H, S), and over what is left out, each
    block as its means (B, H, M, D) with the weight of all of its keys: (B, S, H, D), maybe in out's place.

    counts: keys of each block, (M,).
    """
    parts = []
    for block, rows in enumerate(q.split(BLOCK, dim=2)):
        scores = rows.float() @ k_means.transpose(-1, -2) * q.shape[-1] ** -0.5 + counts.log()
        scores = scores.masked_fill(kept[:, :, block, None], float("-inf"))
        lse = scores.logsumexp(dim=-1)
        left = torch.softmax(scores, dim=-1).nan_to_num() @ v_means  # zeros where nothing is left out
        these = slice(block * BLOCK, block * BLOCK + rows.shape[2])
        share = torch.sigmoid(sums[:, :, these] - lse).transpose(1, 2).unsqueeze(-1)
        parts.append((share * out[:, these].float() + (1 - share) * left.transpose(1, 2)).to(out.dtype))
    return torch.cat(parts, dim=1)
