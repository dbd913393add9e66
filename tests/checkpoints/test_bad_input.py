"""What is wrong with a folder is said in a sentence that names the file; nothing is loaded."""

import json
import shutil

import pytest
import torch
from judge import CASES, random_network, save_in_shards
from safetensors.torch import load_file, save_file
from skein.checkpoints.loading import load_diffusers


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    save_in_shards(random_network(CASES["HunyuanVideo"]), folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "model")


def shards(folder):
    return sorted(folder.glob("*-of-*.safetensors"))


def index(folder):
    return next(folder.glob("*.index.json"))


def change_json(file, change):
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def change_shard(folder, change):
    weights = load_file(shards(folder)[0])
    change(weights)
    save_file(weights, shards(folder)[0])


def no_weights(folder):
    for file in [*shards(folder), index(folder)]:
        file.unlink()


def pickled(folder):
    no_weights(folder)
    torch.save({}, folder / "diffusion_pytorch_model.bin")


def missing_shard(folder):
    shards(folder)[1].unlink()


def broken_link(folder):
    shards(folder)[1].unlink()
    shards(folder)[0].with_name(shards(folder)[0].name.replace("00001", "00002")).symlink_to(folder / "gone")


def missing_index(folder):
    index(folder).unlink()


def index_without_map(folder):
    index(folder).write_text("{}")


def index_cut_off(folder):
    index(folder).write_text('{"weight_map": {"x_emb')


def index_of_a_file_elsewhere(folder):
    change_json(index(folder), lambda content: content["weight_map"].update({"a": "../../x.safetensors"}))


def index_with_a_key_too_many(folder):
    change_json(index(folder), lambda content: content["weight_map"].update(gone=shards(folder)[0].name))


def truncated(folder):
    data = shards(folder)[0].read_bytes()
    shards(folder)[0].write_bytes(data[:-1000])


def not_safetensors(folder):
    shards(folder)[0].write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00 not a header   ")


def empty_file(folder):
    shards(folder)[0].write_bytes(b"")


def git_lfs_pointer(folder):
    shards(folder)[0].write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")


def config_of_another_class(folder):
    change_json(folder / "config.json", lambda content: content.update(_class_name="HunyuanVideo15Transformer3DModel"))


def config_with_more_blocks(folder):
    change_json(folder / "config.json", lambda content: content.update(num_layers=20))


def config_that_is_a_list(folder):
    (folder / "config.json").write_text("[]")


def keys_of_another_model(folder):
    (folder / "config.json").unlink()
    change_shard(folder, lambda weights: weights.update(strange=torch.zeros(2)))
    change_json(index(folder), lambda content: content["weight_map"].update(strange=shards(folder)[0].name))


def class_that_nobody_knows(folder):
    change_json(folder / "config.json", lambda content: content.update(_class_name="AllegroTransformer3DModel"))


def take_out(folder, key):
    weights = json.loads(index(folder).read_text())["weight_map"]
    file = folder / weights[key]
    left = load_file(file)
    del left[key]
    save_file(left, file)
    change_json(index(folder), lambda content: content["weight_map"].pop(key))


def part_of_a_weight(folder):
    take_out(folder, "transformer_blocks.1.attn.to_k.weight")


def without_a_weight(folder):
    take_out(folder, "transformer_blocks.1.ff.net.2.weight")


def pipeline_without_a_transformer(folder):
    (folder / "model_index.json").write_text("{}")


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (no_weights, r"model has no \.safetensors files; choose a folder"),
        (pickled, r"diffusion_pytorch_model\.bin, which can hold code and is not read; download"),
        (missing_shard, r"model-00002-of-0000\d\.safetensors is missing, which .*index\.json names; download it"),
        (broken_link, r"model-00002-of-0000\d\.safetensors is missing"),
        (missing_index, r"one of several parts of a model, and their index .* is missing"),
        (index_without_map, r"index\.json is not an index .* it has no weight_map; download it again"),
        (index_cut_off, r"index\.json is not JSON"),
        (index_of_a_file_elsewhere, r"index\.json names \.\./\.\./x\.safetensors, which is not a .* in its folder"),
        (index_with_a_key_too_many, r"00001-of.* does not have gone, which .*index\.json says; download both again"),
        (truncated, r"00001-of.* has \d+ bytes and should have \d+: it is incomplete; download it again"),
        (not_safetensors, r"00001-of.* is not a safetensors file, or its beginning is broken"),
        (empty_file, r"00001-of.* is not a safetensors file, or its beginning is broken"),
        (git_lfs_pointer, r"00001-of.* is a pointer of Git LFS.*run \"git lfs pull\""),
        (config_of_another_class, r"config\.json says HunyuanVideo15.*which has no .* another model's"),
        (config_with_more_blocks, r"config\.json says 20 num_layers, and the weights beside it have 2"),
        (config_that_is_a_list, r"config\.json is not a JSON object"),
        (keys_of_another_model, r"ComfyUI does not know the model in .*model \(no config\.json"),
        (class_that_nobody_knows, r"model \(AllegroTransformer3DModel\).*Skein has no map.*HunyuanVideoTransformer3DM"),
        (part_of_a_weight, r"transformer_blocks\.1\.attn\.to_q\.weight.* is there, but not .*download the model again"),
        (without_a_weight, r"lacks 1 of HunyuanVideo's weights, double_blocks\.1\.img_mlp\.2\.weight for one"),
        (pipeline_without_a_transformer, r"is a pipeline without a folder named transformer"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_there_is_a_sentence(folder, spoil, sentence):
    spoil(folder)
    with pytest.raises(ValueError, match=sentence) as raised:
        load_diffusers(str(folder))
    assert "\n" not in str(raised.value) and str(raised.value).endswith(".")


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match=r"absent is not there\."):
        load_diffusers(str(tmp_path / "absent"))
