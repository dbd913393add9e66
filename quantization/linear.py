"""A Linear layer in FP8: weights of one byte with a scale per tensor or per row, activations quantized anew each call.

The weight, its scale and the bias are plain tensors, so ComfyUI counts, moves, pins and partly loads the layer as any
other. Scales are dynamic: a static one clips large activations and loses small ones (84 % and 56 % error measured).
Matrices are multiplied by torchao (https://github.com/pytorch/ao). Weights and activations are quantized here, to the
bit as torchao's Float8Tensor has them: that neither traces under torch.compile(fullgraph=True) when made inside a
forward nor does without float32 copies of what it quantizes (14 GB of an activation at 720p x 129 frames; of weights,
holes between those that stay, which an allocator cannot join).

FP8 arithmetic runs in bfloat16 around the product (scales per row give no other type on NVIDIA cards); an input of
another type is cast for the call. Left out: static scales, and e5m2, whose two bits of mantissa double the error.

Letters: R rows (tokens), I in_features, O out_features.
"""

from contextlib import suppress
from typing import Any

import comfy.model_management
import comfy.ops
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..float8 import FP8, FP8_MAX, SMALLEST, to_fp8
from .given import scaled_fp8

MULTIPLE = 16  # torch._scaled_mm wants both sides of a weight to be multiples of this
HEADROOM = 8  # weight_only: how far LoRA may grow a row under its scale; floating point keeps its precision below
FEW_ROWS = 4  # that a weight is read again for each of
WIDE = 8192  # in_features from which on the compiler reads a row twice
CHUNK = 1 << 25  # values quantized at a time where no compiler fuses the steps
WEIGHT_CHUNK = 1 << 22  # of a weight: larger steps would leave holes between the FP8 weights that stay


class QuantizedLinear(nn.Module):
    """Takes the place of a Linear layer: (..., I) -> (..., O) in the input's type.

    mode: "per_tensor" or "per_row" for FP8 arithmetic with scales of that kind; "weight_only" for FP8 storage and the
    input's own arithmetic, with weight scales per row.
    """

    comfy_cast_weights = False  # what ComfyUI looks for on a layer that works with its weights on another device

    def __init__(self, weight: Tensor, bias: Tensor | None, mode: str):
        super().__init__()
        _load_kernels()
        self.out_features, self.in_features = weight.shape
        self.mode = mode
        data, scale = quantize_weight(weight, mode)
        self.weight = nn.Parameter(data, requires_grad=False)  # (O, I) float8_e4m3fn
        self.weight_scale = nn.Parameter(scale, requires_grad=False)  # (1, 1) or (O, 1) float32
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)  # (O,)
        self.weight_function: list = []  # ComfyUI's patches on a weight that it has left offloaded
        self.bias_function: list = []

    def forward(self, x: Tensor) -> Tensor:
        comfy.ops.run_every_op()  # lets an interrupt in, as ComfyUI's own layers do
        if x.numel() == 0:
            return x.new_empty((*x.shape[:-1], self.out_features))
        weight, scale, bias = _beside(self.weight, x), _beside(self.weight_scale, x), None
        if self.bias is not None:
            bias = _beside(self.bias, x).to(x.dtype)
            for function in self.bias_function:
                bias = function(bias)
        if self.weight_function:
            weight = dequantize(weight, scale, x.dtype)
            for function in self.weight_function:
                weight = function(weight)
            return F.linear(x, weight, bias)
        if self.mode == "weight_only":
            if x.numel() <= FEW_ROWS * x.shape[-1] and _by_triton(x.device):
                return few_rows_linear(x, weight, scale, bias)
            return F.linear(x, dequantize(weight, scale, x.dtype), bias)
        return scaled_linear(x, weight, scale, bias)

    def convert_weight(self, weight: Tensor, inplace: bool = False, **_) -> Tensor:
        """ComfyUI asks for the plain weight before it patches it; `weight` holds the FP8 values in any type."""
        return weight.float() * _beside(self.weight_scale, weight)

    def set_weight(
        self, weight: Tensor, inplace_update: bool = False, seed: int | None = None, return_weight: bool = False, **_
    ) -> Tensor | None:
        """ComfyUI puts a patched weight in. The scale stays, so that putting back its copy of `weight` undoes it."""
        data = to_fp8(weight, _beside(self.weight_scale, weight))
        if return_weight:
            return data
        if inplace_update:
            self.weight.data.copy_(data)
        else:
            self.weight = nn.Parameter(data, requires_grad=False)
        return None

    def replace(self, weight: Tensor, bias: Tensor | None) -> None:
        """Quantize other weights into the same memory, wherever it lies and pinned or not."""
        data, scale = quantize_weight(weight, self.mode)
        self.weight.data.copy_(data)
        self.weight_scale.data.copy_(scale)
        if bias is not None and self.bias is not None:
            self.bias = nn.Parameter(bias.to(self.bias.device), requires_grad=False)

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}, {self.mode}"


