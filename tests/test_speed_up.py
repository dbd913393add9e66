"""The Speed Up node in a real server: what it says before, during and after a run, here and in workers."""

import copy

import pytest
from graphs import CACHE, SAMPLER, frames, seeded
from skein.demo.run import node_id, without_cache
from skein.demo.video import read_frames

NODE = "SkeinSpeedUp"


def sped_up(prompt, seed, **settings):
    """The demo with Speed Up in the cache's place, and a report of the run."""
    graph = seeded(prompt, seed)
    cache, sampler = node_id(graph, CACHE), node_id(graph, SAMPLER)
    model = graph[cache]["inputs"]["model"]
    graph[cache] = {"class_type": NODE, "inputs": {"model": model, **settings}}
    graph["report"] = {"class_type": "SkeinCacheReport", "inputs": {"model": [cache, 0], "latent": [sampler, 0]}}
    graph["picture"] = {"class_type": "PreviewImage", "inputs": {"images": ["report", 0]}}
    return graph


def run(server, graph):
    """The video, and what Speed Up said in order."""
    events = []
    outputs = server.run(graph, events.append)
    assert "picture" in outputs
    said = [e["data"]["text"] for e in events if e["type"] == "progress_text"]
    return read_frames(server.file(outputs[node_id(graph, "SaveAnimatedWEBP")]["images"][0])), said


def test_a_run_says_what_it_does_and_the_next_one_how_long_it_takes(server, prompt):
    stock = frames(server, without_cache(seeded(prompt, 501)))
    video, said = run(server, sped_up(prompt, 501))
    assert video.shape == stock.shape
    assert said[0].startswith("Attention, First-Block Cache at 0.06: ")
    last = said[-1].splitlines()[0]
    assert last.startswith("Attention, First-Block Cache at 0.06: 6 steps in ") and "each after the first" in last
    _, again = run(server, sped_up(prompt, 502))
    assert "a step, " in again[0] and "in all" in again[0]


def test_other_nodes_override_it(server, prompt):
    graph = sped_up(prompt, 503, preset="exact")
    speed_up = node_id(graph, NODE)
    graph["cache"] = {"class_type": CACHE, "inputs": {"model": [speed_up, 0], "residual_diff_threshold": 0.25}}
    for node in graph.values():
        for name, value in node["inputs"].items():
            if value == [speed_up, 0] and node is not graph["cache"]:
                node["inputs"][name] = ["cache", 0]
    run(server, graph)
    found = server.get("/skein/runs")["runs"][-1]
    assert found["node_id"] == "cache" and found["calls"][0]["threshold"] == 0.25


def test_several_devices(server, prompt):

    def exact(graph):
        graph = copy.deepcopy(graph)
        graph[node_id(graph, NODE)]["inputs"]["preset"] = "exact"
        del graph["report"], graph["picture"]  # nothing is cached
        return graph

    one = frames(server, exact(sped_up(prompt, 504)))
    graph = sped_up(prompt, 504, devices="cpu,cpu")
    try:
        _, said = run(server, graph)
        assert "2 devices: 6 steps in " in said[-1] and "6 model calls: " in said[-1]
        assert "6 calls on cpu, cpu: " in said[-1]  # what the workers were asked
        assert abs(frames(server, exact(graph)) - one).max() <= 2
    finally:
        server.post("/free", {"unload_models": True, "free_memory": True})


@pytest.mark.parametrize(("devices", "sentence"), [("7", "no GPU 7"), ("gpu", "must be .*all")])
def test_devices_that_are_not_there_are_refused_before_anything_runs(server, prompt, devices, sentence):
    from skein.demo.server import PromptError

    with pytest.raises(PromptError, match=sentence):
        server.run(sped_up(prompt, 505, devices=devices))
