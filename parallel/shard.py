"""Splits a model's blocks over ranks: each runs its own slice of the image tokens and all of the text.

Wrappers around ComfyUI's blocks, as functions on their argument dicts, so nothing of ComfyUI is imported: the
first block's cuts the image, each block's cuts rotary factors and modulation ranges, the last one's puts the image
together. In between attention exchanges tokens for heads (ulysses.py), and passes keys and values on in a ring
(ring.py).

Letters: B batch, H heads, T text tokens, S image tokens, C channels, D head dim.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from .mesh import Arrangement, Mesh, split
from .ring import ring_attention
from .ulysses import Ulysses

Block = Callable[[dict], dict]
Attention = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]  # q, k, v (B, H, S, D), mask to (B, S, H, D)
TRIAL_BYTES = 12  # memory of an attention's exchange or ring, for each byte of its queries
Range = tuple[int, int | None, int]  # ComfyUI's modulation_dims: tokens from, to (None: the end), which modulation


@dataclass
class _Call:
    """How one model call is split: T, and the image tokens of each rank."""

    text: int
    tokens: list[int]
    start: int  # the first image token of this rank
    rope: dict[int, Tensor] = field(default_factory=dict)  # id of the whole factors -> this rank's; both kept alive
    whole_rope: list[Tensor] = field(default_factory=list)

    def own_rope(self, rope: Tensor, count: int) -> Tensor:
        """This rank's part of rotary factors (B, 1, T + S, D / 2, 2, 2)."""
        if id(rope) not in self.rope:
            self.whole_rope.append(rope)
            image = rope[:, :, self.text + self.start : self.text + self.start + count]
            self.rope[id(rope)] = torch.cat((rope[:, :, : self.text], image), dim=2)
        return self.rope[id(rope)]


class Sharding:
    """A run's blocks over the ranks of a mesh. heads: H of the model."""

    def __init__(self, mesh: Mesh, heads: int):
        self.mesh = mesh
        self.heads = heads
        self.call: _Call | None = None

    def first_block(self, args: dict, block: Block) -> dict:
        """Cuts the image, then runs the first block."""
        image = args["img"].shape[1]
        if image < self.mesh.world:
            raise ValueError(
                f"{image} image tokens cannot be spread over {self.mesh.world} devices; use fewer devices."
            )
        tokens = split(image, self.mesh.world)
        start = sum(tokens[: self.mesh.rank])
        self.call = _Call(args["txt"].shape[1], tokens, start)
        own = args["img"][:, start : start + tokens[self.mesh.rank]].contiguous()  # blocks add in place
        return self.block({**args, "img": own}, block)

    def block(self, args: dict, block: Block) -> dict:
        """Runs a block on this rank's tokens."""
        call = self.call
        assert call is not None
        count = call.tokens[self.mesh.rank]
        changed: dict = {"pe": call.own_rope(args["pe"], count)}
        for name, text in (("modulation_dims_img", 0), ("modulation_dims", call.text)):
            if args.get(name) is not None:
                changed[name] = own_ranges(args[name], text, call.start, count)
        return block({**args, **changed})

    def last_block(self, args: dict, block: Block) -> dict:
        """Runs the last block, then puts the image together on every rank."""
        call = self.call
        out = self.block(args, block)
        assert call is not None
        self.call = None
        image = out["img"]
        text = image.shape[1] - call.tokens[self.mesh.rank]  # in front of a single block's image
        with self.mesh.exchanging():
            whole = self.mesh.gather_tokens(image[:, text:], call.tokens)
        return {**out, "img": torch.cat((image[:, :text], whole), dim=1) if text else whole}

    def around(self, attention: Attention, exact: bool) -> Attention:
        """The attention over all ranks' tokens by one over those at hand. exact: no 8-bit kernel is among these."""
        return partial(self._attend, attention, exact)

    def _attend(
        self, attention: Attention, exact: bool, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None
    ) -> Tensor:
        """Attention over all ranks' tokens by `attention`, of this rank's (B, H, T + s, D) as (B, T + s, H, D).

        mask: added to the scores, over the keys of all ranks: (1 or B, 1, T + S).
        """
        call, mesh = self.call, self.mesh
        if call is None:
            return attention(q, k, v, mask)
        possible = [
            each
            for each in mesh.arrangements
            if each.ulysses_size <= self.heads and (mask is None or each.ring_size == 1)
        ]
        if not possible:
            raise ValueError("Text with holes in its mask cannot go through a ring; set ring_degree to 1.")

        def run(arrangement: Arrangement) -> Tensor:
            return self._attend_in(arrangement, call, attention, q, k, v, mask)

        if len(possible) == 1:
            return run(possible[0])
        # Not this rank's share; not the text, which is another with each prompt and short. A mask has arrangements of
        # its own to choose from, and an 8-bit kernel is faster than the exact one that a ring runs.
        problem = (q.shape[0], q.shape[1], q.shape[3], q.dtype, sum(call.tokens), mask is not None, exact)
        need = TRIAL_BYTES * q.numel() * q.element_size()
        return run(mesh.fastest(possible, problem, need, run))

    def _attend_in(
        self, arrangement: Arrangement, call: _Call, attention: Attention, q: Tensor, k: Tensor, v: Tensor,
        mask: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """The same in one arrangement of the ranks."""
        size, mesh = arrangement.ulysses_size, self.mesh
        group = slice(arrangement.ring_rank * size, (arrangement.ring_rank + 1) * size)
        exchange = Ulysses(
            arrangement.ulysses_group, arrangement.ulysses_rank, split(self.heads, size), call.tokens[group], call.text
        )
        if size > 1:
            with mesh.exchanging():
                q, k, v = exchange.to_heads(q, k, v)
        if arrangement.ring_size == 1:
            out = attention(q, k, v, mask)
        else:
            out = ring_attention(q, k, v, call.text, arrangement, call.tokens, mesh)
        if size == 1:
            return out
        with mesh.exchanging():
            return exchange.to_tokens(out)


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
