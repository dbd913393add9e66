"""Kernels that compute attention over chosen blocks of keys, behind one interface.

Letters: B batch, H heads, S tokens, D head dim, N blocks of queries, M blocks of keys.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from ..kernels import Problem
from ..kernels.kernel import input_obstacle, package_obstacle
from .plain import sparse_attention
from .selection import BLOCK

Run = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class SparseKernel:
    """obstacle: why it cannot run a problem, in words; None if it can.

    run: (B, H, S, D) queries, keys and values, any strides, and which blocks are kept (B, H, N, M), at least one for each
    block of queries; to the output (B, S, H, D) and the log-sum-exp of the scores (B, H, S) in float32.
    """

    label: str
    obstacle: Callable[[Problem], str | None]
    run: Run


def lists(kept: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks are kept, (B, H, N), and which, in front in their order, (B, H, N, M); int32."""
    return kept.sum(dim=-1, dtype=torch.int32), (~kept).to(torch.uint8).argsort(dim=-1, stable=True).to(torch.int32)


def _flash4_obstacle(problem: Problem) -> str | None:
    if problem.capability is None or problem.capability[0] < 9:
        return "FlashAttention-4 runs on Hopper and Blackwell GPUs only"
    return input_obstacle(problem, "FlashAttention-4", (64, 72, 96, 120, 128)) or package_obstacle(
        "flash_attn.cute", "flash-attn-4"
    )


def _flash4(q: Tensor, k: Tensor, v: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch
    from flash_attn.cute.interface import _flash_attn_fwd

    counts, indices = lists(kept)
    blocks = BlockSparseTensorsTorch(
        mask_block_cnt=torch.zeros_like(counts), mask_block_idx=torch.zeros_like(indices), full_block_cnt=counts,
        full_block_idx=indices, block_size=(BLOCK, BLOCK),
    )  # fmt: skip
    inputs = (x.transpose(1, 2) for x in (q, k, v))
    out, lse = _flash_attn_fwd(*inputs, block_sparse_tensors=blocks, return_lse=True)[:2]
    return out, lse


@cache
def _compiled_flex() -> Callable:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def _flex_obstacle(problem: Problem) -> str | None:
    if problem.capability is None or problem.capability < (8, 0):
        return "FlexAttention is taken on NVIDIA GPUs of compute capability 8.0 or higher"
    return input_obstacle(problem, "FlexAttention", range(16, 257, 16))


def _flex(q: Tensor, k: Tensor, v: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    out, lse = _compiled_flex()(q, k, v, block_mask=flex_blocks(kept, q.shape[2]), return_lse=True)
    return out.transpose(1, 2), lse


def flex_blocks(kept: Tensor, tokens: int):
    """FlexAttention's BlockMask of the kept blocks."""
    from torch.nn.attention.flex_attention import BlockMask

    counts, indices = lists(kept)
    return BlockMask.from_kv_blocks(
        torch.zeros_like(counts), indices, counts, indices, BLOCK_SIZE=BLOCK, seq_lengths=(tokens, tokens)
    )


FLASH4 = SparseKernel("FlashAttention-4", _flash4_obstacle, _flash4)
FLEX = SparseKernel("FlexAttention", _flex_obstacle, _flex)
PLAIN = SparseKernel("plain attention", lambda problem: None, sparse_attention)
SPARSE_KERNELS = (FLASH4, FLEX)  # the fastest first; PLAIN on a CPU
