"""One rank's share of a model call: which of the image's tokens are its own, and what a block is given for them.

Letters: B batch, T text tokens, S image tokens, s those of this rank, C channels.
"""

from typing import Any

import torch
from torch import Tensor

from ..models import Block, PerToken, Values, streams
from .mesh import split

Range = tuple[int, int | None, int]  # ComfyUI's modulation_dims: tokens from, to (None: the end), which modulation


class Share:
    """A call's tokens over the ranks. tokens: of each rank. whole: the text is dealt out like the image."""

    def __init__(self, image: Tensor, world: int, rank: int, whole: bool = False):
        self.shape = image.shape
        self.image = streams(image)[0].shape[1]
        if self.image < world:
            raise ValueError(f"{self.image} image tokens cannot be spread over {world} devices; use fewer devices.")
        self.tokens = split(self.image, world)
        self.start, self.count = sum(self.tokens[:rank]), self.tokens[rank]
        self.whole = whole
        self._parts: dict[tuple, tuple[Any, Any]] = {}  # of what is the same for many blocks, which is kept alive

    def cut_image(self, image: Tensor) -> Tensor:
        """This rank's tokens of (B, S, C), or in as many dimensions as the model has. A copy: blocks add in place."""
        own = streams(image)[0][:, self.start : self.start + self.count].contiguous()
        return own.view(own.shape[0], own.shape[1], *(1,) * (image.ndim - 3), own.shape[2])

    def cut(self, block: Block, values: Values) -> Values:
        """What else a block is given, for this rank's tokens."""
        stack = block.stack
        # Ranges count from the sequence's start where the image is in one with the text.
        text = 0 if stack.text or not stack.order else streams(values[stack.image])[0].shape[1] - self.count
        changed = dict(values)
        for each in stack.tokens:
            if changed.get(each.name) is not None:
                changed[each.name] = self._own(changed[each.name], each, stack.order, text)
        return changed

    def put_together(self, block: Block, value: Tensor, image: Tensor) -> Tensor:
        """A block's hidden states with the whole image (B, S, C) in the place of this rank's part."""
        rest = streams(value)[0]
        if rest.shape[1] == self.count:
            return image.view(self.shape) if value.ndim > 3 else image
        if block.stack.order == "image text":
            return torch.cat((image, rest[:, self.count :]), dim=1)
        return torch.cat((rest[:, : rest.shape[1] - self.count], image), dim=1)

    def _own(self, value: Any, which: PerToken, order: str, text: int) -> Any:
        if which.of == "text":
            return value
        if which.of == "ranges":
            return own_ranges(value, text, self.start, self.count)
        if which.of == "index":
            return min(max(value - self.start, 0), self.count)
        if which.of == "mask":
            if not isinstance(value, Tensor) or bool(value.any()):
                raise ValueError(f"Context Parallel cannot share a masked sequence ({which.name}); remove the mask.")
            return None
        if isinstance(value, (tuple, list)):
            return type(value)(self._own(each, which, order, text) for each in value)
        if not isinstance(value, Tensor):
            return value
        key = id(value), which, order
        if key not in self._parts:
            self._parts[key] = value, self._part(value, which, order)
        return self._parts[key][1]

    def _part(self, value: Tensor, which: PerToken, order: str) -> Tensor:
        dim = which.dim
        if which.of == "frames":
            return self._of_frames(value, dim)
        if which.of == "image" or self.whole:
            return value.narrow(dim, self.start, self.count)
        text = value.shape[dim] - self.image
        if order == "image text":
            return torch.cat((value.narrow(dim, self.start, self.count), value.narrow(dim, self.image, text)), dim)
        return torch.cat((value.narrow(dim, 0, text), value.narrow(dim, text + self.start, self.count)), dim)

    def _of_frames(self, value: Tensor, dim: int) -> Tensor:
        """An entry for each of this rank's tokens, of one for all, one a frame or one a token."""
        if value.ndim <= abs(dim) or value.shape[dim] == 1:  # one for all, perhaps without that dimension
            return value
        repeats, rest = divmod(self.image, value.shape[dim])
        if rest:
            raise ValueError(
                f"Context Parallel cannot share {self.image} image tokens with {value.shape[dim]} timesteps; remove it."
            )
        index = torch.arange(self.start, self.start + self.count, device=value.device) // repeats
        return value.index_select(dim, index)


def own_ranges(ranges: list[Range], text: int, start: int, count: int) -> list[Range]:
    """Modulation ranges of a sequence of `text` tokens and an image, for the same text and image tokens
    [start, start + count). ComfyUI counts them from the start of the sequence, text or not, and so does this."""
    own: list[Range] = []
    for first, end, which in ranges:
        for begin, stop, shift in ((0, text, 0), (text + start, text + start + count, start)):
            low, high = max(first, begin), stop if end is None else min(end, stop)
            if low < high:
                own.append((low - shift, high - shift, which))
    return own
