"""Weights that are put together: one copy of them for all who load the model on a machine."""

import gc
import os
import subprocess
import sys
from pathlib import Path

import comfy.cli_args
import pytest
import torch
from diffusers_forms import diffusers_folder
from forms import demo_weights
from safetensors import safe_open
from skein.attributes import changed
from skein.checkpoints.loading import load_diffusers

pytestmark = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="files in memory are Linux's")
AS_STORED = {"dtype": torch.bfloat16}  # ComfyUI would convert it for a CPU
JOINED, RENAMED = "double_blocks.0.img_attn.qkv.weight", "img_in.proj.weight"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(diffusers_folder(tmp_path_factory.mktemp("diffusers")))


def weights_of(patcher):
    return dict(patcher.model.diffusion_model.named_parameters())


def place_of(patcher):
    return patcher.cached_patcher_init[1][2]


def lies_in(weight, name: str) -> bool:
    """Whether a weight is in the memory of a mapped file with such a name."""
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if name in line]
    ranges = [[int(each, 16) for each in line[0].split("-")] for line in lines]
    return any(begin <= weight.data_ptr() < end for begin, end in ranges)


def test_what_is_put_together_lies_in_the_file_and_what_is_renamed_in_the_checkpoint(folder):
    weights = weights_of(load_diffusers(folder, AS_STORED))
    assert lies_in(weights[JOINED], "skein-weights") and lies_in(weights[RENAMED], "diffusion_pytorch_model")


def test_who_loads_it_again_has_the_same_memory(folder):
    first = load_diffusers(folder, AS_STORED)
    function, arguments = first.cached_patcher_init
    second = function(*arguments)
    assert place_of(second) == place_of(first)
    own = demo_weights()
    assert all(torch.equal(weight, own[name]) for name, weight in weights_of(second).items())


def test_another_process_reads_the_same(folder):
    patcher = load_diffusers(folder, AS_STORED)
    code = (
        "import sys, torch; from safetensors import safe_open\n"
        f"with safe_open(sys.argv[1], framework='pt') as file: print(file.get_tensor({JOINED!r}).float().sum().item())"
    )
    command = [sys.executable, "-c", code, place_of(patcher)["path"]]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert float(said) == pytest.approx(weights_of(patcher)[JOINED].float().sum().item())


def test_a_weight_that_is_written_to_is_the_model_s_own(folder):
    first = load_diffusers(folder, AS_STORED)
    second = load_diffusers(*first.cached_patcher_init[1])
    weights_of(first)[JOINED].data.fill_(7)
    assert torch.equal(weights_of(second)[JOINED], demo_weights()[JOINED])
    with safe_open(place_of(first)["path"], framework="pt") as file:
        assert torch.equal(file.get_tensor(JOINED), demo_weights()[JOINED])


def test_it_goes_with_the_model_and_is_made_again(folder):
    patcher = load_diffusers(folder, AS_STORED)
    arguments = patcher.cached_patcher_init[1]
    assert os.path.exists(arguments[2]["path"])
    del patcher
    gc.collect()
    assert not os.path.exists(arguments[2]["path"])
    again = load_diffusers(*arguments)
    assert torch.equal(weights_of(again)[JOINED], demo_weights()[JOINED])


@pytest.mark.parametrize("change", [{"mark": "another"}, {"path": __file__}, {"path": "/proc/0/fd/0"}])
def test_another_file_at_its_path_is_not_taken_for_it(folder, change):
    first = load_diffusers(folder, AS_STORED)
    second = load_diffusers(folder, AS_STORED, place_of(first) | change)
    assert place_of(second)["mark"] not in (place_of(first)["mark"], "another")
    assert torch.equal(weights_of(second)[JOINED], demo_weights()[JOINED])


def test_where_all_weights_are_converted_no_file_stays(folder):
    patcher = load_diffusers(folder, {"dtype": torch.float32})
    assert place_of(patcher) is None and "skein-weights" not in Path("/proc/self/maps").read_text()


def test_comfyui_that_maps_no_files_gets_copies(folder):
    with changed([(comfy.cli_args.args, "disable_mmap", True)]):
        patcher = load_diffusers(folder, AS_STORED)
    assert place_of(patcher) is None and not lies_in(weights_of(patcher)[JOINED], "skein-weights")
    assert torch.equal(weights_of(patcher)[JOINED], demo_weights()[JOINED])
