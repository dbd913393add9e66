"""What a rank decides, with a process group that carries nothing: how a ring runs, which arrangement is the fastest."""

import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from skein.attention import attention_with_lse
from skein.parallel import ring
from skein.parallel.exchange import BLOCKS
from skein.parallel.mesh import Mesh
from torch.testing._internal.distributed.fake_pg import FakeStore


@pytest.fixture
def mesh(request):
    """One with as many ranks in a ring, of which this is the first."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=request.param)
    yield Mesh(torch.device("cpu"), (1, request.param), timedelta(seconds=1))
    dist.destroy_process_group()


@pytest.mark.parametrize("mesh", [3], indirect=True)
def test_a_kernel_leaves_room_to_what_travels_and_takes_all_when_nothing_does(mesh, monkeypatch):
    told = []

    def kernel(q, k, v, spare=0):
        told.append((k.shape[2], spare))
        return attention_with_lse(q, k, v)

    monkeypatch.setattr(ring, "attention_with_lse", kernel)
    monkeypatch.setattr(ring, "_pass_on", lambda *_: [])
    q = torch.zeros(1, 2, 5 + 16, 64)
    ring.ring_attention(q, q, q, 5, mesh.arrangements[0], [16, 17, 18], mesh)
    assert told == [(5 + 16, BLOCKS), (18, BLOCKS), (17, 0)]


@pytest.mark.parametrize("mesh", [1], indirect=True)
def test_a_run_that_is_disturbed_once_does_not_decide_which_arrangement_is_the_fastest(mesh):
    runs = []

    def run(arrangement):
        runs.append(arrangement)
        time.sleep(0.1 if len(runs) == 2 else 0.005 if arrangement == "quick" else 0.02)
        return torch.empty(0)

    assert mesh.fastest(["quick", "slow"], ("a size",), 0, run) == "quick"
