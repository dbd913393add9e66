"""FP8 for Linear layers and for text encoders, with torchao."""

from .layers import is_quantized, require_float8, require_torchao
from .linear import QuantizedLinear
from .run import quantized
from .text_encoder import quantize_text_encoder

__all__ = [
    "QuantizedLinear", "is_quantized", "quantize_text_encoder", "quantized", "require_float8", "require_torchao",
]  # fmt: skip
