"""Attention kernels behind one interface, one file a family.

A kernel is a function of q, k, v and what must be true for it to run. Which one is taken is decided in
selection.py; nothing here imports a kernel's package before it is asked for.

Letters: B batch, H heads, S tokens, D head dim.
"""

from .flash3 import FLASH3, FLASH3_FP8
from .flash4 import FLASH4
from .kernel import Kernel, Problem, plain_attention
from .sage import SAGE
from .sdpa import CUDNN, FLASH2

KERNELS = (FLASH3, FLASH4, CUDNN, FLASH2, FLASH3_FP8, SAGE)

__all__ = ["KERNELS", "Kernel", "Problem", "plain_attention"]
