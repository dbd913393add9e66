"""The same model is found in every place where people have it."""

import os
import shutil

import pytest
import torch
from judge import CASES, random_network, save_in_shards
from safetensors.torch import load_file, save_file
from skein.checkpoints.folder import is_checkpoint
from skein.checkpoints.loading import load_diffusers
from skein.files import files_of, require_unchanged

NAME = "diffusion_pytorch_model"


@pytest.fixture(scope="module")
def network():
    return random_network(CASES["HunyuanVideo"])


@pytest.fixture(scope="module")
def saved(network, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    save_in_shards(network, folder)
    return folder


def a_folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "model")


def a_pipeline(saved, tmp_path):
    (tmp_path / "model_index.json").write_text("{}")
    shutil.copytree(saved, tmp_path / "transformer")
    return tmp_path


def an_index(saved, tmp_path):
    return next(saved.glob("*.index.json"))


def a_shard(saved, tmp_path):
    return sorted(saved.glob("*-of-*"))[1]


def one_file(saved, tmp_path):
    weights = {key: weight for shard in saved.glob("*-of-*") for key, weight in load_file(shard).items()}
    save_file(weights, tmp_path / "any name.safetensors")
    return tmp_path / "any name.safetensors"


def a_folder_with_one_file_and_no_config(saved, tmp_path):
    return one_file(saved, tmp_path).parent


def a_variant(saved, tmp_path):
    one_file(saved, tmp_path).rename(tmp_path / f"{NAME}.fp16.safetensors")
    return tmp_path


def a_variant_in_shards(saved, tmp_path):
    folder = a_folder(saved, tmp_path)
    index = next(folder.glob("*.index.json"))
    text = index.read_text()
    for shard in folder.glob("*-of-*"):
        name = shard.name.replace(".safetensors", ".fp16.safetensors")
        text = text.replace(shard.name, name)
        shard.rename(folder / name)
    index.unlink()
    (folder / f"{NAME}.safetensors.index.fp16.json").write_text(text)
    return folder


def no_variant_beside_a_variant(saved, tmp_path):
    folder = a_pipeline(saved, tmp_path)
    (folder / "transformer" / f"{NAME}.fp16.safetensors").write_text("not read")
    return folder


def letters_that_are_not_ascii(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "模型 mit Ümlaut")


def read_only_files(saved, tmp_path):
    folder = a_folder(saved, tmp_path)
    for file in folder.iterdir():
        file.chmod(0o444)
    return folder


def the_hubs_cache(saved, tmp_path):
    """Links from names to blobs; a repository with two snapshots, of which refs/main names the older one."""
    repository = tmp_path / "models--tencent--HunyuanVideo"
    snapshot = repository / "snapshots" / "aaaa" / "transformer"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for i, file in enumerate(saved.iterdir()):
        shutil.copy(file, repository / "blobs" / f"{i:x}")
        (snapshot / file.name).symlink_to(os.path.relpath(repository / "blobs" / f"{i:x}", snapshot))
    (repository / "snapshots" / "bbbb").mkdir()
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("aaaa\n")
    return repository


def a_snapshot(saved, tmp_path):
    return the_hubs_cache(saved, tmp_path) / "snapshots" / "aaaa"


@pytest.mark.parametrize(
    "form",
    [
        a_folder, a_pipeline, an_index, a_shard, one_file, a_folder_with_one_file_and_no_config, a_variant,
        a_variant_in_shards, no_variant_beside_a_variant, letters_that_are_not_ascii, read_only_files,
        the_hubs_cache, a_snapshot,
    ],
    ids=lambda form: form.__name__,
)  # fmt: skip
def test_the_model_is_found(network, saved, tmp_path, form):
    path = form(saved, tmp_path)
    loaded = load_diffusers(str(path)).model.diffusion_model
    assert torch.equal(loaded.double_blocks[1].img_mlp[2].weight, network.transformer_blocks[1].ff.net[2].weight)
    q = network.single_transformer_blocks[1].attn.to_q.weight
    assert torch.equal(loaded.single_blocks[1].linear1.weight[: len(q)], q)


def test_what_is_listed(saved, tmp_path):
    pipeline = a_pipeline(saved, tmp_path)
    assert is_checkpoint(pipeline) and is_checkpoint(pipeline / "transformer") and is_checkpoint(saved)
    unet = tmp_path / "stable-diffusion"
    (unet / "unet").mkdir(parents=True)
    (unet / "model_index.json").write_text("{}")
    assert not is_checkpoint(unet) and not is_checkpoint(unet / "unet")


def test_all_files_of_a_model_are_watched(saved, tmp_path):
    folder = a_folder(saved, tmp_path)
    patcher = load_diffusers(str(folder))
    assert {os.path.basename(file["path"]) for file in files_of(patcher)} == {each.name for each in folder.iterdir()}
    require_unchanged(patcher, "a test")
    last = sorted(folder.glob("*-of-*"))[-1]
    data = bytearray(last.read_bytes())
    data[-1] ^= 1
    last.write_bytes(data)
    with pytest.raises(ValueError, match=f"{last.name} has changed on disk"):
        require_unchanged(patcher, "a test")


def test_it_can_be_loaded_again(saved):
    patcher = load_diffusers(str(saved), {"dtype": torch.bfloat16})
    function, arguments = patcher.cached_patcher_init
    again = function(*arguments, disable_dynamic=True)
    assert again.model.get_dtype() == torch.bfloat16
    weights = again.model.state_dict()
    assert all(torch.equal(weight, weights[key]) for key, weight in patcher.model.state_dict().items())
