"""A real ComfyUI server: the demo workflow, bad input, interrupts. After each, the server goes on."""

import copy
import threading
import time

import pytest
from graphs import CACHE, PROMPT, SAMPLER, STOCK_LOADER, custom_sampling, frames, load_from_list, seeded
from skein.demo import LOADER, MODEL_NAME
from skein.demo.run import node_id, without_cache
from skein.demo.server import PromptError
from skein.demo.video import read_frames
from small_models import save_random_hunyuan3d


def test_the_pack_is_loaded_and_the_checkpoint_is_not_in_the_list_of_models(server):
    info = server.get("/object_info")
    assert {CACHE, LOADER, PROMPT, "SkeinLatentVideoPreview"} <= set(info)
    loader = info[STOCK_LOADER]["input"]["required"]["unet_name"]
    options = loader[0] if isinstance(loader[0], list) else loader[1]["options"]
    assert MODEL_NAME not in options


def test_a_prompt_that_takes_the_embedded_model_from_the_list_goes_on(server, prompt):
    """As the demo did before its model had a loader of its own."""
    before = frames(server, seeded(prompt, 31))
    old = load_from_list(seeded(prompt, 31), MODEL_NAME)
    assert (frames(server, old) == before).all()


def test_the_demo_workflow_runs_and_its_calls_are_reported(server, prompt):
    events = []
    outputs = server.run(prompt, events.append)
    video = read_frames(server.file(outputs[node_id(prompt, "SaveAnimatedWEBP")]["images"][0]))
    assert video.shape == (3, 128, 128, 3)
    steps = [
        e["data"]["value"] for e in events if e["type"] == "progress" and e["data"]["node"] == node_id(prompt, SAMPLER)
    ]
    assert steps[-1] == 6
    run = server.get("/skein/runs")["runs"][-1]
    assert len(run["calls"]) == 6 and run["finished"] and run["node_id"] == node_id(prompt, CACHE)
    assert run["computed"] + run["reused"] == 6


def test_api_workflows_of_versions_with_fewer_inputs_go_on(server, prompt):
    """ComfyUI refuses a prompt that lacks a required input, whatever its default: only links are required."""
    own = {name: node for name, node in server.get("/object_info").items() if name.startswith("Skein")}
    links = {"MODEL", "LATENT", "CLIP", "VAE", "CONDITIONING"}
    required = {
        f"{name}.{each}" for name, node in own.items() for each, (kind, *_) in node["input"]["required"].items()
        if kind not in links
    }  # fmt: skip
    assert required == {"SkeinDemoPrompt.text", "SkeinLoadDiffusersTransformer.model_name"}
    graph = with_all_nodes(prompt)
    cache, sampler = node_id(graph, CACHE), node_id(graph, SAMPLER)
    graph["report"] = {"class_type": "SkeinCacheReport", "inputs": {"model": [cache, 0], "latent": [sampler, 0]}}
    graph["look"] = {"class_type": "SkeinLatentVideoPreview", "inputs": {"model": [cache, 0], "samples": [sampler, 0]}}
    for name, image in (("report", ["report", 0]), ("look", ["look", 0])):
        graph[f"{name}-image"] = {"class_type": "PreviewImage", "inputs": {"images": image}}
    for node in graph.values():
        if node["class_type"] in own and node["class_type"] != PROMPT:
            node["inputs"] = {name: value for name, value in node["inputs"].items() if isinstance(value, list)}
    assert {"report-image", "look-image"} <= set(server.run(graph))


def test_padded_conditioning_runs(server, prompt):
    graph = copy.deepcopy(prompt)
    graph[graph[node_id(graph, SAMPLER)]["inputs"]["positive"][0]]["inputs"]["padded"] = True
    assert frames(server, graph).shape[0] == 3


def change(class_type, **inputs):
    def apply(graph, _folder):
        graph[node_id(graph, class_type)]["inputs"].update(inputs)

    return apply


def unknown_words(graph, _folder):
    graph[graph[node_id(graph, SAMPLER)]["inputs"]["positive"][0]]["inputs"]["text"] = "a dragon flies"


def other_architecture(graph, folder):
    save_random_hunyuan3d(folder / "shape.safetensors")
    load_from_list(graph, "shape.safetensors")


