"""Kernels that compute attention over chosen blocks of keys, behind one interface.

Letters: B batch, H heads, S tokens, D head dim, N blocks of queries, M blocks of keys.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..kernels import Problem
from ..kernels.flash4 import PACKAGE
from ..kernels.kernel import input_obstacle, package_obstacle
from .plain import BLOCK, sparse_attention

REACH = 1 << 31

Run = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class SparseKernel:
    """obstacle: why it cannot run a problem, in words; None if it can.

    run: (B, H, S, D) queries, keys and values, any strides but 1 in D, and which blocks are kept (B, H, N, M), at least
    one for each block of queries; to the output (B, S, H, D) and the log-sum-exp of the scores (B, H, S) in float32.
    """

    label: str
    obstacle: Callable[[Problem], str | None]
    run: Run


def lists(kept: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks are kept, (B, H, N), and which, in their order and then zeros, (B, H, N, M); int32."""
    blocks = kept.shape[-1]
    places = kept.cumsum(dim=-1, dtype=torch.int32)
    numbers = torch.arange(blocks, device=kept.device, dtype=torch.int32).expand(kept.shape)
    indices = torch.zeros(*kept.shape[:-1], blocks + 1, device=kept.device, dtype=torch.int32)
    indices.scatter_(-1, torch.where(kept, places - 1, blocks).long(), numbers)  # those left out: all in one place
    return places[..., -1].contiguous(), indices[..., :-1].contiguous()


def _flash4_obstacle(problem: Problem) -> str | None:
    if problem.capability is None or problem.capability[0] < 9:
        return "FlashAttention-4 runs on Hopper and Blackwell GPUs only"
    return input_obstacle(problem, "FlashAttention-4", (64, 72, 96, 120, 128)) or package_obstacle(
        "flash_attn.cute", PACKAGE
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

    # Past the limit of compilations it would run uncompiled, over all blocks: with fullgraph, that is an error.
    return torch.compile(flex_attention, fullgraph=True)


@cache
def _with_lse() -> dict:
    """The argument that asks FlexAttention for the log-sum-exp."""
    from torch.nn.attention import flex_attention

    if (
        hasattr(flex_attention, "AuxRequest")
        and "return_aux" in inspect.signature(flex_attention.flex_attention).parameters
    ):
        return {"return_aux": flex_attention.AuxRequest(lse=True)}
    return {"return_lse": True}


def _flex_obstacle(problem: Problem) -> str | None:
    if problem.capability is None or problem.capability < (8, 0):
        return "FlexAttention needs an NVIDIA GPU of compute capability 8.0 or higher"
    if not torch.utils._triton.has_triton():
        return "FlexAttention needs Triton"
    return input_obstacle(problem, "FlexAttention", range(16, 257, 16)) or package_obstacle(
        "torch.nn.attention.flex_attention", "FlexAttention (PyTorch 2.5 or newer)"
    )


def within_32_bits(x: Tensor) -> Tensor:
    """The same values where FlexAttention reaches them: it counts places in 32 bits, and reads elsewhere where these
    are too few, as for a long sequence's values in a block's one wide projection. Raises ValueError if it cannot."""
    if sum((size - 1) * stride for size, stride in zip(x.shape, x.stride())) < REACH:
        return x
    if x.numel() >= REACH:
        raise ValueError(f"{x.numel()} values are too many for FlexAttention")
    return x.contiguous()


def _flex(q: Tensor, k: Tensor, v: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    q, k, v = map(within_32_bits, (q, k, v))
    out, lse = _compiled_flex()(q, k, v, block_mask=flex_blocks(kept, q.shape[2]), **_with_lse())
    return out.transpose(1, 2), getattr(lse, "lse", lse)


def flex_blocks(kept: Tensor, tokens: int):
    """FlexAttention's BlockMask of the kept blocks."""
    from torch.nn.attention.flex_attention import BlockMask

    counts, indices = lists(kept)
    makes = inspect.signature(BlockMask.from_kv_blocks).parameters
    forward_only: dict[str, Any] = (
        {"compute_q_blocks": False} if "compute_q_blocks" in makes else {}
    )  # newer; saves milliseconds
    return BlockMask.from_kv_blocks(
        torch.zeros_like(counts),
        indices,
        counts,
        indices,
        BLOCK_SIZE=BLOCK,
        seq_lengths=(tokens, tokens),
        **forward_only,
    )


FLASH4 = SparseKernel("FlashAttention-4", _flash4_obstacle, _flash4)
FLEX = SparseKernel("FlexAttention", _flex_obstacle, _flex)
PLAIN = SparseKernel(
    "plain PyTorch", lambda problem: None if problem.device.type == "cpu" else "it is for CPUs", sparse_attention
)
SPARSE_KERNELS = (FLASH4, FLEX, PLAIN)
