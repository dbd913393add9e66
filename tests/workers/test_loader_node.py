"""The node that has loaded a model, run again in the workers: in a real ComfyUI server, with packs that have no more
than what other packs' loaders have (loader_packs/)."""

import copy
from pathlib import Path

import forms
import pytest
from graphs import frames, load_from_list, seeded
from skein.demo import LOADER
from skein.demo.run import in_workers, node_id, without_cache
from skein.demo.server import ComfyServer, PromptError, comfyui_path

PACKS = Path(__file__).parent / "loader_packs"
CPUS = "cpu,cpu"
NAME = "demo.safetensors"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder with the demo model, which ComfyUI finds by a file of extra paths."""
    folder = tmp_path_factory.mktemp("models")
    forms.write_bf16(folder / NAME)
    return folder


@pytest.fixture(scope="module")
def packed(models):
    (models / "paths.yaml").write_text(f"others:\n  custom_nodes: {PACKS}\n  diffusion_models: {models}\n")
    with ComfyServer(comfyui_path(), ("--extra-model-paths-config", str(models / "paths.yaml"))) as server:
        yield server


def shared(prompt, loader, output=0, between=None, **inputs):
    """The demo prompt in workers, behind another loader, whose model is that output, with a node between."""
    graph = in_workers(seeded(prompt, 5), CPUS)
    name = node_id(graph, LOADER)
    graph[name] = {"class_type": loader, "inputs": inputs or {"name": NAME}}
    for node in graph.values():
        node["inputs"] |= {key: [name, output] for key, value in node["inputs"].items() if value == [name, 0]}
    if between:
        graph["between"] = {"class_type": between[0], "inputs": {**between[1], "model": [name, output]}}
        graph["parallel"]["inputs"]["model"] = ["between", 0]
    return without_cache(graph)


@pytest.fixture(scope="module")
def stock():
    return {}


@pytest.mark.parametrize(("loader", "output"), [("OwnLoader", 1), ("OwnLoaderV3", 0)])
def test_a_loader_without_a_function_is_run_again(packed, prompt, stock, loader, output):
    if not stock:
        stock["video"] = frames(packed, without_cache(load_from_list(seeded(prompt, 5), NAME)))
    events = []
    video = frames(packed, shared(prompt, loader, output), events.append)
    assert abs(video - stock["video"]).max() < 2 / 255
    assert any("calls on cpu, cpu" in event.get("data", {}).get("text", "") for event in events)


def test_nodes_that_change_nothing_but_the_patcher_may_stand_between(packed, prompt):
    between = "ModelSamplingSD3", {"shift": 3.0}
    graph = shared(prompt, "OwnLoader", 1, between)
    alone = copy.deepcopy(graph)
    alone[node_id(graph, "KSampler")]["inputs"]["model"] = ["between", 0]
    del alone["parallel"]
    assert abs(frames(packed, graph) - frames(packed, alone)).max() < 2 / 255


def a_link(graph):
    graph["name"] = {"class_type": "OwnLoader", "inputs": {"name": NAME}}
    graph[node_id(graph, "OwnLoaderByPath")]["inputs"]["path"] = ["name", 0]


def a_merge(graph):
    inputs = {"model1": graph["parallel"]["inputs"]["model"], "model2": graph["parallel"]["inputs"]["model"]}
    graph["merge"] = {"class_type": "ModelMergeSimple", "inputs": {**inputs, "ratio": 0.5}}
    graph["parallel"]["inputs"]["model"] = ["merge", 0]


@pytest.mark.parametrize(
    ("how", "spoil", "sentence"),
    [
        (
            ("OwnLoaderByPath",),
            a_link,
            "input path of the node OwnLoaderByPath, which loads it, comes from another node",
        ),
        (
            ("OwnLoader", 1),
            a_merge,
            "two models meet in the node ModelMergeSimple|merged this model with another model",
        ),
        (
            ("OwnLoader", 1, ("SecondModel", {"name": NAME})),
            None,
            "OwnLoader gives another model in Context Parallel's",
        ),
        (("OnlyHere",), None, "cannot import the node pack only_here.py, .*its library is not for worker processes"),
    ],
    ids=["link", "merge", "second model", "import"],
)
def test_what_cannot_be_loaded_again_gets_a_sentence(packed, prompt, how, spoil, sentence):
    graph = shared(prompt, *how)
    if spoil:
        spoil(graph)
    with pytest.raises(PromptError, match=sentence):
        packed.run(graph)
    assert packed.alive()
    assert frames(packed, shared(prompt, "OwnLoader", 1)).shape[0] == 3


def test_a_file_that_the_node_reads_is_watched(packed, prompt, models):
    """Its identity is noted from the node's inputs: workers would read another file than ComfyUI has."""
    name = "other.safetensors"
    forms.write_bf16(models / name)
    graph = shared(prompt, "OwnLoader", 1, name=name)
    del graph["parallel"]
    graph["cache"] = {"class_type": "SkeinAttention", "inputs": {"model": [node_id(graph, "OwnLoader"), 1]}}
    graph[node_id(graph, "KSampler")]["inputs"]["model"] = ["cache", 0]
    frames(packed, graph)
    forms.write_fp8_e4m3fn(models / name)
    with pytest.raises(PromptError, match=f"{name} has changed on disk since ComfyUI loaded it"):
        packed.run(shared(prompt, "OwnLoader", 1, name=name))
