"""Weights that are loaded without a second copy of them in memory.

ComfyUI's loaders make a model with memory of its own for each Parameter, which the operating system gives when it is
first written to, and copy each weight there (without dynamic VRAM: with it, the Parameter is made of the weight). Here
the Parameter takes the memory of what would be copied: the file's, mapped, or that of a tensor that was made for it. A
weight in the file's memory that is written to gets pages of its own from the operating system.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

OWNED_KEY = "_skein_owned"  # on a tensor: it was made to be loaded, and nobody else has it


def owned(tensor: Tensor) -> Tensor:
    """The tensor, marked as made for one Parameter: it is taken, or is empty once it has been copied."""
    setattr(tensor, OWNED_KEY, True)
    return tensor


class Taking(TorchFunctionMode):
    """Within: a Parameter that a tensor of its type is copied into takes that tensor's memory, both on the CPU."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.Tensor.copy_ and not kwargs and len(args) == 2:
            parameter, tensor = args
            if _alike(parameter, tensor):
                parameter.data = tensor
                return parameter
            function(parameter, tensor)
            if getattr(tensor, OWNED_KEY, False):
                tensor.data = tensor.new_empty(0)
            return parameter
        if function is torch.Tensor.clone and getattr(args[0], OWNED_KEY, False):
            return args[0]  # ComfyUI's layers under dynamic VRAM, in a model that is loaded without it
        return function(*args, **(kwargs or {}))


def _alike(parameter: Tensor, tensor: Any) -> bool:
    """Whether a parameter may lie where a tensor does."""
    return (
        type(parameter) is nn.Parameter
        and type(tensor) in (Tensor, nn.Parameter)
        and parameter.device.type == tensor.device.type == "cpu"
        and (parameter.dtype, parameter.shape) == (tensor.dtype, tensor.shape)
        and tensor.is_contiguous()
    )
