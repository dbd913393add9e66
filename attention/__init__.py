"""Attention: padded text is cut away, and the fastest kernel that the card has does the rest."""

from .hook import ROPE_KEY, AttentionHook, override
from .lse import attention_with_lse
from .selection import Selection

__all__ = ["ROPE_KEY", "AttentionHook", "Selection", "attention_with_lse", "override"]
