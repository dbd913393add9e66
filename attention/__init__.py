"""Attention: padded text is cut away, and the fastest kernel that the card has does the rest."""

from .hook import ROPE_KEY, AttentionHook, override
from .selection import Selection

__all__ = ["ROPE_KEY", "AttentionHook", "Selection", "override"]
