"""Ring attention: each rank keeps its queries, keys and values go round, partial results are merged by their
log-sum-exp.

After Liu et al., arxiv.org/abs/2310.01889. The next keys and values travel while the present ones are used. Text is on
every rank, so its keys count once, with the rank's own; its queries meet everything on every rank.

Letters: B batch, h heads, T text tokens, S image tokens of a rank, D head dim.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from ..attention import attention_with_lse
from .exchange import BLOCKS, begin_exchange, finish
from .mesh import Arrangement, Mesh


def ring_attention(
    q: Tensor, k: Tensor, v: Tensor, text: int, arrangement: Arrangement, tokens: list[int], mesh: Mesh
) -> Tensor:
    """Attention of this rank's queries over all ranks' keys and values, as (B, T + S, h, D).

    q, k, v: (B, h, T + S, D) with the image of this rank's Ulysses group. tokens: image tokens of each rank.
    """
    rank, size, sizes = arrangement.ring_rank, arrangement.ring_size, arrangement.group_tokens(tokens)
    keys, values = k, v
    current = torch.stack((k[:, :, text:], v[:, :, text:]))
    out = lse = None
    for step in range(1, size):
        coming = q.new_empty(2, q.shape[0], q.shape[1], sizes[(rank - step) % size], q.shape[3])
        transfers = _pass_on(current, coming, arrangement)
        out, lse = merge(out, lse, *attention_with_lse(q, keys, values, spare=BLOCKS))
        with mesh.exchanging():
            finish(transfers)
        keys, values = current = coming
    out, _ = merge(out, lse, *attention_with_lse(q, keys, values))
    return out.to(q.dtype)


def merge(out: Tensor | None, lse: Tensor | None, other: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over two sets of keys from attention over each: outputs (B, S, h, D), log-sum-exp (B, h, S).

    `out`, in float32, becomes the whole's. None: there is but the other set.
    """
    if out is None or lse is None:
        return other.float(), other_lse
    out.lerp_(other.float(), torch.sigmoid(other_lse - lse).transpose(1, 2).unsqueeze(3))
    return out, torch.logaddexp(lse, other_lse)


def _pass_on(send: Tensor, receive: Tensor, arrangement: Arrangement) -> "list[dist.Work]":
    """Begin to pass a tensor on to the next rank of the ring, and to receive one from the one before."""
    rank, size = arrangement.ring_rank, arrangement.ring_size
    sent, received = ([send.new_empty(0)] * size for _ in range(2))
    sent[(rank + 1) % size], received[(rank - 1) % size] = send, receive
    return begin_exchange(sent, received, arrangement.ring_group)
