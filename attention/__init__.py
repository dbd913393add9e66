"""Attention: padded text is cut away, and the fastest kernel that the card has does the rest."""

from .lse import attention_with_lse
from .op import enter_block
from .overriding import BLOCK_KEY, OTHER_KEY, ROPE_KEY, AttentionHook, override, stock
from .selection import Selection

__all__ = [
    "BLOCK_KEY",
    "OTHER_KEY",
    "ROPE_KEY",
    "AttentionHook",
    "Selection",
    "attention_with_lse",
    "enter_block",
    "override",
    "stock",
]
