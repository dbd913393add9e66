"""What Ulysses costs beside the attention it shares out: the exchange of one attention on the GPUs of this machine.

    torchrun --standalone --nproc-per-node=2 bench/exchange.py [--image 118800 --text 60 --heads 24]
    torchrun --standalone --nproc-per-node=2 bench/exchange.py --cpu --image 600 --heads 4

One layer of HunyuanVideo 13 B at 720p x 129 frames, queries, keys and values Gaussian, laid out as its single blocks
hand them over. Each figure is each rank's median of the second half of some seconds, because cards slow down when they
are warm, not all alike. "alone" is the whole attention on one rank, by turns or at once on all; "link" the same bytes
as the exchange's, ready to be sent, in one message to each other rank. "ring" is the same attention by keys and values
that go round, "ring_attention" its kernel alone, on as many keys, and "ring_merge" one merge of two of its results. The
shared outputs are compared with the whole's. Ends with one JSON line.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
from pack import load_pack  # noqa: E402

load_pack()

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from skein.attention import Selection, attention_with_lse  # noqa: E402
from skein.attention.kernels import plain_attention  # noqa: E402
from skein.bench.attention import inputs  # noqa: E402
from skein.bench.errors import relative_error  # noqa: E402
from skein.bench.timing import device_name, median_seconds  # noqa: E402
from skein.parallel.exchange import begin_exchange, finish, join  # noqa: E402
from skein.parallel.mesh import Mesh, split  # noqa: E402
from skein.parallel.ring import merge, ring_attention  # noqa: E402
from skein.parallel.ulysses import Ulysses  # noqa: E402
from skein.plan import AttentionConfig  # noqa: E402
from torch import Tensor  # noqa: E402

PATIENCE = timedelta(minutes=10)


class Timing:
    """Times runs on all ranks, so many seconds each."""

    def __init__(self, seconds: float, device: str):
        self.seconds, self.device = seconds, device
        self.mail: Any = dist.new_group(backend="gloo")  # whose waiting does not warm a card

    def at_once(self, run: Callable[[], object]) -> list[float]:
        """Milliseconds of a run by rank, all running it as often."""
        once = torch.tensor(median_seconds(run, self.device, 3))
        dist.all_reduce(once, dist.ReduceOp.MAX, group=self.mail)
        half = max(int(self.seconds / 2 / float(once)), 2)
        dist.barrier(group=self.mail)
        return self._by_rank(1000 * median_seconds(run, self.device, half, half))

    def from_one_start(self, run: Callable[[], object]) -> dict[str, list[float]]:
        """The same of runs that all begin together, as a layer's do: their median, and the slowest."""
        times, until = [], time.perf_counter() + self.seconds
        going = torch.tensor(True)
        while going:
            dist.all_reduce(torch.zeros(1, device=self.device))
            times.append(1000 * median_seconds(run, self.device, 1, 0))
            going = torch.tensor(time.perf_counter() < until)
            dist.all_reduce(going, dist.ReduceOp.MIN, group=self.mail)
        return {"median": self._by_rank(statistics.median(times)), "slowest": self._by_rank(max(times))}

    def by_turns(self, run: Callable[[], object]) -> list[float]:
        """Milliseconds of a run by rank, while the others rest."""
        found = 0.0
        for rank in range(dist.get_world_size()):
            dist.barrier(group=self.mail)
            if rank == dist.get_rank():
                half = max(int(self.seconds / 2 / median_seconds(run, self.device, 3)), 2)
                found = 1000 * median_seconds(run, self.device, half, half)
        return self._by_rank(found)

    def _by_rank(self, value: float) -> list[float]:
        values = [torch.empty(1) for _ in range(dist.get_world_size())]
        dist.all_gather(values, torch.tensor([value]), group=self.mail)
        return [round(float(each), 3) for each in values]


def link(sending: list[int], receiving: list[int], device: str) -> Callable[[], None]:
    """Sends so many bfloat16 values to each other rank and receives so many from it, without a copy."""
    others = [rank != dist.get_rank() for rank in range(dist.get_world_size())]
    sent = [torch.randn(count * other, device=device).bfloat16() for count, other in zip(sending, others)]
    received = [sent[0].new_empty(count * other) for count, other in zip(receiving, others)]
    return lambda: finish(begin_exchange(sent, received))


