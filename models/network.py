"""The blocks of one network, found by its architecture's page."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from .architecture import Architecture, Stack
from .families import FAMILIES

BlockKey = tuple[str, int]  # a key of ComfyUI's patches_replace["dit"]

_BY_NAME = {name: architecture for architecture in FAMILIES for name in architecture.networks}


@dataclass(frozen=True, eq=False)
class Block:
    """One block. path: from the network. number: in its stack. index: among all blocks, in running order.

    beside: it runs between the others and is none of them.
    """

    stack: Stack
    path: str
    number: int
    index: int
    module: nn.Module
    beside: bool = False

    @property
    def key(self) -> BlockKey:
        """Its key in ComfyUI's patches_replace["dit"]."""
        return self.stack.key, self.number

    @property
    def kind(self) -> tuple:
        """Equal for blocks that differ in the values of their weights only."""
        shapes = tuple((name, tuple(weight.shape)) for name, weight in self.module.named_parameters())
        return type(self.module), shapes

    def __str__(self) -> str:
        return f"{self.stack.key or self.stack.blocks} {self.number}"

    def is_modulation(self, layer: str) -> bool:
        """Whether a layer, by its path in the block, computes shifts and scales."""
        return any(f"{layer}.".startswith(f"{part}.") for part in self.stack.modulation)


class Network:
    """A ComfyUI diffusion model whose architecture is known. Raises ValueError if it is not."""

    def __init__(self, module: nn.Module):
        self.module: Any = module
        self.architecture = _architecture_of(module)
        self.blocks = self._blocks(self.architecture.stacks)
        self.beside = self._blocks(self.architecture.beside, beside=True)

    def _blocks(self, stacks: Sequence[Stack], beside: bool = False) -> list[Block]:
        found: list[Block] = []
        for stack in stacks:
            for number, module in enumerate(self.module.get_submodule(stack.blocks)):
                found.append(Block(stack, f"{stack.blocks}.{number}", number, len(found), module, beside))
        return found

    @property
    def width(self) -> int:
        """Channels of a token."""
        return self._value(self.architecture.width)

    @property
    def heads(self) -> int:
        """Attention heads of a block."""
        return self._value(self.architecture.heads)

    def _value(self, path: str) -> Any:
        holder, _, name = path.rpartition(".")
        return getattr(self.module.get_submodule(holder), name)

    @property
    def patch(self) -> tuple[int, ...]:
        """The size of a token in each of the latent's last dimensions."""
        sizes: list[int] = []
        for each in self.architecture.patch:
            value = each if isinstance(each, int) else self._value(each)
            sizes += [value] if isinstance(value, int) else value
        return tuple(sizes)

    def tokens(self, latent: Sequence[int]) -> int:
        """How many image tokens a latent of this shape (B, C, ...) has."""
        sizes = itertools.zip_longest(reversed(latent[2:]), reversed(self.patch), fillvalue=1)
        return math.prod(math.ceil(length / step) for length, step in sizes)


def _architecture_of(module: object) -> Architecture:
    for base in type(module).__mro__:
        found = _BY_NAME.get(f"{base.__module__}.{base.__qualname__}")
        if found is not None:
            return found
    raise ValueError(
        f"Skein does not know the blocks of {type(module).__name__} models; connect another model, or remove the Skein "
        "nodes."
    )
