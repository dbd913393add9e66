"""Ulysses: inside attention, tokens are exchanged for heads, so that each rank attends with all tokens and some heads.

After DeepSpeed-Ulysses (Jacobs et al., arxiv.org/abs/2309.14509), for a few text tokens that every rank has and many
image tokens of which each has a slice. Slices and heads may be uneven, nothing is padded. Rows of tokens come first in
what is exchanged: so, for one sample, what arrives is the sequence as the kernel takes it, and the kernel's output is
what is sent.

Letters: B batch, H heads, h those of this rank, T text tokens, S image tokens of the group, s those of this rank,
D head dim.
"""

from typing import Any

import torch.distributed as dist
from torch import Tensor


class Ulysses:
    """The exchange for one number of tokens.

    rank: of this process in the group. heads, tokens: of each rank of the group. text: T.
    """

    def __init__(self, group: Any, rank: int, heads: list[int], tokens: list[int], text: int):
        self.group, self.rank = group, rank
        self.heads, self.tokens, self.text = heads, tokens, text

    def to_heads(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values (B, H, T + s, D) as (B, h, T + S, D)."""
        batch, width = q.shape[0], q.shape[3]
        first, own, rows = sum(self.heads[: self.rank]), self.heads[self.rank], self.tokens[self.rank]
        whole = q.new_empty(self.text + sum(self.tokens), batch, 3, own, width)
        send = q.new_empty(rows * batch * 3 * sum(self.heads) * width)
        sizes = [rows * batch * 3 * count * width for count in self.heads]
        buffers = [part.view(rows, batch, 3, -1, width) for part in send.split(sizes)]
        for place, x in enumerate((q, k, v)):
            whole[: self.text, :, place] = x[:, first : first + own, : self.text].permute(2, 0, 1, 3)
            for buffer, part in zip(buffers, x[:, :, self.text :].split(self.heads, dim=1)):
                buffer[:, :, place] = part.permute(2, 0, 1, 3)
        arriving = [count * batch * 3 * own * width for count in self.tokens]
        dist.all_to_all_single(whole[self.text :].view(-1), send, arriving, sizes, group=self.group)
        q, k, v = (whole[:, :, place].permute(1, 2, 0, 3) for place in range(3))
        return q, k, v

    def to_tokens(self, out: Tensor) -> Tensor:
        """Attention's output (B, T + S, h, D) as (B, T + s, H, D)."""
        batch, _, _, width = out.shape
        rows = out.transpose(0, 1).contiguous()  # (T + S, B, h, D)
        whole = out.new_empty(batch, self.text + self.tokens[self.rank], sum(self.heads), width)
        everyone = len(self.heads)
        text = rows[: self.text].expand(everyone, -1, -1, -1, -1).flatten(0, 1).contiguous()  # all need all of it
        self._collect(text, [self.text] * everyone, whole[:, : self.text])
        self._collect(rows[self.text :], self.tokens, whole[:, self.text :])
        return whole

    def _collect(self, rows: Tensor, counts: list[int], target: Tensor) -> None:
        """Send `counts` of the rows (R, B, h, D) to each rank, and put what they send into target (B, r, H, D)."""
        _, batch, own, width = rows.shape
        sizes = [target.shape[1] * batch * heads * width for heads in self.heads]
        received = rows.new_empty(sum(sizes))
        dist.all_to_all_single(
            received, rows.reshape(-1), sizes, [count * batch * own * width for count in counts], group=self.group
        )
        for part, heads, place in zip(received.split(sizes), self.heads, target.split(self.heads, dim=2)):
            place.copy_(part.view(-1, batch, heads, width).transpose(0, 1))
