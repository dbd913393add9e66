"""Prompts for a real server: the demo workflow and what tests change in it."""

import copy

from skein.demo import LOADER
from skein.demo.run import node_id, without_cache
from skein.demo.video import read_frames

CACHE, SAMPLER, STOCK_LOADER, PROMPT = "SkeinFirstBlockCache", "KSampler", "UNETLoader", "SkeinDemoPrompt"


def frames(server, graph, on_event=None):
    outputs = server.run(graph, on_event)
    return read_frames(server.file(outputs[node_id(graph, "SaveAnimatedWEBP")]["images"][0]))


def seeded(graph, seed):
    """A copy with another seed: ComfyUI answers an unchanged prompt from its own cache."""
    graph = copy.deepcopy(graph)
    graph[node_id(graph, SAMPLER)]["inputs"]["seed"] = seed
    return graph


def load_from_list(graph, name):
    """Have ComfyUI's own loader take the model from a file of its list; returns the same graph."""
    inputs = {"unet_name": name, "weight_dtype": "default"}
    graph[node_id(graph, LOADER)] = {"class_type": STOCK_LOADER, "inputs": inputs}
    return graph


def with_sparse(graph, cached, **settings):
    """A copy with sparse attention before the cache or in its place, and tokens enough that choosing blocks takes less
    than dense attention."""
    graph = copy.deepcopy(graph)
    cache = node_id(graph, CACHE)
    graph[node_id(graph, "EmptyHunyuanLatentVideo")]["inputs"].update(width=320, height=320)
    inputs = {"model": graph[cache]["inputs"]["model"], "max_error": 0.2, "min_tokens": 1, **settings}
    graph["sparse"] = {"class_type": "SkeinSparseAttention", "inputs": inputs}
    graph[cache]["inputs"]["model"] = ["sparse", 0]
    return graph if cached else without_cache(graph)


def custom_sampling(graph, cfg):
    """The same graph with SamplerCustomAdvanced, and a guider for `cfg`, in the KSampler's place."""
    graph = copy.deepcopy(graph)
    sampler = node_id(graph, SAMPLER)
    old = graph[sampler]["inputs"]
    graph["noise"] = {"class_type": "RandomNoise", "inputs": {"noise_seed": old["seed"]}}
    graph["select"] = {"class_type": "KSamplerSelect", "inputs": {"sampler_name": "dpmpp_2m"}}
    schedule = {"model": old["model"], "scheduler": "simple", "steps": old["steps"], "denoise": 1.0}
    graph["sigmas"] = {"class_type": "BasicScheduler", "inputs": schedule}
    if cfg == 1:
        guider = {"class_type": "BasicGuider", "inputs": {"model": old["model"], "conditioning": old["positive"]}}
    else:
        sides = {"positive": old["positive"], "negative": old["negative"]}
        guider = {"class_type": "CFGGuider", "inputs": {"model": old["model"], "cfg": cfg, **sides}}
    graph["guider"] = guider
    links = {"noise": ["noise", 0], "guider": ["guider", 0], "sampler": ["select", 0], "sigmas": ["sigmas", 0]}
    graph[sampler] = {
        "class_type": "SamplerCustomAdvanced",
        "inputs": {**links, "latent_image": old["latent_image"]},
    }
    return graph