def measure(options: argparse.Namespace, device: str) -> dict:
    rank, world = dist.get_rank(), dist.get_world_size()
    heads, tokens = split(options.heads, world), split(options.image, world)
    torch.manual_seed(0)
    whole = inputs(options.text + options.image, options.heads, 128, device)
    start = options.text + sum(tokens[:rank])
    own = slice(start, start + tokens[rank])
    qkv = torch.cat([x.transpose(1, 2) for x in whole], dim=2)  # (1, S, 3 H, D): this rank's part of a projection
    qkv = torch.cat((qkv[:, : options.text], qkv[:, own]), dim=1).unflatten(2, (3, -1))
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    selection = Selection(AttentionConfig(), lambda q, k, v, _: plain_attention(q, k, v))
    attention = selection.attend
    exchange = Ulysses(dist.group.WORLD, rank, heads, tokens, options.text)
    mesh = Mesh(torch.device(device), (1, world), PATIENCE)

    def shared() -> Tensor:
        return exchange.to_tokens(attention(*exchange.to_heads(q, k, v)))

    def ring() -> Tensor:
        return ring_attention(q, k, v, options.text, mesh.arrangements[0], tokens, mesh)

    expected = attention(*whole)
    expected = torch.cat((expected[:, : options.text], expected[:, own]), dim=1)
    there = exchange.to_heads(q, k, v)
    out, (part, lse) = attention(*there), attention_with_lse(q, k, v)
    total = part.float()
    out_of = [128 * tokens[rank] * count for count in heads]  # values of one tensor for each other rank, of its heads
    into = [128 * count * heads[rank] for count in tokens]  # and from each
    timing = Timing(options.seconds, device)
    return {
        "error": largest_error(shared(), expected),
        "ring_error": largest_error(ring(), expected),
        "alone_by_turns_ms": timing.by_turns(lambda: attention(*whole)),
        "alone_at_once_ms": timing.at_once(lambda: attention(*whole)),
        "shared_ms": timing.at_once(shared),
        "attention_ms": timing.at_once(lambda: attention(*there)),
        "to_heads_ms": timing.at_once(lambda: exchange.to_heads(q, k, v)),
        "to_tokens_ms": timing.at_once(lambda: exchange.to_tokens(out)),
        "link_to_heads_ms": timing.at_once(link([3 * n for n in out_of], [3 * n for n in into], device)),
        "link_to_tokens_ms": timing.at_once(link(into, out_of, device)),
        "ring_ms": timing.at_once(ring),
        "ring_from_one_start_ms": timing.from_one_start(ring),
        "ring_attention_ms": timing.at_once(lambda: [attention_with_lse(q, k, v) for _ in range(world)]),
        "ring_merge_ms": timing.at_once(lambda: merge(total, lse, part, lse)),
        "kernels": selection.reasons,
    }


def largest_error(out: Tensor, expected: Tensor) -> float:
    """The relative difference, on the rank where it is largest."""
    error = torch.tensor(relative_error(out, expected), device=out.device)
    dist.all_reduce(error, dist.ReduceOp.MAX)
    return float(error)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in dict(image=118800, text=60, heads=24).items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--seconds", type=float, default=6.0)
    parser.add_argument("--cpu", action="store_true")
    options = parser.parse_args()
    device = "cpu" if options.cpu else f"cuda:{os.environ['LOCAL_RANK']}"
    if not options.cpu:
        torch.cuda.set_device(device)
    join(torch.device(device), PATIENCE)
    with torch.inference_mode():
        row = measure(options, device)
    if dist.get_rank() == 0:
        print(row)
        print(
            json.dumps({
                "device": device_name(), "gpus": dist.get_world_size(), "torch": torch.__version__,
                "random": "queries, keys and values", "sizes": vars(options), **row,
                "over_one_card": max(row["alone_by_turns_ms"]) / max(row["shared_ms"]),
                "over_one_of_all": max(row["alone_at_once_ms"]) / max(row["shared_ms"]),
            })
        )  # fmt: skip
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
