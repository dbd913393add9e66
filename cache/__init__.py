"""First-block cache: decision, state, prediction. Pure PyTorch; nothing here imports ComfyUI."""

from .calls import CacheHook
from .first_block import FirstBlockCache
from .streams import Evaluations

__all__ = ["CacheHook", "Evaluations", "FirstBlockCache"]
