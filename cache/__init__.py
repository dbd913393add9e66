"""First-block cache: decision, state, prediction. Pure PyTorch; nothing here imports ComfyUI."""

from .first_block import FirstBlockCache
from .hook import CacheHook
from .streams import Evaluations

__all__ = ["CacheHook", "Evaluations", "FirstBlockCache"]
