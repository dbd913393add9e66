"""Attention that also returns the log-sum-exp of its scores, so that results over parts of the keys can be merged.

Letters: B batch, H heads, S queries, K keys, D head dim.
"""

import logging

from torch import Tensor

from ..out_of_memory import is_out_of_memory
from .kernels import KERNELS, Problem
from .kernels.kernel import plain_attention_with_lse

logger = logging.getLogger("skein")

_failed: set[tuple] = set()  # label, device, type, head dim


def attention_with_lse(q: Tensor, k: Tensor, v: Tensor, spare: int = 0) -> tuple[Tensor, Tensor]:
    """Attention of (B, H, S, D) queries over (B, H, K, D) keys and values: (B, S, H, D), and (B, H, S) in float32.

    spare: multiprocessors that a kernel which would take all to its end leaves to others.
    """
    problem = Problem.of(q)
    for kernel in KERNELS:  # the fastest first
        case = kernel.label, problem.device, problem.dtype, problem.head_dim
        if kernel.run_with_lse is None or case in _failed or kernel.obstacle(problem) is not None:
            continue
        try:
            return kernel.run_with_lse(q, k, v, spare)
        except Exception as error:  # its package may raise anything, where it was built for another PyTorch
            if is_out_of_memory(error):
                raise  # says nothing about what the kernel can do
            _failed.add(case)
            why = str(error).partition("\n")[0]
            logger.warning("Skein attention: %s failed in a ring and is not used there again (%s)", kernel.label, why)
    return plain_attention_with_lse(q, k, v)
