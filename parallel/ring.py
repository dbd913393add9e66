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
from .mesh import Mesh


def ring_attention(q: Tensor, k: Tensor, v: Tensor, text: int, tokens: list[int], mesh: Mesh) -> Tensor:
    """Attention of this rank's queries over all ranks' keys and values, as (B, T + S, h, D).

    q, k, v: (B, h, T + S, D) with this rank's image. tokens: image tokens of each rank of the ring.
    """
    rank, size = mesh.ring_rank, mesh.ring_size
    keys, values = k, v
    out = k.new_zeros(q.shape[0], q.shape[2], q.shape[1], q.shape[3], dtype=torch.float32)
    lse = out.new_full(q.shape[:3], float("-inf"))
    current = torch.stack((k[:, :, text:], v[:, :, text:]))
    for step in range(size):
        transfers = []
        coming = q.new_empty(2, q.shape[0], q.shape[1], tokens[(rank - step - 1) % size], q.shape[3])
        if step < size - 1:
            transfers = _pass_on(current, coming, mesh)
        out, lse = merge(out, lse, *attention_with_lse(q, keys, values))
        for transfer in transfers:
            transfer.wait()
        current = coming
        keys, values = current
    return out.to(q.dtype)


def merge(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over two sets of keys from attention over each: outputs (B, S, h, D), log-sum-exp (B, h, S)."""
    whole = torch.logaddexp(lse, other_lse)
    mine, theirs = ((part - whole).exp().transpose(1, 2).unsqueeze(3) for part in (lse, other_lse))
    return out * mine + other.float() * theirs, whole


def _pass_on(send: Tensor, receive: Tensor, mesh: Mesh) -> list[dist.Work]:
    """To the next rank of the ring, from the one before."""
    following = mesh.ring_members[(mesh.ring_rank + 1) % mesh.ring_size]
    before = mesh.ring_members[(mesh.ring_rank - 1) % mesh.ring_size]
    return dist.batch_isend_irecv(
        [
            dist.P2POp(dist.isend, send, following, group=mesh.ring_group),
            dist.P2POp(dist.irecv, receive, before, group=mesh.ring_group),
        ]
    )