def corrupt_checkpoint(graph, folder):
    (folder / "corrupt.safetensors").write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00 not a header")
    load_from_list(graph, "corrupt.safetensors")


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (unknown_words, "does not know 'dragon', 'flies'"),
        (change(CACHE, start_percent=0.7, end_percent=0.2), "swap the two"),
        (change(CACHE, residual_diff_threshold=7.0), "value_bigger_than_max"),
        (lambda graph, _: load_from_list(graph, "absent.safetensors"), "value_not_in_list"),
        (other_architecture, "does not know the blocks of Hunyuan3Dv2"),
        (corrupt_checkpoint, "header"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_bad_input_gets_a_sentence_and_the_next_prompt_works(server, prompt, spoil, sentence):
    graph = seeded(prompt, 21)
    folder = server.base / "models" / "diffusion_models"
    folder.mkdir(exist_ok=True)
    spoil(graph, folder)
    events = []
    with pytest.raises(PromptError, match=sentence):
        server.run(graph, events.append)
    failed = [event["data"]["node_type"] for event in events if event["type"] == "execution_error"]
    assert SAMPLER not in failed  # it stands at the node that knows
    assert server.alive()
    assert frames(server, seeded(prompt, 22 + int(time.time()) % 1000)).shape[0] == 3


def test_after_an_interrupt_the_next_stock_run_is_bit_equal(server, prompt):
    stock = without_cache(prompt)
    before = frames(server, seeded(stock, 31))
    long = seeded(prompt, 32)
    long[node_id(long, SAMPLER)]["inputs"]["steps"] = 200

    def interrupt_at_step_3(event):
        if event["type"] == "progress" and event["data"]["value"] == 3:
            threading.Thread(target=server.interrupt).start()

    with pytest.raises(PromptError, match="interrupted"):
        server.run(long, interrupt_at_step_3)
    assert not server.get("/skein/runs")["runs"][-1]["finished"]
    frames(server, seeded(stock, 33))  # pushes the run of seed 31 out of ComfyUI's own cache
    assert (frames(server, seeded(stock, 31)) == before).all()


@pytest.mark.parametrize("cfg", [1, 3.0])
def test_sampler_custom_advanced(server, prompt, cfg):
    stock = frames(server, custom_sampling(without_cache(prompt), cfg))
    change(CACHE, residual_diff_threshold=0.0)(prompt, None)
    assert (frames(server, custom_sampling(prompt, cfg)) == stock).all()
    change(CACHE, residual_diff_threshold=0.3)(prompt, None)
    assert (frames(server, custom_sampling(prompt, cfg)) != stock).any()
    assert server.get("/skein/runs")["runs"][-1]["reused"] > 0


ALL_NODES = {
    "SkeinFP8Quantize": {"mode": "per_row", "modulation": True},
    "SkeinAttention": {"kernel": "auto", "trim_text": True, "allow_8bit": False, "exact_steps": 2},
    "SkeinCompile": {"mode": "default", "dynamic": "auto", "warm_up": True},
}


def with_all_nodes(graph):
    """The graph with the other model nodes between the loader and the cache."""
    graph = copy.deepcopy(graph)
    cache = graph[node_id(graph, CACHE)]["inputs"]
    for name, inputs in ALL_NODES.items():
        graph[name] = {"class_type": name, "inputs": {**inputs, "model": cache["model"]}}
        cache["model"] = [name, 0]
    return graph


@pytest.mark.parametrize("cfg", [None, 3.0], ids=["KSampler", "SamplerCustomAdvanced"])
def test_all_nodes_at_once(server, prompt, cfg):
    """Each node says on itself what it did, and the video stays near stock's."""
    change(CACHE, residual_diff_threshold=0.05)(prompt, None)
    graph, stock = with_all_nodes(prompt), without_cache(prompt)
    if cfg:
        graph, stock = custom_sampling(graph, cfg), custom_sampling(stock, cfg)
    events = []
    video = frames(server, graph, events.append)
    assert abs(video - frames(server, stock)).mean() < 0.03
    said = {e["data"]["node"]: e["data"]["text"] for e in events if e["type"] == "progress_text"}
    assert "MB" in said["SkeinFP8Quantize"] and "compiled" in said["SkeinCompile"] and "runs" in said["SkeinAttention"]