def quantize_weight(weight: Tensor, mode: str) -> tuple[Tensor, Tensor]:
    """FP8 values (O, I) and float32 scale, (1, 1) per tensor, else (O, 1), of a weight (O, I) of any floating type.

    Of what is FP8 already its own values and scale, in memory of their own.
    """
    given = scaled_fp8(weight)
    if given is not None:
        data, scale = given
        rows = 1 if mode == "per_tensor" else weight.shape[0]
        return data.clone(), scale.float().reshape(1, 1).repeat(rows, 1)
    data = torch.empty(weight.shape, dtype=FP8, device=weight.device)
    scale = scale_of(weight, mode != "per_tensor")
    if mode == "weight_only":
        scale = scale * HEADROOM
    _fill(data, weight, scale, WEIGHT_CHUNK)
    return data, scale


def dequantize(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The plain weight (O, I) of FP8 values and their scale, rounded once."""
    return (weight.float() * scale).to(dtype)


def quantize_rows(x: Tensor, per_row: bool) -> tuple[Tensor, Tensor]:
    """FP8 values (R, I) and float32 scale, (1, 1) or (R, 1), of activations (R, I); compiled or not, the same bits."""
    if per_row and x.shape[1] >= WIDE and _by_triton(x.device):
        return _kernels.quantize_wide_rows(x)
    scale = scale_of(x, per_row)
    if torch.compiler.is_compiling() or x.numel() <= CHUNK:
        return to_fp8(x, scale), scale
    data = torch.empty_like(x, dtype=FP8)
    _fill(data, x, scale, CHUNK)
    return data, scale


def scale_of(x: Tensor, per_row: bool) -> Tensor:
    """By which values (R, I) fill FP8's range: float32, (R, 1) or (1, 1); as torchao's Float8Tensor has it."""
    largest = torch.linalg.vector_norm(x, float("inf"), dim=-1, keepdim=True)  # without the copy that abs() makes
    if not per_row:
        largest = largest.amax(dim=0, keepdim=True)
    return largest.float().clamp(min=SMALLEST) / FP8_MAX


def _fill(data: Tensor, x: Tensor, scale: Tensor, chunk: int) -> None:
    """FP8 values of x (R, I) over its scale, so many at a time."""
    step = max(1, chunk // x.shape[1])
    for start in range(0, x.shape[0], step):
        rows = slice(start, start + step)
        data[rows] = to_fp8(x[rows], scale[rows] if scale.shape[0] > 1 else scale)


def few_rows_linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """Linear of a few x (..., I) with an FP8 weight (O, I) and its scale (O, 1), by a kernel that reads the weight as
    it is: a library's product would need it in memory in the type of x first."""
    out = _kernels.few_rows_product(x.reshape(-1, x.shape[-1]), weight, scale)
    out = out.reshape(*x.shape[:-1], weight.shape[0])
    return (out if bias is None else out + bias).to(x.dtype)


def scaled_linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """Linear in FP8 arithmetic: x (..., I) of any floating type, FP8 weight (O, I), its scale, bias (O,)."""
    rows = x.reshape(-1, x.shape[-1]).to(torch.bfloat16)
    data, row_scale = quantize_rows(rows, per_row=scale.shape[0] > 1)
    bias = None if bias is None else bias.to(torch.bfloat16)
    multiply = reference_product if x.device.type == "cpu" else scaled_product
    out = multiply(data, row_scale, weight, scale, bias)
    return out.to(x.dtype).reshape(*x.shape[:-1], weight.shape[0])


def scaled_product(data: Tensor, row_scale: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """The scaled product (R, O) in bfloat16 on FP8 hardware."""
    from torchao.float8.inference import addmm_float8_unwrapped_inference

    return addmm_float8_unwrapped_inference(
        data, row_scale, weight.t(), scale.t(), output_dtype=torch.bfloat16, bias=bias, use_fast_accum=True
    )


def reference_product(data: Tensor, row_scale: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """The same on a CPU, where older PyTorch has no product of its own; a little faster than that, too."""
    out = F.linear(data.float(), weight.float()) * row_scale * scale.t()
    return (out if bias is None else out + bias).to(torch.bfloat16)


def _by_triton(device: torch.device) -> bool:
    """Whether a kernel of Triton's is part of what is being compiled, on a GPU whose Triton has FP8."""
    if _kernels is None or not torch.compiler.is_compiling() or device.type != "cuda":
        return False
    return torch.cuda.get_device_capability(device) >= (8, 9)


_kernels: Any = None  # linear_triton, where it can be had


def _load_kernels() -> None:
    """With the first layer: an import has no place in what is compiled."""
    global _kernels
    if _kernels is None and torch.cuda.is_available() and torch.version.hip is None:
        with suppress(ImportError):
            from . import linear_triton as _kernels


def _beside(tensor: Tensor, other: Tensor) -> Tensor:
    """The tensor on the other's device, for this call."""
    if tensor.device == other.device:
        return tensor
    return comfy.model_management.cast_to_device(tensor, other.device, None)
