"""One call of a diffusion model, and its hidden states: where the image's tokens are in them.

Letters: B batch, S image tokens, C channels.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .network import Block, Network

Options = dict[str, Any]  # ComfyUI's transformer_options
Values = dict[str, Any]  # what a block is given, or gives back, by the names of its forward's parameters
OPTIONS = "transformer_options"
OVERRIDE = "optimized_attention_override"  # ComfyUI's key in the options: another attention function
WARM_UP_KEY = "skein_warm_up"  # in the options of a call that is made only to compile: nothing in it counts


class ModelCall:
    """A call in progress.

    arguments: of the network, by name. tokens: S, or this process's share of them, and all_tokens: those of all
    processes; known from the first block on.
    """

    def __init__(self, network: Network, arguments: Values):
        self.network = network
        self.arguments = arguments
        self.tokens = self.all_tokens = 0

    @property
    def options(self) -> Options:
        """Its transformer_options."""
        return self.arguments[OPTIONS]

    @property
    def latent(self) -> Tensor:
        """The latent: the first tensor of its arguments, in all models and versions."""
        return first_tensor(self.arguments.values())

    def changed(self, **arguments: Any) -> "ModelCall":
        """A call of the same network with other arguments."""
        return ModelCall(self.network, {**self.arguments, **arguments})

    def enter(self, block: Block, values: Values) -> None:
        """Count the image's tokens, which the network's first block is given."""
        if block.index == 0 and not block.beside:
            self.tokens = self.all_tokens = streams(values[block.stack.image])[0].shape[1]

    def image(self, block: Block, values: Values) -> Tensor:
        """The image's tokens (B, S, C) of what a block is given or gives back: a view, but a copy (B, N, 1) where the
        model has several streams of them."""
        parts = self._image(block, values)
        return parts[0] if len(parts) == 1 else torch.cat([part.flatten(1) for part in parts], dim=1).unsqueeze(2)

    def write_image(self, block: Block, values: Values, image: Tensor) -> None:
        """Put other tokens in the place of the image's."""
        parts = self._image(block, values)
        if len(parts) == 1:
            parts[0].copy_(image)
            return
        for part, new in zip(parts, image.squeeze(2).split([part[0].numel() for part in parts], dim=1)):
            part.copy_(new.view_as(part))

    def _image(self, block: Block, values: Values) -> list[Tensor]:
        parts = streams(values[block.stack.image])
        if len(parts) == 1 and parts[0].shape[1] != self.tokens:  # in one sequence with the text
            first = 0 if block.stack.order == "image text" else parts[0].shape[1] - self.tokens
            return [parts[0].narrow(1, first, self.tokens)]
        return parts


@dataclass
class Place:
    """A block in progress. attentions: of it, so far."""

    call: ModelCall
    block: Block
    attentions: int = 0

    @property
    def goes_over(self) -> str:
        """What its last attention went over, as in Stack.attention."""
        over = self.block.stack.attention
        return over[min(self.attentions, len(over)) - 1]


def pass_by(block: Block, values: Values) -> Values:
    """What a block that changes nothing gives back."""
    return {name: values.get(name) for name in block.stack.outputs}


def passed_by(call: ModelCall, block: Block) -> bool:
    """Whether a block does not run: in a warm-up, one that is not the first of its kind."""
    warmed = call.options.get(WARM_UP_KEY)
    return warmed is not None and warmed.get(block.kind, block.path) != block.path


def streams(value: Any) -> list[Tensor]:
    """Hidden states as (B, S, C), one or several. Some models have the image in more dimensions than that."""
    parts = value if isinstance(value, (tuple, list)) else (value,)
    return [part.flatten(1, -2) if part.ndim > 3 else part for part in parts]


def first_tensor(values: Any) -> Tensor:
    """The first tensor among arguments, or in the lists among them."""
    for value in values:
        parts = value if isinstance(value, (tuple, list)) else (value,)
        if parts and isinstance(parts[0], Tensor):
            return parts[0]
    raise ValueError("The diffusion model was called without a latent.")
