"""Attention: padded text is cut away, and the fastest kernel that the card has does the rest."""

from .lse import attention_with_lse
from .op import enter_block
from .overriding import BLOCK_KEY, OTHER_KEY, ROPE_KEY, AttentionHook, override, stock
from .selection import Selection
from .sparse import RING, Heads, SparseAttention, Together

__all__ = [
    "BLOCK_KEY",
    "OTHER_KEY",
    "RING",
    "ROPE_KEY",
    "AttentionHook",
    "Heads",
    "Selection",
    "SparseAttention",
    "Together",
    "attention_with_lse",
    "enter_block",
    "override",
    "stock",
]
