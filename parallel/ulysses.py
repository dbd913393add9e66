"""Ulysses: inside attention, tokens are exchanged for heads, so that each rank attends with all tokens and some heads.

After DeepSpeed-Ulysses (Jacobs et al., arxiv.org/abs/2309.14509), for a few text tokens that every rank has, before or
behind the image, and many image tokens of which each has a slice. Slices and heads may be uneven, nothing is padded.
Rows of tokens come first in what is exchanged: so, for one sample, what arrives is the sequence as the kernel takes it,
and the kernel's output is what is sent. Queries travel while keys are packed, and so on; a rank's own part is copied
while the others travel.

Two text tokens t, five of the image, four heads, two ranks:

            before: a rank's tokens, all heads       in attention: all tokens, a rank's heads
    rank 0      t t 0 1 2      heads 0 1 2 3             t t 0 1 2 3 4      heads 0 1
    rank 1      t t 3 4        heads 0 1 2 3             t t 0 1 2 3 4      heads 2 3

Letters: B batch, H heads, h those of this rank, T text tokens, S image tokens of the group, s those of this rank,
D head dim.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .exchange import begin_exchange, finish

WIDE = torch.complex128  # copies of what is not contiguous move value by value, so bytes are copied as the widest


class Ulysses:
    """The exchange for one number of tokens.

    rank: of this process in the group. heads, tokens: of each rank of the group. text: T. text_first: in the sequence.
    """

    def __init__(self, group: Any, rank: int, heads: list[int], tokens: list[int], text: int, text_first: bool = True):
        self.group, self.rank = group, rank
        self.heads, self.tokens, self.text, self.text_first = heads, tokens, text, text_first

    def to_heads(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values (B, H, T + s, D) as (B, h, T + S, D)."""
        works, wholes, rest = [], [], []
        for x in (q, k, v):
            heads = wide(x).permute(2, 0, 1, 3).split(self.heads, dim=2)  # of each rank (T + s, B, h, D)
            own = heads[self.rank]
            wholes.append(own.new_empty(self.text + sum(self.tokens), *own.shape[1:]))
            text, images = self._parts(wholes[-1], self.tokens)
            own_text, (own_image,) = self._parts(own, [self.tokens[self.rank]])
            works += self._begin([self._image(each) for each in heads], images)
            rest += [(text, own_text), (images[self.rank], own_image)]
        for place, part in rest:
            place.copy_(part)
        finish(works)
        q, k, v = (whole.view(q.dtype).permute(1, 2, 0, 3) for whole in wholes)
        return q, k, v

    def to_tokens(self, out: Tensor) -> Tensor:
        """Attention's output (B, T + S, h, D) as (B, T + s, H, D)."""
        text, images = self._parts(wide(out).transpose(0, 1), self.tokens)  # (tokens, B, h, D)
        _, batch, _, width = text.shape
        rows = self.text + self.tokens[self.rank]
        arriving = [text.new_empty(rows, batch, heads, width) for heads in self.heads]
        works = self._begin([text] * len(images), [self._text(each) for each in arriving])  # all need all of it
        works += self._begin(images, [self._image(each) for each in arriving])
        whole = text.new_empty(batch, rows, sum(self.heads), width)
        places = whole.transpose(0, 1).split(self.heads, dim=2)
        self._text(places[self.rank]).copy_(text)
        self._image(places[self.rank]).copy_(images[self.rank])
        finish(works)
        for rank, part in enumerate(arriving):
            if rank != self.rank:
                places[rank].copy_(part)
        return whole.view(out.dtype)

    def _parts(self, rows: Tensor, tokens: list[int]) -> tuple[Tensor, Sequence[Tensor]]:
        """The text's rows of a sequence, and the image's in such parts."""
        if self.text_first:
            text, *images = rows.split([self.text, *tokens])
        else:
            *images, text = rows.split([*tokens, self.text])
        return text, images

    def _text(self, rows: Tensor) -> Tensor:
        """The text's rows of this rank's."""
        return self._parts(rows, [self.tokens[self.rank]])[0]

    def _image(self, rows: Tensor) -> Tensor:
        """The image's rows of this rank's."""
        return self._parts(rows, [self.tokens[self.rank]])[1][0]

    def _begin(self, sent: Sequence[Tensor], received: Sequence[Tensor]) -> "list[dist.Work]":
        """Begin to exchange tensors with each other rank; those of this rank itself stay where they are."""
        nothing = received[self.rank].new_empty(0)
        others = [rank != self.rank for rank in range(len(self.heads))]
        return begin_exchange(
            [each.contiguous() if other else nothing for each, other in zip(sent, others)],
            [each if other else nothing for each, other in zip(received, others)],
            self.group,
        )


def wide(x: Tensor) -> Tensor:
    """The same bytes as WIDE, where they lie so that they can be seen so; else x."""
    ratio = WIDE.itemsize // x.element_size()
    lies = x.stride(-1) == 1 and not any(n % ratio for n in (x.shape[-1], x.storage_offset(), *x.stride()[:-1]))
    return x.view(WIDE) if lies else x
