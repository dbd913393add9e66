"""FP8 linear layers: half the memory, and on recent GPUs faster matrix products."""

from .encoder import quantized_text_encoder
from .linear import QuantizedLinear
from .twin import quantized

__all__ = ["QuantizedLinear", "quantized", "quantized_text_encoder"]
