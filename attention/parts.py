"""A block's forward in two parts: up to its first attention, and from there on.

So a block can run over slices of its tokens: what mixes tokens is the attention, which stands between the parts. Either
part is ComfyUI's own forward. The first one ends where the attention would begin, and gives back what that was called
with. In the second one the attention's result is there already, so queries, keys and values need not be computed again.

Which part runs is an entry of the block's transformer_options. A compiled block is compiled for each part: what only
the other part needs is left out by the compiler, as no result depends on it.

Letters: B batch, H heads, S tokens, D head dim.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..models import OPTIONS, Forward, Options
from .op import PART_KEY
from .op import attention as attention_op

# In a block's transformer_options, beside PART_KEY, which is one of the first two:
BEFORE, AFTER = "before", "after"
ATTENDED_KEY = "skein_attended"  # for the second part: the attention's result (B, S, H * D)
TAKEN_KEY, GIVEN_KEY = "skein_taken", "skein_given"  # inside of a part: lists of what is taken out, or put in

Attended = tuple[Tensor, Tensor, Tensor, Tensor | None]  # queries, keys, values (B, H, S, D), mask


class _Reached(Exception):
    """The first part is over."""


def in_parts(own: Forward) -> Callable:
    """A block's forward that runs one part where the options say so. The first one changes nothing that it is given,
    and returns, in the place of the image, what the attention was called with: None if there was none."""
    forward, names, stack = own.forward, own.names, own.stack
    states, others = (stack.image, stack.text), len(stack.outputs) - 1
    place = stack.outputs.index(stack.image)

    def run(*args: Any, **kwargs: Any) -> Any:
        options = kwargs.get(OPTIONS) or {}
        part = options.get(PART_KEY)
        if part is None:
            return forward(*args, **kwargs)
        if part == AFTER:
            return forward(*args, **{**kwargs, OPTIONS: {**options, GIVEN_KEY: [options[ATTENDED_KEY]]}})
        taken: list[Attended] = []
        args = tuple(_copied(name, value, states) for name, value in zip(names, args))
        kwargs = {name: _copied(name, value, states) for name, value in kwargs.items()}
        try:  # not suppress(), which older compilers cannot trace
            forward(*args, **{**kwargs, OPTIONS: {**options, TAKEN_KEY: taken}})
        except _Reached:
            taken = taken[:1]
        found = taken[0] if taken else None
        return (None,) * place + (found,) + (None,) * (others - place) if others else found

    return run


def _copied(name: str, value: Any, states: tuple[str, ...]) -> Any:
    """Hidden states, which blocks add to in place, as a copy."""
    return value.clone() if name in states and isinstance(value, Tensor) else value


def attend(options: Options, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """The operator, (B, S, H * D); in the first part of a block its end, in the second the result that is there."""
    taken, given = options.get(TAKEN_KEY), options.get(GIVEN_KEY)
    if taken is not None:
        taken.append((q, k, v, mask))
        if not torch.compiler.is_compiling():
            raise _Reached
        return q.new_zeros(q.shape[0], q.shape[2], q.shape[1] * q.shape[3])  # nothing depends on it
    if given:
        return given.pop()
    return attention_op(q, k, v, mask)
