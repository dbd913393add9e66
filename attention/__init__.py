"""Attention: padded text is cut away, and the fastest kernel that the card has does the rest."""

from .lse import attention_with_lse
from .op import attention, enter_block
from .overriding import BLOCK_KEY, OTHER_KEY, ROPE_KEY, AttentionHook, is_ours, override, stock
from .parts import AFTER, ATTENDED_KEY, BEFORE, PART_KEY, in_parts
from .selection import Selection
from .sparse import RING, Heads, SparseAttention, Together

__all__ = [
    "AFTER",
    "ATTENDED_KEY",
    "BEFORE",
    "BLOCK_KEY",
    "OTHER_KEY",
    "PART_KEY",
    "RING",
    "ROPE_KEY",
    "AttentionHook",
    "Heads",
    "Selection",
    "SparseAttention",
    "Together",
    "attention",
    "attention_with_lse",
    "enter_block",
    "in_parts",
    "is_ours",
    "override",
    "stock",
]
