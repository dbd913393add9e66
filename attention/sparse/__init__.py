"""Attention that leaves out blocks of keys, by the error that it makes."""

from .run import RING, SparseAttention, Together
from .selection import Heads

__all__ = ["RING", "Heads", "SparseAttention", "Together"]
