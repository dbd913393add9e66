"""The demo model in every form is the demo model: the same weights, the same video on a real server."""

import copy

import pytest
import torch
from diffusers_forms import FORMS, diffusers_folder
from forms import demo_weights
from graphs import CACHE, frames, seeded
from skein.checkpoints.loading import load_diffusers
from skein.demo import LOADER
from skein.demo.run import node_id
from skein.demo.server import PromptError

NODE, NAME = "SkeinLoadDiffusersTransformer", "demo"


@pytest.mark.parametrize("form", FORMS)
def test_the_weights_are_the_same(tmp_path, form):
    loaded = load_diffusers(str(FORMS[form](tmp_path))).model.diffusion_model.state_dict()
    own = demo_weights()
    assert set(loaded) == set(own)
    assert all(torch.equal(loaded[key], weight.to(loaded[key].dtype)) for key, weight in own.items())


def loaded_by_the_node(graph, **inputs):
    graph = copy.deepcopy(graph)
    graph[node_id(graph, LOADER)] = {"class_type": NODE, "inputs": {"model_name": NAME, **inputs}}
    return graph


@pytest.fixture(scope="module")
def folder(server):
    return diffusers_folder(server.base / "models" / "diffusers" / NAME)


def listed(server):
    options = server.get("/object_info")[NODE]["input"]["required"]["model_name"]
    return options[0] if isinstance(options[0], list) else options[1]["options"]


def test_a_server_lists_the_folder_and_makes_the_same_video(server, prompt, folder):
    assert listed(server) == [NAME]
    prompt[node_id(prompt, CACHE)]["inputs"]["residual_diff_threshold"] = 0.3
    expected = frames(server, seeded(prompt, 51))
    found = frames(server, loaded_by_the_node(seeded(prompt, 51)))
    assert (found == expected).all()
    assert server.get("/skein/runs")["runs"][-1]["reused"] > 0


def test_a_server_loads_it_again_when_a_file_changes_and_says_what_is_missing(server, prompt, folder):
    before = frames(server, loaded_by_the_node(seeded(prompt, 52)))
    shard = sorted((folder / "transformer").glob("*-of-*"))[1]
    content = shard.read_bytes()
    shard.unlink()
    with pytest.raises(PromptError, match=f"{shard.name} is missing, which .* names; download it"):
        server.run(loaded_by_the_node(seeded(prompt, 53)))
    with pytest.raises(PromptError, match="value_not_in_list"):
        server.run(loaded_by_the_node(prompt, model_name="../demo"))
    shard.write_bytes(content)
    assert (frames(server, loaded_by_the_node(seeded(prompt, 52))) == before).all()
    shard.write_bytes(content[:-2] + bytes(2))  # one weight
    runs = len(server.get("/skein/runs")["runs"])
    frames(server, loaded_by_the_node(seeded(prompt, 52)))
    assert len(server.get("/skein/runs")["runs"]) == runs + 1
    shard.write_bytes(content)


def test_weight_dtype(server, prompt, folder):
    events = []
    frames(server, loaded_by_the_node(seeded(prompt, 54), weight_dtype="fp8_e4m3fn"), events.append)
    assert "model weight dtype torch.float8_e4m3fn" in server.log.read_text()
