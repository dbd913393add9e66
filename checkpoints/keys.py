"""How the weights of one of diffusers' classes become ComfyUI's, as data.

A class is a page in checkpoints/maps: a `KeyMap`. Its weights are written as ComfyUI's path <- diffusers' path, without
".weight" or ".bias", which both sides have in common (a path may be a whole key too). `*` stands for the number of a
block, the same on both sides:

    "img_in.proj": "x_embedder.proj"                                     the same weight under another name
    "double_blocks.*.img_attn.qkv": ("transformer_blocks.*.attn.to_q",   several, put together along dimension 0
                                     "transformer_blocks.*.attn.to_k",
                                     "transformer_blocks.*.attn.to_v")
    "final_layer.adaLN_modulation.1": Changed("norm_out.linear", swap_halves)      in another order, shape, or a part
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

REMAINDERS = r"(|\.weight|\.bias)"  # what a key may have after its path


@dataclass(frozen=True)
class Changed:
    """A weight that ComfyUI has otherwise. of: diffusers' path or several, put together first. by: what is done with
    it: `swap_halves`, `part`, `shaped`, or a page's own function, which only moves numbers about."""

    of: str | tuple[str, ...]
    by: Callable[[Tensor], Tensor]


Source = str | tuple[str, ...] | Changed
Weights = Mapping[str, Source]  # ComfyUI's path -> what it is made of


@dataclass(frozen=True)
class KeyMap:
    """What makes ComfyUI's weights of those of a class.

    classes: diffusers' names of it, and of others with the same weights.
    weights: all that a model may have; a model may lack some (a guidance embedder).
    blocks: the entry of config.json with the number of blocks -> diffusers' path of these blocks.
    unused: diffusers' paths of what ComfyUI computes itself.
    """

    classes: tuple[str, ...]
    weights: Weights
    blocks: Mapping[str, str] = field(default_factory=dict)
    unused: tuple[str, ...] = ()


def under(path: str, of: str, weights: Weights) -> Weights:
    """The weights of a part of the model. path: ComfyUI's path of the part; of: diffusers'."""

    def longer(source: Source) -> Source:
        if isinstance(source, Changed):
            return Changed(_paths(longer(source.of)), source.by)
        return tuple(f"{of}.{each}" for each in _paths(source))

    return {f"{path}.{name}": longer(source) for name, source in weights.items()}


def swap_halves(weight: Tensor) -> Tensor:
    """The second half of the rows before the first: shift and scale where diffusers has scale and shift."""
    first, second = weight.chunk(2)
    return torch.cat((second, first))


def part(index: int, count: int) -> Callable[[Tensor], Tensor]:
    """One of so many equal parts of the rows."""
    return lambda weight: weight.unflatten(0, (count, -1))[index]


def shaped(*sizes: int) -> Callable[[Tensor], Tensor]:
    """The same numbers in another shape; -1: what is left."""
    return lambda weight: weight.reshape(sizes)


@dataclass(frozen=True)
class Made:
    """One weight of ComfyUI's. of: the diffusers keys that it is made of, in order. by: see `Changed`."""

    of: tuple[str, ...]
    by: Callable[[Tensor], Tensor] | None

    @property
    def is_renamed(self) -> bool:
        """Whether it is the very tensor under another name."""
        return self.by is None and len(self.of) == 1


@dataclass(frozen=True)
class _Use:
    """Of weights whose path matches: part number `i` of so many of ComfyUI's weight at `path`."""

    pattern: re.Pattern
    i: int
    count: int
    path: str
    by: Callable[[Tensor], Tensor] | None


def plan(known: KeyMap, keys: Iterable[str]) -> tuple[dict[str, Made], list[str]]:
    """What is made of a model's keys: ComfyUI's key -> what it is made of; and the keys that the map does not know.

    Raises ValueError if a part of a weight is missing.
    """
    uses, unused = _uses(known), [_pattern(each) for each in known.unused]
    found: dict[str, tuple[list[str], _Use]] = {}
    strange = []
    for key in keys:
        matches = [(use, match) for use in uses if (match := use.pattern.fullmatch(key))]
        if not matches and not any(pattern.fullmatch(key) for pattern in unused):
            strange.append(key)
        for use, match in matches:
            *numbers, remainder = match.groups()
            own = use.path.replace("*", "{}").format(*numbers) + remainder
            of, _use = found.setdefault(own, ([""] * use.count, use))
            of[use.i] = key
    for own, (of, _use) in found.items():
        if "" in of:
            there = ", ".join(key for key in of if key)
            raise ValueError(f"{there} is there, but not the other weights that {own} is made of")
    return {own: Made(tuple(of), use.by) for own, (of, use) in found.items()}, strange


def _uses(known: KeyMap) -> list[_Use]:
    uses = []
    for path, source in known.weights.items():
        of, by = _paths(source), source.by if isinstance(source, Changed) else None
        uses += [_Use(_pattern(each), i, len(of), path, by) for i, each in enumerate(of)]
    return uses


def make(made: Made, weights: Mapping[str, Tensor]) -> Tensor:
    """A weight of ComfyUI's: where it is only renamed, the very tensor."""
    parts = [weights[key] for key in made.of]
    weight = parts[0] if len(parts) == 1 else torch.cat(parts)
    return made.by(weight) if made.by else weight


def _paths(source: Source) -> tuple[str, ...]:
    of = source.of if isinstance(source, Changed) else source
    return (of,) if isinstance(of, str) else of


def _pattern(path: str) -> re.Pattern:
    return re.compile(re.escape(path).replace(r"\*", r"(\d+)") + REMAINDERS)
