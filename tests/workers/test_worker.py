"""What a worker does when asked, in this process: a group of one rank that carries nothing."""

import gc
from dataclasses import asdict
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import vaes
from random_checkpoints import random_model
from skein.cache.first_block import FirstBlockCache
from skein.parallel.mesh import Mesh
from skein.plan import CacheConfig, ParallelConfig, Plan
from skein.worker.worker import Worker
from skein.workers.recipe import recipe_of
from torch.testing._internal.distributed.fake_pg import FakeStore


@pytest.fixture
def worker(tmp_path):
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    with torch.inference_mode():
        worker = Worker(Mesh(torch.device("cpu"), (1, 1), timedelta(seconds=1)))
        worker.load(0, recipe_of(random_model(tmp_path, 2)))
        yield worker
        worker.end()
    dist.destroy_process_group()


def interrupted(worker):
    """A run that nobody ends after its first call, as an interrupt leaves it; how many caches hold hidden states."""
    plan = Plan(cache=CacheConfig(0.1), parallel=ParallelConfig("cpu"))
    worker.begin(0, asdict(plan), None, torch.float32, [])
    sigmas = torch.tensor([1.0, 0.5, 0.0])
    options = {"cond_or_uncond": [0], "uuids": ["a"], "sigmas": sigmas[:1], "sample_sigmas": sigmas}
    x, context, y = torch.randn(1, 16, 3, 8, 6), torch.randn(1, 7, 64), torch.randn(1, 768)
    arguments = {
        "x": x,
        "timestep": torch.tensor([1000.0]),
        "context": context,
        "y": y,
        "guidance": torch.tensor([6.0]),
    }
    worker.call(arguments, options)
    return holding()


def holding():
    gc.collect()
    return sum(isinstance(each, FirstBlockCache) and bool(each._states) for each in gc.get_objects())


def test_a_decode_ends_a_run_that_an_interrupt_has_left_open(worker):
    """A run keeps hidden states, gigabytes at full size, where the decode wants its memory."""
    vae, latent = vaes.vae(), vaes.latent("Wan 2.1", (1, 2, 3, 4))
    weights = {"state": vae.get_sd(), "dtype": vae.vae_dtype}
    questions = [
        ("take_vae", weights),
        ("decode_strip", {"latent": latent, "dim": -1, "parts": [4], "need": 0}),
        ("decode_tile", {"latents": [latent], "need": 0, "last": True}),
    ]
    for kind, value in questions:
        assert interrupted(worker) == 1
        getattr(worker, kind)(**value)
        assert holding() == 0, kind
