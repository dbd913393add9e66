"""PyTorch's own kernels: FlashAttention-2 and cuDNN, both behind scaled_dot_product_attention.

ComfyUI runs the same function with FlashAttention-2 first; on Hopper cuDNN is half again as fast.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .kernel import HALF_TYPES, Kernel, Problem


def _runner(backend: SDPBackend) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)

    return run


def _flash2_obstacle(problem: Problem) -> str | None:
    if problem.device.type == "cpu":
        return None
    if problem.capability is None or problem.capability < (8, 0):
        return "FlashAttention-2 needs an NVIDIA GPU of compute capability 8.0 or higher"
    if problem.dtype not in HALF_TYPES:
        return f"FlashAttention-2 does not compute in {problem.dtype}"
    if problem.head_dim > 256 or problem.head_dim % 8:
        return f"FlashAttention-2 does not take heads of {problem.head_dim}"
    return None


def _cudnn_obstacle(problem: Problem) -> str | None:
    if problem.capability is None or problem.capability < (8, 0):
        return "cuDNN attention needs an NVIDIA GPU of compute capability 8.0 or higher"
    if not torch.backends.cudnn.is_available():
        return "this PyTorch has no cuDNN"
    if problem.dtype not in HALF_TYPES:
        return f"cuDNN attention does not compute in {problem.dtype}"
    if problem.head_dim > 128 or problem.head_dim % 8:
        return f"cuDNN attention does not take heads of {problem.head_dim}"
    return None


FLASH2 = Kernel("flash2", "FlashAttention-2", True, _flash2_obstacle, _runner(SDPBackend.FLASH_ATTENTION))
CUDNN = Kernel("cudnn", "cuDNN attention", True, _cudnn_obstacle, _runner(SDPBackend.CUDNN_ATTENTION))
