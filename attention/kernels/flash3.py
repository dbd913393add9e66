"""FlashAttention-3, for Hopper: in the type of the inputs, or in FP8.

Packages: `fa3-fwd` (prebuilt, forward only), or FlashAttention's own `flash_attn_interface` built from source.

In FP8, queries, keys and values get one scale a head each, and the keys lose their mean over the tokens first: it
adds the same number to all scores of a query, which softmax does not see, and what remains is smaller and so
rounded finer (SageAttention, arxiv.org/abs/2410.02367).

Letters: B batch, H heads, S tokens, D head dim.
"""

import importlib
import importlib.util
import re
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ...float8 import FP8_MAX, SMALLEST, to_fp8
from .kernel import Kernel, Problem, first, input_obstacle

MODULES = ("fa3_fwd_interface", "flash_attn_interface")
# What a library for PyTorch's stable interface says, as a RuntimeError, where there is no memory for a tensor.
NO_MEMORY = re.compile(r"empty.* API call failed|out of memory", re.DOTALL)


@cache
def _function():
    module = next(name for name in MODULES if importlib.util.find_spec(name))
    return importlib.import_module(module).flash_attn_func


def _attention(*inputs: Tensor, **options: Any) -> Any:
    """The package's function; it is out of memory as PyTorch is."""
    try:
        return _function()(*inputs, **options)
    except RuntimeError as error:
        if NO_MEMORY.search(str(error)) and not isinstance(error, torch.OutOfMemoryError):
            raise torch.OutOfMemoryError(f"FlashAttention-3 found no memory for its result: {error}") from error
        raise


def _obstacle(problem: Problem) -> str | None:
    if problem.capability is None or problem.capability[0] != 9:
        return "FlashAttention-3 runs on Hopper GPUs (H100, H200) only"
    if not any(importlib.util.find_spec(name) for name in MODULES):
        return "fa3-fwd is not installed (python -m pip install fa3-fwd)"
    return input_obstacle(problem, "FlashAttention-3", range(8, 257, 8))


def _fp8_obstacle(problem: Problem) -> str | None:
    if problem.head_dim % 16:
        return f"FlashAttention-3 in FP8 does not take heads of size {problem.head_dim}"
    return _obstacle(problem)


def _run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return first(_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)))


def _run_with_lse(q: Tensor, k: Tensor, v: Tensor, spare: int) -> tuple[Tensor, Tensor]:
    inputs = (each.transpose(1, 2) for each in (q, k, v))
    out = _attention(*inputs, sm_margin=spare, return_attn_probs=True)
    return out[0], out[1]


def _run_fp8(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    (q8, q_scale), (k8, k_scale), (v8, v_scale) = quantize_heads(q, k, v)
    scales = dict(q_descale=q_scale, k_descale=k_scale, v_descale=v_scale)
    return first(_attention(q8.transpose(1, 2), k8.transpose(1, 2), v8.transpose(1, 2), **scales)).to(q.dtype)


def quantize_heads(q: Tensor, k: Tensor, v: Tensor) -> list[tuple[Tensor, Tensor]]:
    """FP8 values (B, H, S, D) and float32 scales (B, H) of queries, keys less their mean, and values."""
    if q.device.type == "cuda":
        from .fp8_triton import quantize_head
    else:
        quantize_head = quantize_head_plainly
    zero = torch.zeros(1, 1, 1, q.shape[3], device=q.device)
    k_mean = k.mean(dim=2, keepdim=True, dtype=torch.float32)
    return [quantize_head(q, zero), quantize_head(k, k_mean), quantize_head(v, zero)]


def quantize_head_plainly(x: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    """What fp8_triton.quantize_head computes, in plain torch."""
    moved = x.float() - offset
    scale = moved.abs().amax(dim=(2, 3), keepdim=True).clamp(min=SMALLEST) / FP8_MAX
    return to_fp8(moved, scale), scale[:, :, 0, 0]


FLASH3 = Kernel("flash3", "FlashAttention-3", True, _obstacle, _run, _run_with_lse)
FLASH3_FP8 = Kernel("flash3", "FlashAttention-3 in FP8", False, _fp8_obstacle, _run_fp8)
