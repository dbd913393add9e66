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

from ..models import Block, ModelCall, RunBlock, Values
from .mesh import Arrangement, Mesh, split
from .ring import ring_attention
from .share import Share
from .ulysses import Ulysses

Attention = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]  # q, k, v (B, H, S, D), mask to (B, S, H, D)
TRIAL_BYTES = 12  # memory of an attention's exchange or ring, for each byte of its queries


class Sharding:
    """A run's blocks over the ranks of a mesh."""

    def __init__(self, mesh: Mesh):
        self.mesh = mesh
        self.share: Share | None = None  # of the call in progress
        self._block: Block | None = None  # in progress
        self._attentions = 0  # of it, so far

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
        self._block, self._attentions = block, 0
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

    def around(self, attention: Attention, exact: bool) -> Attention:
        """The attention over all ranks' tokens by one over those at hand. exact: no 8-bit kernel is among these."""
        return partial(self._attend, attention, exact)

    def _attend(
        self, attention: Attention, exact: bool, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None
    ) -> Tensor:
        """Attention over all ranks' tokens by `attention`, of this rank's (B, H, T + s, D) as (B, T + s, H, D).

        mask: added to the scores, over the keys of all ranks: (1 or B, 1, T + S).
        """
        share, block = self.share, self._block
        if share is None or block is None:
            return attention(q, k, v, mask)
        over = block.stack.attention
        goes_over = over[min(self._attentions, len(over) - 1)]
        self._attentions += 1
        if goes_over == "cross":
            return attention(q, k, v, mask)
        text = q.shape[2] - share.count
        if not text or block.stack.order != "image text":
            return self._attend_shared(attention, exact, q, k, v, mask, text)
        q, k, v = (_text_first(x, share.count, dim=2) for x in (q, k, v))
        mask = None if mask is None else _text_first(mask, share.image, dim=-1)
        return _text_first(self._attend_shared(attention, exact, q, k, v, mask, text), text, dim=1)

    def _attend_shared(
        self, attention: Attention, exact: bool, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, text: int
    ) -> Tensor:
        """The same with T = text tokens in front, in the arrangement of the ranks that is fastest."""
        share, mesh, heads = self.share, self.mesh, q.shape[1]
        assert share is not None
        possible = [
            each for each in mesh.arrangements if each.ulysses_size <= heads and (mask is None or each.ring_size == 1)
        ]
        if not possible:
            raise ValueError("Text with holes in its mask cannot go through a ring; set ring_degree to 1.")

        def run(arrangement: Arrangement) -> Tensor:
            return self._attend_in(arrangement, share, attention, q, k, v, mask, text)

        if len(possible) == 1:
            return run(possible[0])
        # Not this rank's share; not the text, which is another with each prompt and short. A mask has arrangements of
        # its own to choose from, and an 8-bit kernel is faster than the exact one that a ring runs.
        problem = (q.shape[0], heads, q.shape[3], q.dtype, share.image, mask is not None, exact)
        need = TRIAL_BYTES * q.numel() * q.element_size()
        return run(mesh.fastest(possible, problem, need, run))

    def _attend_in(
        self, arrangement: Arrangement, share: Share, attention: Attention, q: Tensor, k: Tensor, v: Tensor,
        mask: Tensor | None, text: int,
    ) -> Tensor:  # fmt: skip
        """The same in one arrangement of the ranks."""
        size, mesh = arrangement.ulysses_size, self.mesh
        group = slice(arrangement.ring_rank * size, (arrangement.ring_rank + 1) * size)
        exchange = Ulysses(
            arrangement.ulysses_group, arrangement.ulysses_rank, split(q.shape[1], size), share.tokens[group], text
        )
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


def _text_first(x: Tensor, first: int, dim: int) -> Tensor:
    """The sequence with its first tokens behind the others."""
    return torch.cat((x.narrow(dim, first, x.shape[dim] - first), x.narrow(dim, 0, first)), dim)
