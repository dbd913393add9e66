"""Compiled blocks: each kind of transformer block once, by torch.compile."""

from .blocks import CompiledBlocks, compile_settings

__all__ = ["CompiledBlocks", "compile_settings"]
