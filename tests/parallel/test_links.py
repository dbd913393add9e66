"""The bytes that bench.links counts are those that the exchanges send: rank 0 of many, with a process group that
carries nothing."""

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from skein.bench.links import Exchange, step_seconds
from skein.parallel.mesh import Arrangement
from skein.parallel.ring import _pass_on
from skein.parallel.ulysses import Ulysses
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

WIDTH, HEAD_DIM, TEXT, IMAGE = 512, 64, 5, 48
DEGREES = [(2, 1), (4, 1), (8, 1), (1, 2), (1, 8), (2, 4), (4, 2)]


class Sent(TorchDispatchMode):
    """Counts the bytes that leave this rank."""

    bytes = 0

    def __torch_dispatch__(self, function, _types, args=(), kwargs=None):
        name = function.name()
        if name == "c10d::alltoall_":
            self.bytes += sum(each.nbytes for each in args[1])
            args = (args[1], *args[1:])  # the fake group copies what is sent to what is received of the same place
        return function(*args, **(kwargs or {}))


@pytest.fixture(params=DEGREES, ids=lambda degrees: f"{degrees[0]} x {degrees[1]}")
def ranks(request):
    ulysses, ring = request.param
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ulysses * ring)
    yield Arrangement(ulysses, timedelta(seconds=1)), Exchange(IMAGE, TEXT, WIDTH, ulysses, ring)
    dist.destroy_process_group()


def test_bytes_sent(ranks):
    arrangement, counted = ranks
    ulysses, world = arrangement.ulysses_size, arrangement.ulysses_size * arrangement.ring_size
    heads = [WIDTH // HEAD_DIM // ulysses] * ulysses
    exchange = Ulysses(arrangement.ulysses_group, 0, heads, [IMAGE // world] * ulysses, TEXT)
    own = torch.zeros(1, WIDTH // HEAD_DIM, TEXT + IMAGE // world, HEAD_DIM, dtype=torch.bfloat16)
    if ulysses > 1:
        with Sent() as sent:
            q, *_ = exchange.to_heads(own, own, own)
        assert sent.bytes == counted.to_heads
        with Sent() as sent:
            exchange.to_tokens(q.transpose(1, 2))
        assert sent.bytes == counted.to_tokens
    if arrangement.ring_size > 1:
        part = torch.zeros(2, 1, heads[0], IMAGE // arrangement.ring_size, HEAD_DIM, dtype=torch.bfloat16)
        with Sent() as sent:
            for _ in range(arrangement.ring_size - 1):
                _pass_on(part, torch.empty_like(part), arrangement)
        assert sent.bytes == counted.around


def test_a_fast_link_scales_and_a_slow_one_does_not():
    exchange = Exchange(118_800, 256, 3072, 4, 1)
    fast, slow = (step_seconds(exchange, 18.4, 0.85, 60, speed) for speed in (1e15, 1e9))
    assert fast == pytest.approx(18.4 / 4, rel=1e-3) and slow > 18.4


def test_what_a_ring_leaves_to_its_transfers_slows_all_of_its_parts_but_the_last():
    exchange = Exchange(118_800, 256, 3072, 1, 4)
    free, spared = (step_seconds(exchange, 16.0, 0.5, 60, 1e15, spare) for spare in (0.0, 0.2))
    assert spared - free == pytest.approx(16.0 / 4 * 0.5 * 3 / 4 * (1 / 0.8 - 1), rel=1e-3)
