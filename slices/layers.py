"""Layers of a block in one of its two parts: instances of ComfyUI's layers, changed for as long as the part runs.

A layer of which only the attention takes (Stack.queries) need not run again after it. One that makes the feed-forward's
input too, as linear1 of FLUX's single blocks does, has its rows computed each in the part that needs them. What a part
does not need of a layer's result is left unwritten.

Letters: C channels.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import comfy.model_management as memory
import comfy.ops
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models import Block
from ..quantization import QuantizedLinear, is_plain

Changes = Iterator[tuple[Any, str, Any]]


def before_attention(block: Block, width: int) -> Changes:
    """For the first part: of the layers that the attention takes from, what it takes."""
    for layer, taken in _layers(block, width):
        if taken < layer.out_features and _can_be_cut(layer):
            yield layer, "forward", _only(layer, slice(0, taken))


def after_attention(block: Block, width: int) -> Changes:
    """For the second part: of these layers, what it does not."""
    for layer, taken in _layers(block, width):
        if taken == layer.out_features:
            yield layer, "forward", _nothing(layer.out_features)
        elif _can_be_cut(layer):
            yield layer, "forward", _only(layer, slice(taken, layer.out_features))


def beside(block: Block, device: torch.device, of: Callable[[str], bool]) -> Changes:
    """The weights of a block's layers on a device, for as long as the part runs: each slice would fetch those that are
    offloaded again. of: whether a layer, by its path, runs."""
    for path, layer in block.module.named_modules():
        weights = [weight for weight in layer._parameters.values() if weight is not None]
        if hasattr(layer, "_v") or not of(path):  # ComfyUI's dynamic VRAM has a way of its own
            continue
        if any(weight.device != device for weight in weights) and all(map(is_plain, weights)):
            yield layer, "_parameters", {name: _on(device, weight) for name, weight in layer._parameters.items()}


def _on(device: torch.device, weight: Tensor | None) -> nn.Parameter | None:
    if weight is None:
        return None
    return nn.Parameter(memory.cast_to_device(weight, device, None), requires_grad=False)


def _layers(block: Block, width: int) -> Iterator[tuple[Any, int]]:
    """The layers that a block's attention takes from, and how many channels: C each for queries, keys and values."""
    modules = dict(block.module.named_modules())
    for path in block.stack.queries:
        if path in modules:
            yield modules[path], min(3 * width, modules[path].out_features)


def _can_be_cut(layer: Any) -> bool:
    """Whether some rows of a layer's weight can be computed alone."""
    return isinstance(layer, QuantizedLinear) or (hasattr(layer, "weight_function") and is_plain(layer.weight))


def _nothing(channels: int) -> Callable[[Tensor], Tensor]:
    return lambda x: x.new_zeros(1).expand(*x.shape[:-1], channels)


def _only(layer: Any, channels: slice) -> Callable[[Tensor], Tensor]:
    """The layer's forward (..., I) -> (..., O) with these channels of the result, and the others as they come."""

    def forward(x: Tensor) -> Tensor:
        out = x.new_empty(*x.shape[:-1], layer.out_features)
        out[..., channels] = some(x, channels)
        return out

    some = layer.some if isinstance(layer, QuantizedLinear) else partial(_some, layer)
    return forward


def _some(layer: Any, x: Tensor, channels: slice) -> Tensor:
    """Channels of the result of a layer of ComfyUI's, wherever that keeps its weights and whatever it puts on them."""
    weight, bias, stream = comfy.ops.cast_bias_weight(layer, x, offloadable=True)
    out = F.linear(x, weight[channels], None if bias is None else bias[channels])
    comfy.ops.uncast_bias_weight(layer, weight, bias, stream)
    return out
