"""What a rank decides, with a process group that carries nothing: how a ring runs, which arrangement is the fastest."""

import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from skein.attention import attention_with_lse
from skein.models import ModelCall, Network, Place
from skein.parallel import ring
from skein.parallel.exchange import BLOCKS
from skein.parallel.mesh import Mesh
from skein.parallel.shard import Sharding
from small_models import random_hunyuan_video
from torch.testing._internal.distributed.fake_pg import FakeStore


@pytest.fixture
def mesh(request):
    """One with as many ranks in a ring, of which this is the first; or ranks, and degrees that are left open."""
    world, degrees = request.param if isinstance(request.param, tuple) else (request.param, (1, request.param))
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    yield Mesh(torch.device("cpu"), degrees, timedelta(seconds=1))
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


@pytest.mark.parametrize("mesh", [(2, (0, 0))], indirect=True)
def test_arrangements_are_tried_once_for_a_size_whatever_the_text_and_again_for_8_bit(mesh, monkeypatch):
    """A ring runs no 8-bit kernel: here it is the faster of two exact ones, and the slower beside one of 8 bits."""
    ran = []

    def attend_in(self, arrangement, share, attention, q, k, v, mask, text_first):
        in_a_ring = arrangement.ring_size > 1
        ran.append("ring" if in_a_ring else "Ulysses")
        time.sleep(0.002 if in_a_ring else 0.006 if attention == "exact" else 0.0005)
        return torch.empty(0)

    monkeypatch.setattr(Sharding, "_attend_in", attend_in)
    monkeypatch.setattr("skein.parallel.mesh.TRIAL_SECONDS", 0.02)
    sharding, chosen = Sharding(mesh), []
    network = Network(random_hunyuan_video().model.diffusion_model)
    call = ModelCall(network, {})

    def attentions(text, attention):
        """How many attentions a call runs, and how its own runs."""
        ran.clear()
        tokens = text + 6
        q = torch.zeros(1, 4, tokens, 8)
        values = {
            "img": torch.zeros(1, 12, 32),
            "txt": torch.zeros(1, text, 32),
            "pe": torch.zeros(1, 1, text + 12, 4, 2, 2),
        }

        def run(values):
            sharding.around(attention, attention == "exact", place)(q, q, q, None)
            return values

        place = Place(call, network.blocks[0], attentions=1)
        sharding.around_block(call, place.block, values, run)
        chosen.append(ran[-1])
        return len(ran)

    assert attentions(7, "exact") > 1 and attentions(7, "exact") == 1
    assert attentions(9, "exact") == 1 and attentions(256, "exact") == 1  # other prompts
    assert attentions(9, "8-bit") > 1 and attentions(7, "8-bit") == 1 and attentions(7, "exact") == 1
    assert chosen == ["ring"] * 4 + ["Ulysses"] * 2 + ["ring"]
