"""The 8-bit floating-point type that weights, activations and attention are rounded to, and the rounding."""

import torch
from torch import Tensor

FP8 = torch.float8_e4m3fn
FP8_MAX = torch.finfo(FP8).max  # 448
SMALLEST = 1e-12  # of the largest absolute value that a scale is made from: zeros must not divide by zero


def to_fp8(values: Tensor, scale: Tensor) -> Tensor:
    """Values over a scale that broadcasts to them, in FP8; what lies outside of its range becomes its ends."""
    return (values.float() / scale).clamp(-FP8_MAX, FP8_MAX).to(FP8)
