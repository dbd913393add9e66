"""Weights that ComfyUI has left off the device, on it for as long as a module runs."""

from collections.abc import Callable, Iterator
from typing import Any

import comfy.model_management as memory
import torch
from torch import Tensor, nn

from .quantization import is_plain


def beside(
    module: nn.Module, device: torch.device, of: Callable[[str], bool] = lambda path: True
) -> Iterator[tuple[Any, str, Any]]:
    """Changes (attributes.py) that put the weights of a module's layers on a device. of: whether a layer, by its path,
    runs. Copies from pinned memory are not waited for. Layers under ComfyUI's dynamic VRAM, and weights of other types
    than PyTorch's own, are left as they are: they have ways of their own."""
    for path, layer in module.named_modules():
        weights = [weight for weight in layer._parameters.values() if weight is not None]
        if hasattr(layer, "_v") or not of(path):
            continue
        if any(weight.device != device for weight in weights) and all(map(is_plain, weights)):
            yield layer, "_parameters", {name: _on(device, weight) for name, weight in layer._parameters.items()}


def _on(device: torch.device, weight: Tensor | None) -> nn.Parameter | None:
    if weight is None:
        return None
    return nn.Parameter(memory.cast_to_device(weight, device, None), requires_grad=False)
