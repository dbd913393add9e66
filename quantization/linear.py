"""A linear layer in FP8, as plain tensors that ComfyUI can move, count, pin and load in part.

The recipe is torchao's (github.com/pytorch/ao, Float8DynamicActivationFloat8WeightConfig): weights and activations are
scaled so that their largest value is FP8's, one scale for the tensor or one a row, activations anew in each call; the
product runs in FP8 with float32 sums; tests/quantization compares the two. torchao's tensor subclass itself does not
pass through ComfyUI: its size is counted in bf16, LoRA is lost on it, and it cannot be rebuilt inside of a compiled
graph from parts that were moved.

Letters: N outputs, K inputs, M rows (tokens).
"""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FP8 = torch.float8_e4m3fn
FP8_MAX = torch.finfo(FP8).max
TINY = 1e-12  # least scale: rows of zeros stay zeros
ROWS_AT_ONCE = 16384
ALIGNMENT = 16  # of N and K, for FP8 products


@cache
def supported_mode(mode: str, device: torch.device) -> str:
    """The mode itself, or the nearest one that the device can do: it is tried on a small product.

    FP8 products need compute capability 8.9, one scale a row more than some of those GPUs have. On a CPU every mode
    runs, by the same maths in float32, for tests.
    """
    for candidate in dict.fromkeys((mode, "per_tensor")):
        if candidate == "weight_only":
            break
        try:
            layer = QuantizedLinear(torch.ones(32, 32, device=device, dtype=torch.bfloat16), None, candidate)
            layer(torch.ones(32, 32, device=device, dtype=torch.bfloat16))
        except (RuntimeError, ValueError, NotImplementedError, AttributeError):
            continue
        return candidate
    return "weight_only"


def scale_of(x: Tensor, per_row: bool) -> Tensor:
    """float32 scales of (..., K): (..., 1) a row, or one of as many dimensions for all."""
    amax = x.abs().amax(dim=-1, keepdim=True)
    if not per_row:
        amax = amax.amax(dim=tuple(range(x.ndim)), keepdim=True) if x.numel() else amax.new_ones([1] * x.ndim)
    return (amax.float() / FP8_MAX).clamp(min=TINY)


def to_fp8(x: Tensor, scale: Tensor) -> Tensor:
    return (x.float() / scale).clamp(-FP8_MAX, FP8_MAX).to(FP8)


def quantized_rows(x: Tensor, per_row: bool) -> tuple[Tensor, Tensor]:
    """FP8 values and scales of (M, K). Outside of compiled blocks in pieces, so that no float32 copy of x exists."""
    if torch.compiler.is_compiling() or x.shape[0] <= ROWS_AT_ONCE:
        scale = scale_of(x, per_row)
        return to_fp8(x, scale), scale
    scale = torch.cat([scale_of(piece, per_row) for piece in x.split(ROWS_AT_ONCE)])
    if not per_row:
        scale = scale.amax().reshape(1, 1)
    values = torch.empty(x.shape, device=x.device, dtype=FP8)
    for start in range(0, x.shape[0], ROWS_AT_ONCE):
        piece = slice(start, start + ROWS_AT_ONCE)
        values[piece] = to_fp8(x[piece], scale[piece] if per_row else scale)
    return values, scale


class QuantizedLinear(nn.Module):
    """y = x W^T + b with W in FP8.

    weight: (N, K) float8_e4m3fn. weight_scale: float32, (N, 1) or (1, 1). bias: (N,) or None.
    mode: as in plan.FP8_MODES; weight_only multiplies in the type of the input.
    """

    # What ComfyUI's loader reads and writes on layers that it may leave in main memory.
    comfy_cast_weights = False
    weight_function: list = []
    bias_function: list = []

    def __init__(self, weight: Tensor, bias: Tensor | None, mode: str):
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.mode = mode
        # Where no product is taken in FP8, a scale a row costs nothing.
        scale = scale_of(weight, per_row=mode != "per_tensor")
        self.weight = nn.Parameter(to_fp8(weight, scale), requires_grad=False)
        self.weight_scale = nn.Parameter(scale, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) to (..., N), in the type of x."""
        weight, scale, bias = self.weight, self.weight_scale, self.bias
        if weight.device != x.device:  # left in main memory by partial loading
            weight, scale = weight.to(x.device, non_blocking=True), scale.to(x.device, non_blocking=True)
        if bias is not None:
            bias = bias.to(x.device, x.dtype, non_blocking=True)
            for function in self.bias_function:
                bias = function(bias)
        if self.mode == "weight_only" or self.weight_function:
            dequantized = (weight.to(torch.float32) * scale).to(x.dtype)
            for function in self.weight_function:  # LoRA on a layer that is loaded in part
                dequantized = function(dequantized)
            return F.linear(x, dequantized, bias)
        rows = x.reshape(-1, x.shape[-1])
        values, x_scale = quantized_rows(rows, per_row=self.mode == "per_row")
        return fp8_product(values, x_scale, weight, scale, bias, x.dtype).unflatten(0, x.shape[:-1])

    def convert_weight(self, weight: Tensor, inplace: bool = False, **kwargs) -> Tensor:
        """ComfyUI's seam for patches on a format of one's own: FP8 values, cast to another type, to true weights."""
        return weight * self.weight_scale.to(weight.device, weight.dtype)

    def set_weight(self, weight: Tensor, inplace_update: bool = False, seed=None, return_weight=False, **kwargs):
        """The way back. The scale stays, so that ComfyUI, which keeps only `weight`, can restore what was there."""
        values = to_fp8(weight, self.weight_scale.to(weight.device))
        if return_weight:
            return values
        if inplace_update:
            self.weight.data.copy_(values)
        else:
            self.weight = nn.Parameter(values, requires_grad=False)
        return None

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.mode}"


def fp8_product(
    x: Tensor, x_scale: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """(M, K) times (N, K) transposed, both FP8, as (M, N) in `dtype`. On a CPU in float32, elsewhere in FP8."""
    if x.device.type == "cpu":
        out = (x.float() @ weight.float().t()) * x_scale * scale.t()
        return (out if bias is None else out + bias.float()).to(dtype)
    fused = None if dtype == torch.float32 else bias  # the kernel adds no bias to float32
    out = torch._scaled_mm(
        x, weight.t(), scale_a=x_scale, scale_b=scale.t(), bias=fused, out_dtype=dtype, use_fast_accum=True
    )
    return out if bias is None or fused is not None else out + bias
