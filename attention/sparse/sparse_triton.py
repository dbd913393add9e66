"""Steps of block-sparse attention on a GPU, as Triton kernels; what they compute is in plain.py. Needs Triton.

Written out because plain torch takes 2.3 ms for the means of one tensor and holds all scores of the sampled queries;
with the tail as an attention of its own, the output would be read and written twice more.

Letters: B batch, H heads, S tokens, D head dim, N blocks of queries, M blocks of keys, R sampled queries.
"""

import math

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 128  # tokens, as in plain.py
ROWS, TILE = 128, 32  # queries of a program, means of keys at a time
WARPS, STAGES = 4, 3
LOG2E = 1 / math.log(2)


@triton.jit
def _means(x, out, stride_b, stride_h, stride_s, heads, tokens, width, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    block, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    rows, columns = block * BLOCK + tl.arange(0, BLOCK), tl.arange(0, WIDTH)
    inside = (rows < tokens)[:, None] & (columns < width)[None, :]
    places = (head // heads) * stride_b + (head % heads) * stride_h + rows.to(tl.int64)[:, None] * stride_s
    values = tl.load(x + places + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    count = tl.minimum(tokens - block * BLOCK, BLOCK)
    place = (head * tl.num_programs(0) + block) * width
    tl.store(out + place + columns, tl.sum(values, axis=0) / count, mask=columns < width)


@triton.jit
def _block_outputs(
    q, k, v, outs, sums, k_b, k_h, k_s, v_b, v_h, v_s, heads, count, tokens, width, scale,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    block, blocks, head = tl.program_id(0), tl.num_programs(0), tl.program_id(1).to(tl.int64)
    rows, columns, keys = tl.arange(0, ROWS), tl.arange(0, WIDTH), block * BLOCK + tl.arange(0, BLOCK)
    wide = (columns < width)[None, :]
    queries = tl.load(
        q + (head * count + rows[:, None]) * width + columns[None, :], mask=(rows < count)[:, None] & wide, other=0.0
    )
    there = (keys < tokens)[:, None] & wide
    far = keys.to(tl.int64)[:, None]
    k_at = k + (head // heads) * k_b + (head % heads) * k_h + far * k_s + columns[None, :]
    v_at = v + (head // heads) * v_b + (head % heads) * v_h + far * v_s + columns[None, :]
    scores = tl.dot(queries, tl.trans(tl.load(k_at, mask=there, other=0.0))) * scale
    scores = tl.where((keys < tokens)[None, :], scores, float("-inf"))
    largest = tl.max(scores, axis=1)
    weights = tl.exp(scores - largest[:, None])
    norm = tl.sum(weights, axis=1)
    values = tl.load(v_at, mask=there, other=0.0)
    out = tl.dot(weights.to(values.dtype), values) / norm[:, None]
    place = (head * count + rows) * blocks + block
    tl.store(sums + place, largest + tl.log(norm), mask=rows < count)
    tl.store(
        outs + place[:, None] * width + columns[None, :], out.to(values.dtype), mask=(rows < count)[:, None] & wide
    )


@triton.jit
def _add_tail(
    out, sums, q, k_means, v_means, weight, kept, out_b, out_s, out_h, q_b, q_h, q_s, heads, tokens, width, blocks,
    query_blocks, padded, scale, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    piece, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    rows, columns = piece * ROWS + tl.arange(0, ROWS), tl.arange(0, WIDTH)
    inside = (rows < tokens)[:, None] & (columns < width)[None, :]
    far = rows.to(tl.int64)[:, None]
    at = out + (head // heads) * out_b + (head % heads) * out_h + far * out_s + columns[None, :]
    q_at = q + (head // heads) * q_b + (head % heads) * q_h + far * q_s + columns[None, :]
    queries = tl.load(q_at, mask=inside, other=0.0)
    total = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    largest = tl.load(sums + head * tokens + rows, mask=rows < tokens, other=0.0) * 1.4426950408889634
    norm = tl.full((ROWS,), 1.0, dtype=tl.float32)
    across = tl.arange(0, TILE)
    kept_at = kept + (head * query_blocks + piece * ROWS // BLOCK) * blocks + across
    k_at = k_means + head * padded * WIDTH + columns[:, None] + across[None, :] * WIDTH
    v_at = v_means + head * padded * WIDTH + across[:, None] * WIDTH + columns[None, :]
    for first in range(0, padded, TILE):
        left = tl.load(kept_at + first, mask=first + across < blocks, other=1) == 0
        bias = tl.where(left, tl.load(weight + first + across), float("-inf"))
        scores = tl.dot(queries, tl.load(k_at + first * WIDTH)) * scale + bias[None, :]
        larger = tl.maximum(largest, tl.max(scores, axis=1))
        fade = tl.exp2(largest - larger)
        weights = tl.exp2(scores - larger[:, None])
        norm = norm * fade + tl.sum(weights, axis=1)
        total *= fade[:, None]
        values = tl.load(v_at + first * WIDTH)
        total = tl.dot(weights.to(values.dtype), values, total)
        largest = larger
    tl.store(at, (total / norm[:, None]).to(out.dtype.element_ty), mask=inside)


def means(x: Tensor) -> Tensor:
    """plain.means, for x with any strides but 1 in D."""
    batch, heads, tokens, width = x.shape
    blocks = triton.cdiv(tokens, BLOCK)
    out = torch.empty(batch, heads, blocks, width, device=x.device, dtype=torch.float32)
    sizes = (*x.stride()[:3], heads, tokens, width, triton.next_power_of_2(width), BLOCK)
    _means[(blocks, batch * heads)](x, out, *sizes)
    return out


def block_outputs(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """plain.block_outputs, with outputs in the type of v, whose strides are 1 in D, as are those of k."""
    batch, heads, count, width = q.shape
    blocks = triton.cdiv(k.shape[2], BLOCK)
    outs = torch.empty(batch, heads, count, blocks, width, device=q.device, dtype=v.dtype)
    sums = torch.empty(batch, heads, count, blocks, device=q.device, dtype=torch.float32)
    _block_outputs[(blocks, batch * heads)](
        q.contiguous(), k, v, outs, sums, *k.stride()[:3], *v.stride()[:3], heads, count, k.shape[2], width,
        width**-0.5, max(triton.next_power_of_2(count), 16), triton.next_power_of_2(width), BLOCK,
    )  # fmt: skip
    return outs, sums


def add_tail(
    out: Tensor, sums: Tensor, q: Tensor, k_means: Tensor, v_means: Tensor, counts: Tensor, kept: Tensor
) -> Tensor:
    """plain.add_tail, in the place of `out`."""
    batch, heads, tokens, width = q.shape
    blocks, wide = k_means.shape[2], triton.next_power_of_2(width)
    padding = (0, wide - width, 0, -blocks % TILE)  # so that the loop needs no masks
    keys, values = (F.pad(x.to(q.dtype), padding) for x in (k_means, v_means))
    weight = F.pad(counts.log() * LOG2E, (0, -blocks % TILE))
    _add_tail[(triton.cdiv(tokens, ROWS), batch * heads)](
        out, sums.contiguous(), q, keys, values, weight, kept.contiguous().view(torch.uint8), *out.stride()[:3],
        *q.stride()[:3], heads, tokens, width, blocks, kept.shape[2], keys.shape[2], width**-0.5 * LOG2E, wide, BLOCK,
        ROWS, TILE,
        num_warps=WARPS, num_stages=STAGES,
    )  # fmt: skip
    return out
