"""Compiled blocks: each kind of transformer block once, by torch.compile."""

from .blocks import CompiledBlocks, compile_settings
from .folder import require_own_folder

__all__ = ["CompiledBlocks", "compile_settings", "require_own_folder"]
