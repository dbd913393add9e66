"""PyTorch's own kernels: FlashAttention-2 and cuDNN, both behind scaled_dot_product_attention.

ComfyUI runs the same function with FlashAttention-2 first; on Hopper cuDNN is half again as fast.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .kernel import Kernel, Problem, input_obstacle, plain_attention_with_lse


def _runner(backend: SDPBackend) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)

    return run


def _obstacle(problem: Problem, label: str, head_dims: range) -> str | None:
    if problem.capability is None or problem.capability < (8, 0):
        return f"{label} needs an NVIDIA GPU of compute capability 8.0 or higher"
    return input_obstacle(problem, label, head_dims)


def _flash2_obstacle(problem: Problem) -> str | None:
    # On a CPU PyTorch has a kernel of that name for every type.
    return None if problem.device.type == "cpu" else _obstacle(problem, "FlashAttention-2", range(8, 257, 8))


def _flash2_with_lse(q: Tensor, k: Tensor, v: Tensor, _spare: int) -> tuple[Tensor, Tensor]:
    if q.device.type == "cpu":  # where PyTorch's kernel of that name is another operator
        return plain_attention_with_lse(q, k, v)
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[:2]
    return out.transpose(1, 2), lse


def _cudnn_obstacle(problem: Problem) -> str | None:
    if not torch.backends.cudnn.is_available():
        return "cuDNN attention needs an NVIDIA GPU and a PyTorch with cuDNN"
    return _obstacle(problem, "cuDNN attention", range(8, 129, 8))


FLASH2 = Kernel(
    "flash2", "FlashAttention-2", True, _flash2_obstacle, _runner(SDPBackend.FLASH_ATTENTION), _flash2_with_lse
)
CUDNN = Kernel("cudnn", "cuDNN attention", True, _cudnn_obstacle, _runner(SDPBackend.CUDNN_ATTENTION))
