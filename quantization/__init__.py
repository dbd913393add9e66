"""FP8 for Linear layers and for text encoders, with torchao."""

from .given import is_plain
from .layers import computes_in_fp8, is_quantized, require_float8, require_torchao, saved_bytes
from .linear import QuantizedLinear
from .run import quantized
from .text_encoder import quantize_text_encoder

__all__ = [
    "QuantizedLinear", "computes_in_fp8", "is_plain", "is_quantized", "quantize_text_encoder", "quantized",
    "require_float8", "require_torchao", "saved_bytes",
]  # fmt: skip
