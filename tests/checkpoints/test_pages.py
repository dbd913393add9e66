"""Pages of files that were read to put weights together are given back."""

import ctypes
import mmap
import os
import sys
from pathlib import Path

import pytest
import torch
from judge import CASES, random_network, save_in_shards
from safetensors.torch import load_file, save_file
from skein.checkpoints.loading import load_diffusers
from skein.checkpoints.pages import addresses, give_back
from skein.files import memory_of_files

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="gives pages back on Linux only")
MB = 1 << 20


def on_disk(folder: Path) -> None:
    """What is not on the disk yet cannot be dropped from the cache. Skips where a file is in memory alone."""
    for file in folder.glob("*.safetensors"):
        descriptor = os.open(file, os.O_RDWR)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
        if cached(file):
            pytest.skip("this file system keeps files in memory")


def cached(file: Path) -> int:
    """Bytes of a file that the system has in memory for whomever."""
    with open(file, "r+b") as opened, mmap.mmap(opened.fileno(), 0) as mapped:
        first = ctypes.c_char.from_buffer(mapped)
        there = (ctypes.c_ubyte * -(-len(mapped) // mmap.PAGESIZE))()
        assert (
            ctypes.CDLL(None).mincore(ctypes.c_void_p(ctypes.addressof(first)), ctypes.c_size_t(len(mapped)), there)
            == 0
        )
        del first
    return mmap.PAGESIZE * sum(each & 1 for each in there)


def resident(folder: Path) -> int:
    """Bytes of a folder's files that are in this process's memory."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, *rest = line.split()
        if not name.endswith(":"):
            inside = str(folder) in line
        elif inside and name == "Rss:":
            total += int(rest[0]) << 10
    return total


def test_a_part_of_a_file_leaves_memory_and_the_cache(tmp_path):
    file = tmp_path / "three.safetensors"
    save_file({name: torch.randn(4 * MB) for name in "abc"}, file)
    on_disk(tmp_path)
    kept = load_file(file)
    sums = {name: float(tensor.sum()) for name, tensor in kept.items()}
    assert resident(tmp_path) > 47 * MB and cached(file) > 47 * MB
    give_back([addresses(kept["b"])])
    assert 31 * MB < resident(tmp_path) < 33 * MB and 31 * MB < cached(file) < 33 * MB
    assert sums == {name: float(tensor.sum()) for name, tensor in kept.items()}  # read again


def test_what_lies_in_no_file_stays_as_it_is(tmp_path):
    tensor = torch.ones(4 * MB)
    give_back([addresses(tensor), range(0), range(tensor.data_ptr() + 1, tensor.data_ptr() + 2)])
    assert bool((tensor == 1).all())


@pytest.fixture
def folder(tmp_path):
    save_in_shards(random_network(CASES["HunyuanVideo"]), tmp_path)
    return tmp_path


def test_loading_leaves_nothing_of_what_it_has_put_together(folder):
    """And leaves all that Parameters lie in."""
    files = sorted(folder.glob("*.safetensors"))
    on_disk(folder)
    for file in files:
        file.read_bytes()
    size = sum(file.stat().st_size for file in files)
    assert sum(map(cached, files)) >= size
    weights = [
        weight.detach()
        for weight in load_diffusers(str(folder), {"dtype": torch.float32}).model.diffusion_model.parameters()
    ]
    mapped = [each.addresses for each in memory_of_files() if str(folder) in each.path]
    inside = sum(weight.nbytes for weight in weights if any(weight.data_ptr() in each for each in mapped))
    joined = sum(weight.nbytes for weight in weights) - inside
    assert joined > size / 5 and inside > size / 5
    edges = 4 * mmap.PAGESIZE * len(weights)
    assert inside <= sum(map(cached, files)) < inside + edges < size - joined / 2
    assert resident(folder) < inside + edges
