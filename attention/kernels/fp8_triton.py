"""FP8 values of attention's inputs on a GPU, as Triton kernels. Imported where they run; needs Triton.

Written out because the compiler's kernels for it, made for any length, took 3 to 4 ms a tensor of 118,860 tokens and 24
heads on an H100, these take 0.3: one reduction a head occupies 24 of 132 multiprocessors, and indices were divided at
run time.

Letters: B batch, H heads, S tokens, D head dim.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 64  # tokens that one program handles


@triton.jit
def _load(x, offset, stride_b, stride_h, stride_s, heads, tokens, width, WIDTH: tl.constexpr, ROWS: tl.constexpr):
    """A piece of one head less the offset, float32; zeros outside."""
    head = tl.program_id(1)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, WIDTH)
    inside = (rows < tokens)[:, None] & (columns < width)[None, :]
    start = x + (head // heads).to(tl.int64) * stride_b + (head % heads).to(tl.int64) * stride_h
    places = rows.to(tl.int64)[:, None] * stride_s + columns[None, :]
    moved = tl.load(offset + head * width + columns, mask=columns < width, other=0.0)
    values = tl.load(start + places, mask=inside, other=0.0).to(tl.float32) - moved[None, :]
    return tl.where(inside, values, 0.0), rows, columns, inside


@triton.jit
def _largest(
    x, offset, largest, stride_b, stride_h, stride_s, heads, tokens, width, WIDTH: tl.constexpr, ROWS: tl.constexpr
):
    values, _, _, _ = _load(x, offset, stride_b, stride_h, stride_s, heads, tokens, width, WIDTH, ROWS)
    place = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    tl.store(largest + place, tl.max(tl.max(tl.abs(values), axis=1), axis=0))


@triton.jit
def _round(
    x, offset, scale, out, stride_b, stride_h, stride_s, heads, tokens, width, WIDTH: tl.constexpr, ROWS: tl.constexpr
):
    values, rows, columns, inside = _load(x, offset, stride_b, stride_h, stride_s, heads, tokens, width, WIDTH, ROWS)
    head = tl.program_id(1)
    values = values / tl.load(scale + head)
    values = tl.minimum(tl.maximum(values, -448.0), 448.0)  # the range of float8_e4m3fn
    places = rows.to(tl.int64)[:, None] * width + columns[None, :]
    tl.store(out + head.to(tl.int64) * tokens * width + places, values.to(tl.float8e4nv), mask=inside)


def quantize_head(x: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    """FP8 values (B, H, S, D) and float32 scales (B, H) of x (B, H, S, D), less an offset (B, H, 1, D) float32.

    x has any strides but 1 in D.
    """
    batch, heads, tokens, head_dim = x.shape
    sizes = (*x.stride()[:3], heads, tokens, head_dim, triton.next_power_of_2(head_dim), ROWS)
    grid = (triton.cdiv(tokens, ROWS), batch * heads)
    offset = offset.expand(batch, heads, 1, head_dim).contiguous()
    largest = torch.empty(batch, heads, grid[0], device=x.device, dtype=torch.float32)
    _largest[grid](x, offset, largest, *sizes)
    scale = (largest.amax(dim=2) / 448.0).clamp(min=1e-12)
    values = torch.empty(x.shape, device=x.device, dtype=torch.float8_e4m3fn)
    _round[grid](x, offset, scale, values, *sizes)
    return values, scale
