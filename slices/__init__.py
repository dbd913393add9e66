"""Blocks in slices of tokens, for cards on which a whole block's activations have no room."""

from .run import SlicedBlocks, can_be_sliced

__all__ = ["SlicedBlocks", "can_be_sliced"]
