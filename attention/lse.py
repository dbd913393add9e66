"""Attention that also returns the log-sum-exp of its scores, so that results over parts of the keys can be merged.

Letters: B batch, H heads, S queries, K keys, D head dim.
"""

import logging
from collections.abc import Callable

import torch
from torch import Tensor

from ..out_of_memory import is_out_of_memory
from .kernels import Problem
from .kernels.flash3 import FLASH3, run_with_lse
from .kernels.kernel import Kernel
from .kernels.sdpa import FLASH2

logger = logging.getLogger("skein")

CHUNK = 1 << 26  # scores computed at a time where no kernel does it


def attention_with_lse(q: Tensor, k: Tensor, v: Tensor, spare: int = 0) -> tuple[Tensor, Tensor]:
    """Attention of (B, H, S, D) queries over (B, H, K, D) keys and values: (B, S, H, D), and (B, H, S) in float32.

    spare: multiprocessors that a kernel which would take all to its end leaves to others.
    """
    problem = Problem.of(q)
    for kernel, run in KERNELS:
        case = kernel.label, problem.device, problem.dtype, problem.head_dim
        if case in _failed or kernel.obstacle(problem) is not None:
            continue
        try:
            return run(q, k, v, spare)
        except Exception as error:  # its package may raise anything, where it was built for another PyTorch
            if is_out_of_memory(error):
                raise  # says nothing about what the kernel can do
            _failed.add(case)
            why = str(error).partition("\n")[0]
            logger.warning("Skein attention: %s failed in a ring and is not used there again (%s)", kernel.label, why)
    return _plain(q, k, v)


def _flash2(q: Tensor, k: Tensor, v: Tensor, spare: int) -> tuple[Tensor, Tensor]:
    if q.device.type == "cpu":  # where PyTorch's kernel of that name is another operator
        return _plain(q, k, v)
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[:2]
    return out.transpose(1, 2), lse


KERNELS: list[tuple[Kernel, Callable]] = [(FLASH3, run_with_lse), (FLASH2, _flash2)]  # the fastest first
_failed: set[tuple] = set()  # label, device, type, head dim


def _plain(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """In float32 and in pieces of the queries, on any device."""
    keys, values = k.float().transpose(-1, -2), v.float()
    piece = max(CHUNK // max(q.shape[0] * q.shape[1] * k.shape[2], 1), 1)
    outs, sums = [], []
    for part in q.split(piece, dim=2):
        scores = part.float() @ keys * q.shape[-1] ** -0.5
        lse = torch.logsumexp(scores, dim=-1)
        sums.append(lse)
        outs.append((scores - lse.unsqueeze(-1)).exp() @ values)
    return torch.cat(outs, dim=2).transpose(1, 2).to(q.dtype), torch.cat(sums, dim=2)
