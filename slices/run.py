"""A run's blocks over slices of their tokens: the same result, without tensors of several widths for all tokens.

    slices of tokens       norm, queries, keys, values     each slice's go into three whole tensors
    all tokens             attention                       as ever: kernels, sparse attention, exchange with workers
    slices of tokens       projection, feed-forward        into the hidden states

So a block holds its hidden states, queries, keys, values and the attention's result, five states, where it held 14; and
what a slice takes. What is computed for a token is the same; products of fewer rows may round otherwise, and FP8 with
one scale per tensor has one per slice.

Letters: B batch, H heads, T text tokens, S image tokens, D head dim.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ..attention import AFTER, ATTENDED_KEY, BEFORE, PART_KEY, attention, enter_block, in_parts, is_ours
from ..attributes import changed
from ..models import (
    OPTIONS,
    OVERRIDE,
    Architecture,
    Block,
    Forward,
    ModelCall,
    PerToken,
    RunBlock,
    Stack,
    Values,
    pass_by,
)
from ..parallel import Share
from .layers import after_attention, before_attention

NOT_REACHED = "{} runs whole: its attention cannot be told apart"
PATCHED = "the blocks run whole, because another node's attention patch runs inside of them"


def can_be_sliced(architecture: Architecture, stack: Stack) -> bool:
    """Whether blocks of a stack can run over slices of their tokens, as over ranks: only their first attention mixes
    these."""
    return bool(stack.queries) and "parallel" not in architecture.refuses


class SlicedBlocks:
    """The blocks of one run in so many slices. Stands outside of compiled blocks. say: shows a line to the user."""

    def __init__(self, count: int, say: Callable[[str], None]):
        self.count = count
        self.say = say
        self._whole: set[str] = set()  # paths of blocks that cannot be sliced after all

    def within(self, own: Forward) -> Callable:
        """What stands in the place of a block's forward (Seam.within)."""
        return in_parts(own) if own.stack.queries else own.forward

    def around_block(self, call: ModelCall, block: Block, values: Values, run: RunBlock) -> Values:
        """Runs a block in slices where it can be."""
        if not self._suits(call, block, values):
            return run(values)
        enter_block(values[OPTIONS])
        sliced = _Sliced(self.count, call.network.width, block, values)
        try:
            next(sliced.slices())
        except ValueError:  # timesteps of frames that do not divide the tokens
            return run(values)
        taken = sliced.before(run)
        if isinstance(taken, Tensor):  # a warm-up, to which this block is none of its kind's first
            return pass_by(block, values)
        if taken is None:
            self._whole.add(block.path)
            self.say(NOT_REACHED.format(block))
            return run(values)
        attended = attention(*taken)
        del taken
        return sliced.after(run, attended)

    def _suits(self, call: ModelCall, block: Block, values: Values) -> bool:
        options, image = values.get(OPTIONS), values.get(block.stack.image)
        if not can_be_sliced(call.network.architecture, block.stack) or block.path in self._whole:
            return False
        if not isinstance(options, dict) or not is_ours(options.get(OVERRIDE)):
            return False
        if any(name.startswith("attn") and patches for name, patches in options.get("patches", {}).items()):
            self.say(PATCHED)
            return False
        return isinstance(image, Tensor) and image.ndim == 3


class _Slice(Share):
    """A slice of a block's tokens; what the block is given for it."""

    def _own(self, value: Any, which: PerToken, order: str, text: int) -> Any:
        return value if which.of == "mask" else super()._own(value, which, order, text)  # attention is over all tokens


class _Sliced:
    """One block in slices: of its image tokens, with all of the text beside each where that has weights of its own;
    else of its whole sequence."""

    def __init__(self, count: int, width: int, block: Block, values: Values):
        self.block, self.stack, self.width, self.values = block, block.stack, width, values
        self.image: Tensor = values[block.stack.image]
        self.count = even(self.image.shape[1], min(count, self.image.shape[1]))

    def slices(self) -> Iterator[tuple[_Slice, Values]]:
        """Each slice, and what the block is given for it."""
        for number in range(self.count):
            share = _Slice(self.image, self.count, number, whole=not self.stack.text)
            given = {**self.values, self.stack.image: share.cut_image(self.image)}
            yield share, share.cut(self.block, given)

    def before(self, run: RunBlock) -> tuple | Tensor | None:
        """What the attention is called with, over all tokens (B, H, T + S, D); what the block gave instead."""
        whole: list[Tensor] = []
        mask = None
        with changed(before_attention(self.block, self.width)):
            for share, given in self.slices():
                given[OPTIONS] = {**given[OPTIONS], PART_KEY: BEFORE}
                taken = run(given)[self.stack.image]
                if not isinstance(taken, tuple):
                    return taken
                *parts, mask = taken
                text = parts[0].shape[2] - share.count
                if not whole:
                    batch, heads, _, size = parts[0].shape
                    whole = [part.new_empty(batch, heads, text + share.image, size) for part in parts]
                first = text if share.start else 0  # the text's are the same in each slice
                for all_tokens, part in zip(whole, parts):
                    all_tokens[:, :, share.start + first : share.start + text + share.count] = part[:, :, first:]
                del taken, parts, part
        return (*whole, mask)

    def after(self, run: RunBlock, attended: Tensor) -> Values:
        """What the block gives back, by the attention's result (B, T + S, C)."""
        stack, whole = self.stack, dict[str, Any]()
        with changed(after_attention(self.block, self.width)):
            for share, given in self.slices():
                text = attended.shape[1] - share.image
                own = attended.narrow(1, share.start + text, share.count)
                if text and share.start == 0:
                    own = attended.narrow(1, 0, text + share.count)
                elif text:
                    given[stack.text] = given[stack.text].clone()  # it has been added to, and is again
                    own = torch.cat((attended[:, :text], own), dim=1)
                given[OPTIONS] = {**given[OPTIONS], PART_KEY: AFTER, ATTENDED_KEY: own.contiguous()}
                if stack.rope:
                    given[stack.rope] = None
                for name, value in run(given).items():
                    if name != stack.text:
                        self._put(whole, name, value, share)
                    elif share.start == 0:
                        whole[name] = value
                del given, own, value
        return whole

    def _put(self, whole: Values, name: str, value: Tensor, share: _Slice) -> None:
        """A slice's tokens among all; into the block's own input where the block has put them there itself."""
        if name not in whole:
            in_place = name == self.stack.image and value.data_ptr() == self.image.data_ptr()
            whole[name] = self.image if in_place else value.new_empty(value.shape[0], share.image, value.shape[2])
        place = whole[name][:, share.start : share.start + share.count]
        if place.data_ptr() != value.data_ptr():
            place.copy_(value)


def even(tokens: int, count: int) -> int:
    """As many slices as asked for, or up to twice as many if these are all of one size: compiled blocks are compiled
    once for that."""
    return next((number for number in range(count, 2 * count) if tokens % number == 0), count)
