"""FlashAttention-4 (package `flash-attn-4`, written in CuTe DSL), for Hopper and Blackwell."""

from functools import cache

from torch import Tensor

from .kernel import Kernel, Problem, first, input_obstacle, package_obstacle

PACKAGE = "flash-attn-4 (python -m pip install --pre flash-attn-4)"


@cache
def _function():
    from flash_attn.cute import flash_attn_func

    return flash_attn_func


def _obstacle(problem: Problem) -> str | None:
    if problem.capability is None or problem.capability[0] < 9:
        return "FlashAttention-4 runs on Hopper and Blackwell GPUs only"
    return input_obstacle(problem, "FlashAttention-4", (64, 96, 128)) or package_obstacle("flash_attn.cute", PACKAGE)


def _run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return first(_function()(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)))


FLASH4 = Kernel("flash4", "FlashAttention-4", True, _obstacle, _run)
