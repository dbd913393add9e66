"""SageAttention (package `sageattention`): scores from 8-bit queries and keys, any NVIDIA GPU from Ampere on."""

from functools import cache

from torch import Tensor

from .kernel import Kernel, Problem, input_obstacle, package_obstacle


@cache
def _function():
    from sageattention import sageattn

    return sageattn


def _obstacle(problem: Problem) -> str | None:
    if problem.capability is None or problem.capability < (8, 0):
        return "SageAttention needs an NVIDIA GPU of compute capability 8.0 or higher"
    return input_obstacle(problem, "SageAttention", (64, 96, 128)) or package_obstacle("sageattention", "sageattention")


def _run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    # (B, H, S, D) is version 1's only layout and version 2's default.
    return _function()(q.contiguous(), k.contiguous(), v.contiguous()).transpose(1, 2)


SAGE = Kernel("sage", "SageAttention", False, _obstacle, _run)
