"""FlashAttention-3, for Hopper: in the type of the inputs, or in FP8.

Packages: `fa3-fwd` (prebuilt, forward only), or FlashAttention's own `flash_attn_interface` built from source.

In FP8, queries, keys and values get one scale a head each, and the keys lose their mean over the tokens first: it
adds the same number to all scores of a query, which softmax does not see, and what remains is smaller and so
rounded finer (SageAttention, arxiv.org/abs/2410.02367).

Letters: B batch, H heads, S tokens, D head dim.
"""

import importlib
import importlib.util
from functools import cache

import torch
from torch import Tensor

from .kernel import HALF_TYPES, Kernel, Problem

MODULES = ("fa3_fwd_interface", "flash_attn_interface")
FP8 = torch.float8_e4m3fn
FP8_MAX = torch.finfo(FP8).max


@cache
def _function():
    module = next(name for name in MODULES if importlib.util.find_spec(name))
    return importlib.import_module(module).flash_attn_func


def _obstacle(problem: Problem) -> str | None:
    if problem.capability is None or problem.capability[0] != 9:
        return "FlashAttention-3 runs on Hopper GPUs (H100, H200) only"
    if not any(importlib.util.find_spec(name) for name in MODULES):
        return "fa3-fwd is not installed (python -m pip install fa3-fwd)"
    if problem.dtype not in HALF_TYPES:
        return f"FlashAttention-3 does not compute in {problem.dtype}"
    if problem.head_dim > 256 or problem.head_dim % 8:
        return f"FlashAttention-3 does not take heads of {problem.head_dim}"
    return None


def _fp8_obstacle(problem: Problem) -> str | None:
    if problem.head_dim % 16:
        return f"FlashAttention-3 in FP8 does not take heads of {problem.head_dim}"
    return _obstacle(problem)


def _run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = _function()(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    return out[0] if isinstance(out, tuple) else out  # older builds return the log-sum-exp as well


def _run_fp8(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    (q8, q_scale), (k8, k_scale), (v8, v_scale) = quantize_heads(q, k, v)
    out = _function()(
        q8.transpose(1, 2), k8.transpose(1, 2), v8.transpose(1, 2),
        q_descale=q_scale, k_descale=k_scale, v_descale=v_scale,
    )  # fmt: skip
    out = out[0] if isinstance(out, tuple) else out
    return out.to(q.dtype)


def quantize_heads(q: Tensor, k: Tensor, v: Tensor) -> list[tuple[Tensor, Tensor]]:
    """FP8 values (B, H, S, D) and float32 scales (B, H) of queries, keys less their mean, and values.

    What runs over all tokens is cut so that every step has work for a whole GPU: a maximum over a head at once would
    occupy as many multiprocessors as there are heads, and cost more than it saves.
    """
    zero = torch.zeros((), device=q.device)
    k_mean = k.mean(dim=2, keepdim=True, dtype=torch.float32)
    largest, rounded = _compiled()
    parts = []
    for x, offset in ((q, zero), (k, k_mean), (v, zero)):
        scale = largest(x, offset).amax(dim=2, keepdim=True).clamp(min=1e-12) / FP8_MAX
        parts.append((rounded(x, offset, scale), scale[:, :, 0, 0].contiguous()))
    return parts


def _largest(x: Tensor, offset: Tensor) -> Tensor:
    """The largest magnitude of each token: (B, H, S, 1), float32."""
    return (x.float() - offset).abs().amax(dim=3, keepdim=True)


def _rounded(x: Tensor, offset: Tensor, scale: Tensor) -> Tensor:
    return ((x.float() - offset) / scale).clamp(-FP8_MAX, FP8_MAX).to(FP8)


@cache
def _compiled():
    """Compiled for any length: eagerly they would move about four times the bytes."""
    return torch.compile(_largest, dynamic=True), torch.compile(_rounded, dynamic=True)


FLASH3 = Kernel("flash3", "FlashAttention-3", True, _obstacle, _run)
FLASH3_FP8 = Kernel("flash3", "FlashAttention-3 in FP8", False, _fp8_obstacle, _run_fp8)
