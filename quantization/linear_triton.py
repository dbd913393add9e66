"""Parts of a Linear layer in FP8 on a GPU, as Triton kernels that compiled blocks call. Needs Triton.

Written out where the compiler's own kernels are slow. It finds the scale of a wide row in one kernel and rounds in
another, and computes the activation before it in both. In a sum over a weight it computes the activation of x anew for
each row of the weight. Figures are in docs/LOG.md.

Letters: R rows (tokens), I in_features, O out_features.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

OUT, IN = 8, 1024  # the piece of a weight that a program reads at a time


@triton.jit
def _quantize_row(x, out, scale, width, WIDTH: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, WIDTH)
    inside = columns < width
    values = tl.load(x + row * width + columns, mask=inside, other=0.0).to(tl.float32)
    factor = tl.maximum(tl.max(tl.abs(values), axis=0), 1e-12) / 448.0  # the range of float8_e4m3fn
    values = tl.minimum(tl.maximum(values / factor, -448.0), 448.0)
    tl.store(out + row * width + columns, values.to(tl.float8e4nv), mask=inside)
    tl.store(scale + row, factor)


@triton.jit
def _multiply(x, weight, scale, out, rows, columns, OUT: tl.constexpr, IN: tl.constexpr):
    places = tl.program_id(0) * OUT + tl.arange(0, OUT)
    row = tl.program_id(1)
    inside = places < rows
    total = tl.zeros((OUT, IN), dtype=tl.float32)
    for start in range(0, columns, IN):
        across = start + tl.arange(0, IN)
        valid = across < columns
        factors = tl.load(x + row * columns + across, mask=valid, other=0.0).to(tl.float32)
        piece = weight + places.to(tl.int64)[:, None] * columns + across[None, :]
        values = tl.load(piece, mask=inside[:, None] & valid[None, :], other=0.0).to(tl.float32)
        total += values * factors[None, :]
    sums = tl.sum(total, axis=1) * tl.load(scale + places, mask=inside, other=0.0)
    tl.store(out + row * rows + places, sums, mask=inside)


def quantize_wide_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """FP8 values (R, I) and float32 scales (R, 1) of x (R, I) of any floating type; each row is read once."""
    x = x.contiguous()
    rows, width = x.shape
    out = torch.empty_like(x, dtype=torch.float8_e4m3fn)
    scale = torch.empty(rows, 1, device=x.device, dtype=torch.float32)
    _quantize_row[(rows,)](x, out, scale, width, WIDTH=triton.next_power_of_2(width), num_warps=16)
    return out, scale


def few_rows_product(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """x (R, I) of any floating type times an FP8 weight (O, I) with its scale (O, 1): (R, O) float32."""
    x = x.contiguous()
    out = torch.empty(x.shape[0], weight.shape[0], device=x.device, dtype=torch.float32)
    grid = (triton.cdiv(weight.shape[0], OUT), x.shape[0])
    _multiply[grid](x, weight, scale, out, weight.shape[0], weight.shape[1], OUT=OUT, IN=IN)
    return out
