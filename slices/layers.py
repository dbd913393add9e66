"""Layers of a block in one of its two parts: instances of ComfyUI's layers, changed for as long as the part runs.

A layer of which only the attention takes (Stack.queries) need not run again after it. One that makes the feed-forward's
input too, as linear1 of FLUX's single blocks does, has in each part only the rows of its weight that the part needs.
What a part does not need of a layer's result is left unwritten.

Letters: C channels.
"""

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from ..models import Block
from ..quantization import is_plain

Changes = Iterator[tuple[Any, str, Any]]


def before_attention(block: Block, width: int) -> Changes:
    """For the first part: of the layers that the attention takes from, what it takes."""
    for layer, taken in _layers(block, width):
        if taken < layer.out_features and _can_be_cut(layer):
            yield from _cut(layer, slice(0, taken))


def after_attention(block: Block, width: int) -> Changes:
    """For the second part: of these layers, what it does not."""
    for layer, taken in _layers(block, width):
        if taken == layer.out_features:
            yield layer, "forward", _nothing(layer)
        elif _can_be_cut(layer):
            yield from _cut(layer, slice(taken, layer.out_features))


def _layers(block: Block, width: int) -> Iterator[tuple[Any, int]]:
    """The layers that a block's attention takes from, and how many channels: C each for queries, keys and values."""
    modules = dict(block.module.named_modules())
    for path in block.stack.queries:
        if path in modules:
            yield modules[path], min(3 * width, modules[path].out_features)


def _can_be_cut(layer: Any) -> bool:
    """Whether some rows of a layer's weight can be computed alone. Another node's forward may add to all of them."""
    return "forward" not in vars(layer) and hasattr(layer, "weight_function") and is_plain(layer.weight)


def _nothing(layer: Any) -> Callable[[Tensor], Tensor]:
    return lambda x: x.new_zeros(1).expand(*x.shape[:-1], layer.out_features)


def _cut(layer: Any, rows: slice) -> Changes:
    """The layer's forward (..., I) -> (..., O) by these rows of its weight, with the other channels as they come.

    The rows are cut here, not in the forward: a compiled block is then given parameters of fixed sizes. (PyTorch 2.11
    makes no FP8 product with a bias that is a piece of one of its inputs.)
    """
    if hasattr(layer, "_v") or layer.weight_function or layer.bias_function:  # the weight is made in each call
        yield layer, "weight_function", [*layer.weight_function, lambda weight: weight[rows]]
        yield layer, "bias_function", [*layer.bias_function, lambda bias: bias[rows]]
    else:
        yield layer, "_parameters", {name: _rows(weight, rows, layer) for name, weight in layer._parameters.items()}
    yield layer, "forward", _among_others(layer, is_first=rows.start == 0)


def _rows(weight: Tensor | None, rows: slice, layer: Any) -> nn.Parameter | Tensor | None:
    """The rows of a parameter; one that is for all rows (a scale) as it is."""
    if weight is None or weight.shape[:1] != (layer.out_features,):
        return weight
    return nn.Parameter(weight[rows], requires_grad=False)


def _among_others(layer: Any, is_first: bool) -> Callable[[Tensor], Tensor]:
    """The layer's own forward, whose result is the first or the last channels of this one's."""

    def forward(x: Tensor) -> Tensor:
        some = type(layer).forward(layer, x)
        out = x.new_empty(*x.shape[:-1], layer.out_features)
        start = 0 if is_first else layer.out_features - some.shape[-1]
        out.narrow(-1, start, some.shape[-1]).copy_(some)
        return out

    return forward
