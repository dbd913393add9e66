"""Tensors between the ranks of a group, while the device works on.

By a collective wherever there is one. NCCL's sends and receives one by one (P2POp) have the allocator keep each tensor
from being used again until the device has come past it (Tensor.record_stream), and the host is dozens of layers ahead:
they fill the GPU with what they have sent, until the allocator waits and starts anew. A collective's tensors are free
once it has been waited for.
"""

import os
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# How PyTorch asks NCCL, where the user has not said otherwise: what travels goes before the copies made meanwhile.
NCCL = {"TORCH_NCCL_HIGH_PRIORITY": "1"}
if torch.__version__ < "2.7":  # a version, so 2.10 is later; from then on the default, and warned of where it is set
    NCCL["TORCH_NCCL_AVOID_RECORD_STREAMS"] = "1"  # of collectives
# Multiprocessors that transfers take where a kernel runs beside them, and that it leaves to them. A kernel that has all
# to its end keeps a transfer from beginning, on whose other end a rank then waits, holding some of its own.
BLOCKS = 8


def join(
    device: torch.device, timeout: timedelta, store: "dist.Store | None" = None, rank: int = -1, world: int = -1
) -> None:
    """Make this process one of a group. store: where its processes meet; None: as the environment says (torchrun)."""
    for name, value in NCCL.items():
        os.environ.setdefault(name, value)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo", store=store, rank=rank, world_size=world, timeout=timeout
    )


def new_group(ranks: list[int], timeout: timedelta, beside_kernels: bool) -> Any:
    """A process group; made by all ranks. beside_kernels: its transfers take no more than BLOCKS multiprocessors."""
    options: Any = None
    if beside_kernels and dist.get_backend() == "nccl":
        options = dist.ProcessGroupNCCL.Options()
        options.config.max_ctas = BLOCKS
        options._timeout = timeout
    return dist.new_group(ranks, timeout=timeout, pg_options=options)


def begin_exchange(sent: Sequence[Tensor], received: Sequence[Tensor], group: Any = None) -> "list[dist.Work]":
    """Begin to send a tensor to each rank of a group, and to receive one from each in place. What is returned is to be
    waited for, on the device's stream (finish).

    All are contiguous and of one type and device. An empty one is not sent; its receiver has an empty one for it.
    group: None for all ranks.
    """
    sent, received = ([each.view(torch.uint8) for each in tensors] for tensors in (sent, received))
    group = group or dist.group.WORLD
    if dist.get_backend(group) != "gloo":
        return [dist.all_to_all(received, sent, group, async_op=True)]  # type: ignore[list-item]
    # Not every PyTorch has gloo's all_to_all of lists.
    operations = [
        dist.P2POp(function, tensor, dist.get_global_rank(group, rank), group)
        for function, tensors in ((dist.isend, sent), (dist.irecv, received))
        for rank, tensor in enumerate(tensors)
        if tensor.numel()
    ]
    return dist.batch_isend_irecv(operations) if operations else []


def finish(works: "Sequence[dist.Work]") -> None:
    """Have the device's stream, or the CPU, wait for exchanges."""
    for work in works:
        work.wait()
