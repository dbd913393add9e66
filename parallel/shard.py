"""Splits a model's blocks over ranks: each runs its own slice of the image tokens and all of the text.

Around the blocks: the first one's image is cut, and what each is given for its tokens (share.py); after the last one
the image is put together. In between attention exchanges tokens for heads (ulysses.py), and passes keys and values on
in a ring (ring.py).

Letters: B batch, H heads, T text tokens, S image tokens, s those of this rank, D head dim.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ..models import Block, ModelCall, Place, RunBlock, Values
from .mesh import Arrangement, Mesh, split
from .ring import ring_attention
from .share import Share
from .ulysses import Ulysses

Attention = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]  # q, k, v (B, H, S, D), mask to (B, S, H, D)
TRIAL_BYTES = 12  # memory of an attention's exchange or ring, for each byte of its queries


class Sharding:
    """A run's blocks over the ranks of a mesh."""

    def __init__(self, mesh: Mesh, whole_sequences: bool = False):
        """whole_sequences: attention wants these, and no ring is taken where it can be done without."""
        self.mesh = mesh
        self.whole_sequences = whole_sequences
        self._heads = 0  # of the attention in progress, on all ranks together
        self.share: Share | None = None  # of the call in progress

    def around_block(self, call: ModelCall, block: Block, values: Values, run: RunBlock) -> Values:
        """Runs a block on this rank's tokens."""
        name, architecture = block.stack.image, call.network.architecture
        if block.index == 0 and not block.beside:
            self.share = Share(values[name], self.mesh.world, self.mesh.rank, architecture.whole)
            call.tokens = self.share.count
        share = self.share
        assert share is not None
        if values[name].shape == share.shape and (block.index == 0 or block.beside):
            values = {**values, name: share.cut_image(values[name])}
        out = run(share.cut(block, values))
        if block is call.network.blocks[-1] and not architecture.after:
            whole = self._gathered(call.image(block, out))
            out = {**out, name: share.put_together(block, out[name], whole)}
        return out

    def before_after(self, image: Tensor) -> Tensor:
        """The whole image for the module that takes it after the last block (Architecture.after)."""
        return image if self.share is None else self._gathered(image)

    def _gathered(self, image: Tensor) -> Tensor:
        """The image of all ranks: the call's blocks are done."""
        assert self.share is not None
        share, self.share = self.share, None
        with self.mesh.exchanging():
            return self.mesh.gather_tokens(image, share.tokens)

    def around(self, attention: Attention, exact: bool, place: Place | None) -> Attention:
        """The attention over all ranks' tokens by one over those at hand. exact: no 8-bit kernel is among these."""
        return partial(self._attend, attention, exact, place)

    def _attend(
        self, attention: Attention, exact: bool, place: Place | None, q: Tensor, k: Tensor, v: Tensor,
        mask: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """Attention over all ranks' tokens by `attention`, of this rank's (B, H, T + s, D) as (B, T + s, H, D), in the
        arrangement of the ranks that is fastest.

        mask: added to the scores, over the keys of all ranks: (1 or B, 1, T + S).
        """
        share, mesh, heads = self.share, self.mesh, q.shape[1]
        if share is None or place is None or place.goes_over == "cross":
            return attention(q, k, v, mask)
        possible = [
            each for each in mesh.arrangements if each.ulysses_size <= heads and (mask is None or each.ring_size == 1)
        ]
        if self.whole_sequences:
            possible = [each for each in possible if each.ring_size == 1] or possible
        if not possible:
            raise ValueError("A text mask that is more than padding cannot go through a ring; set ring_degree to 1.")
        self._heads = heads
        text_first = place.block.stack.order != "image text"

        def run(arrangement: Arrangement) -> Tensor:
            return self._attend_in(arrangement, share, attention, q, k, v, mask, text_first)

        if len(possible) == 1:
            return run(possible[0])
        # Not this rank's share; not the text, which is another with each prompt and short. A mask has arrangements of
        # its own to choose from, and an 8-bit kernel is faster than the exact one that a ring runs.
        problem = (q.shape[0], heads, q.shape[3], q.dtype, share.image, mask is not None, exact)
        need = TRIAL_BYTES * q.numel() * q.element_size()
        return run(mesh.fastest(possible, problem, need, run))

    def of_all_heads(self, table: Tensor) -> Tensor:
        """A table (B, H, C) of all heads of the attention in progress, or of the last one, from that of this rank's."""
        return self.mesh.gather_tokens(table, split(self._heads, self.mesh.world))

    @property
    def first_head(self) -> int:
        """The first of this rank's heads of the attention in progress."""
        return sum(split(self._heads, self.mesh.world)[: self.mesh.rank])

    def _attend_in(
        self, arrangement: Arrangement, share: Share, attention: Attention, q: Tensor, k: Tensor, v: Tensor,
        mask: Tensor | None, text_first: bool,
    ) -> Tensor:  # fmt: skip
        """The same in one arrangement of the ranks. text_first: in the sequence; a ring wants it so."""
        size, mesh, text = arrangement.ulysses_size, self.mesh, q.shape[2] - share.count
        if arrangement.ring_size > 1 and text and not text_first:
            q, k, v = (_moved_to_front(x, text, dim=2) for x in (q, k, v))
            out = self._attend_in(arrangement, share, attention, q, k, v, mask, text_first=True)
            return _moved_to_front(out, share.count, dim=1)
        group = slice(arrangement.ring_rank * size, (arrangement.ring_rank + 1) * size)
        exchange = Ulysses(
            arrangement.ulysses_group, arrangement.ulysses_rank, split(q.shape[1], size), share.tokens[group], text,
            text_first,
        )  # fmt: skip
        if size > 1:
            with mesh.exchanging():
                q, k, v = exchange.to_heads(q, k, v)
        if arrangement.ring_size == 1:
            out = attention(q, k, v, mask)
        else:
            out = ring_attention(q, k, v, text, arrangement, share.tokens, mesh)
        if size == 1:
            return out
        with mesh.exchanging():
            return exchange.to_tokens(out)


def _moved_to_front(x: Tensor, last: int, dim: int) -> Tensor:
    """The sequence with its last tokens before the others."""
    rest = x.shape[dim] - last
    return torch.cat((x.narrow(dim, rest, last), x.narrow(dim, 0, rest)), dim)
