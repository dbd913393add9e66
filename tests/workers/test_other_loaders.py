"""Loaders of other packs before our nodes, in a real ComfyUI server: ComfyUI-GGUF's and KJNodes'.

SKEIN_TEST_PACKS names a folder that holds ComfyUI-GGUF and ComfyUI-KJNodes as they are cloned.
"""

import os
from pathlib import Path

import forms
import numpy as np
import pytest
from graphs import CACHE, frames, seeded
from skein.demo import LOADER
from skein.demo.run import in_workers, node_id, without_cache
from skein.demo.server import ComfyServer, comfyui_path

PACKS = ("ComfyUI-GGUF", "ComfyUI-KJNodes")
CPUS = "cpu,cpu"
KJ = {"model_name": "bf16.safetensors", "weight_dtype": "default", "compute_dtype": "default"}
KJ |= {"patch_cublaslinear": False, "sage_attention": "disabled", "enable_fp16_accumulation": False}
LOADERS = {
    "UnetLoaderGGUF": {"unet_name": "q8_0.gguf"},
    "UnetLoaderGGUFAdvanced": {
        "unet_name": "q4_k.gguf", "dequant_dtype": "float32", "patch_dtype": "default", "patch_on_device": False
    },
    "DiffusionModelLoaderKJ": KJ,
}  # fmt: skip
TECHNIQUES = {  # inputs, and how far the video may be from the one without (mean absolute difference, of 1)
    "SkeinFirstBlockCache": ({"residual_diff_threshold": 0.1, "start_percent": 0.0, "end_percent": 1.0}, 0.03),
    "SkeinAttention": ({}, 0.002),
    "SkeinCompile": ({}, 0.002),
}


def folder_of_packs():
    folder = os.environ.get("SKEIN_TEST_PACKS")
    if not folder or not all((Path(folder) / name).is_dir() for name in PACKS):
        pytest.skip(f"SKEIN_TEST_PACKS names no folder with {' and '.join(PACKS)}")
    return Path(folder)


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    """A server with these packs, and the demo model as they read it."""
    packs, folder = folder_of_packs(), tmp_path_factory.mktemp("others")
    (folder / "packs").mkdir()
    for name in PACKS:
        (folder / "packs" / name).symlink_to(packs / name)
    forms.write_q8_0(folder / "q8_0.gguf")
    forms.write_q4_k(folder / "q4_k.gguf")
    forms.write_bf16(folder / "bf16.safetensors")
    (folder / "paths.yaml").write_text(f"others:\n  custom_nodes: {folder}/packs\n  diffusion_models: {folder}\n")
    with ComfyServer(comfyui_path(), ("--extra-model-paths-config", str(folder / "paths.yaml"))) as server:
        yield server


def loaded_by(prompt, loader):
    prompt[node_id(prompt, LOADER)] = {"class_type": loader, "inputs": dict(LOADERS[loader])}
    return prompt


def with_nodes(prompt, *names):
    """The prompt with some of our nodes, between the loader and the cache."""
    cache = prompt[node_id(prompt, CACHE)]["inputs"]
    for name in names:
        prompt[name] = {"class_type": name, "inputs": {**TECHNIQUES[name][0], "model": cache["model"]}}
        cache["model"] = [name, 0]
    return prompt


def difference(first, second):
    return float(np.abs(first.astype(float) - second).mean())


@pytest.fixture(scope="module")
def alone(others):
    """A loader's video without our nodes."""
    known = {}

    def video(prompt, loader):
        if loader not in known:
            known[loader] = frames(others, without_cache(loaded_by(seeded(prompt, 5), loader)))
        return known[loader]

    return video


def test_the_packs_are_there(others):
    there = others.get("/object_info")
    assert LOADERS.keys() <= there.keys()


@pytest.mark.parametrize("loader", LOADERS)
def test_the_loaders_model_is_the_demo_model(others, prompt, alone, loader):
    stock = frames(others, without_cache(seeded(prompt, 5)))
    assert difference(alone(prompt, loader), stock) < (0.02 if "Advanced" in loader else 0.005)


@pytest.mark.parametrize("technique", ["SkeinAttention", "SkeinCompile"])
@pytest.mark.parametrize("loader", LOADERS)
def test_one_technique(others, prompt, alone, loader, technique):
    video = frames(others, without_cache(with_nodes(loaded_by(seeded(prompt, 5), loader), technique)))
    assert difference(video, alone(prompt, loader)) < TECHNIQUES[technique][1]


@pytest.mark.parametrize("loader", LOADERS)
def test_workers_load_it_too(others, prompt, alone, loader):
    """By the node's function that a recipe names, or by the node; the pack is imported in them."""
    events = []
    video = frames(others, without_cache(in_workers(loaded_by(seeded(prompt, 5), loader), CPUS)), events.append)
    assert difference(video, alone(prompt, loader)) < 0.001
    assert any("calls on cpu, cpu" in event.get("data", {}).get("text", "") for event in events)


@pytest.mark.parametrize("loader", ["UnetLoaderGGUF", "DiffusionModelLoaderKJ"])
def test_all_techniques_at_once(others, prompt, alone, loader):
    graph = with_nodes(loaded_by(seeded(prompt, 5), loader), "SkeinAttention", "SkeinCompile")
    graph[node_id(graph, CACHE)]["inputs"].update(TECHNIQUES[CACHE][0])
    cached = frames(others, graph)
    reused = others.get("/skein/runs")["runs"][-1]["reused"]
    shared = frames(others, in_workers(graph, CPUS))
    assert reused == others.get("/skein/runs")["runs"][-1]["reused"] > 0
    assert difference(shared, cached) < 0.002
    assert difference(cached, alone(prompt, loader)) < TECHNIQUES[CACHE][1]
