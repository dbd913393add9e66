"""Where the weights of a loaded model are: in the files, or in one copy. Workers load them the same."""

from pathlib import Path

import pytest
import torch
from judge import CASES, random_network, save_in_shards
from random_checkpoints import SMALL, text
from skein import engine
from skein.bench.errors import relative_error
from skein.checkpoints.loading import load_diffusers
from skein.demo.sampling import sample
from skein.plan import ParallelConfig, Plan
from skein.worker.weights import load_from_file
from skein.workers import release
from skein.workers.keeping import need_of
from skein.workers.recipe import recipe_of

MADE = {"qkv", "linear1"}  # the layers put together of several; and the last one's halves are exchanged


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    save_in_shards(random_network(CASES["HunyuanVideo"]), folder)
    return folder


def outside(model, folder):
    """Names of the weights that are not in the memory of the folder's files."""
    lines = [line for line in Path("/proc/self/maps").read_text().splitlines() if str(folder) in line]
    ranges = [range(*(int(each, 16) for each in line.split()[0].split("-"))) for line in lines]
    return {
        name
        for name, weight in model.model.diffusion_model.named_parameters()
        if not any(weight.data_ptr() in each for each in ranges)
    }


def made(model):
    names = [name for name, _weight in model.model.diffusion_model.named_parameters()]
    return {each for each in names if each.split(".")[-2] in MADE or "final_layer.adaLN" in each}


@pytest.mark.parametrize("load", [load_diffusers, lambda path: load_from_file(recipe_of(load_diffusers(path)))])
def test_what_is_only_renamed_stays_in_the_files(folder, load):
    model = load(str(folder))
    assert outside(model, folder) == made(model) != set()


def test_weights_of_another_type_are_copies(folder):
    model = load_diffusers(str(folder), {"dtype": torch.bfloat16})
    weights = dict(model.model.diffusion_model.named_parameters())
    assert outside(model, folder) == set(weights)
    expected = dict(load_diffusers(str(folder)).model.diffusion_model.named_parameters())
    assert all(torch.equal(weight, expected[name].bfloat16()) for name, weight in weights.items())


def test_what_is_written_to_a_weight_stays_out_of_the_files(folder):
    before = [file.read_bytes() for file in sorted(folder.iterdir())]
    model = load_diffusers(str(folder)).model.diffusion_model
    for weight in model.parameters():
        weight.add_(1)
    assert before == [file.read_bytes() for file in sorted(folder.iterdir())]


@pytest.mark.parametrize("dtype, converted", [(torch.float32, 0), (torch.bfloat16, 1)])
def test_workers_need_memory_for_what_is_converted_only(folder, dtype, converted):
    model = load_diffusers(str(folder), {"dtype": dtype})
    need = need_of(model, recipe_of(model), Plan(), on_cpu=False)
    assert need.host == converted * need.device


def test_workers_sample_what_one_process_samples(folder):
    model = load_diffusers(str(folder), {"dtype": torch.float32})
    stock = sample(model, text(7), **SMALL)
    workers = sample(engine.edit(model, parallel=ParallelConfig("cpu,cpu")), text(7), **SMALL)
    release()
    assert relative_error(workers, stock) < 2e-6
