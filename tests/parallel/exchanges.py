"""Ranks of a group exchange tensors and check what they get. One by one as gloo does, of uneven sizes; and by the
collective that NCCL is asked for, of one size, because gloo's takes no other (bench.exchange has uneven ones on GPUs).
For torchrun."""

import sys
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
from pack import load_pack

load_pack()

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from skein.parallel.exchange import begin_exchange, finish  # noqa: E402

SIZES = {"gloo": [[0, 2, 3], [1, 0, 0], [5, 0, 0]], "nccl": [[2] * 3] * 3}  # rows that each rank sends to each


def check(members: list[int], group, sizes: list[list[int]]) -> None:
    """Among these ranks each gets what the others send it."""

    def rows(source: int, target: int) -> torch.Tensor:
        return torch.full((sizes[source][target], 2, 4), 10.0 * source + target, dtype=torch.bfloat16)

    rank = dist.get_rank()
    received = [torch.full_like(rows(other, rank), -1) for other in members]
    finish(begin_exchange([rows(rank, other) for other in members], received, group))
    assert all(torch.equal(got, rows(other, rank)) for got, other in zip(received, members))


def main():
    dist.init_process_group("gloo")
    pair = dist.new_group([0, 2])
    for backend, sizes in SIZES.items():
        with mock.patch("skein.parallel.exchange.dist.get_backend", lambda group, backend=backend: backend):
            check([0, 1, 2], None, sizes)
            if dist.get_rank() != 1:
                check([0, 2], pair, sizes)
    dist.barrier()
    print("exchanged")
    dist.destroy_process_group()


if __name__ == "__main__":
    with torch.inference_mode():
        main()
