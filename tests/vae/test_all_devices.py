"""Devices "all" where they cannot share a decode: ComfyUI's own process does what VAE Decode does. Only devices that
were named are refused, before the sampling where the VAE is enough to know it.

There are no GPUs here. "all" takes the devices of workers that run, so two workers on the CPU stand for them.
"""

import copy
from types import SimpleNamespace

import comfy.sd
import pytest
import torch
import vaes
from comfy.ldm.audio.autoencoder import AudioOobleckVAE
from comfy.ldm.models.autoencoder import AutoencodingEngine
from graphs import CACHE, SAMPLER
from skein.demo.run import node_id
from skein.demo.server import PromptError
from skein.nodes.vae import VAEDecodeNode
from skein.plan import DecodeConfig
from skein.vae.decode import decode
from skein.workers import group, release

import nodes

SIZES = dict(tile_size=128, overlap=32, temporal_size=8, temporal_overlap=4)
IMAGE_2_1 = {
    "block_out_channels": [128, 256, 512, 512, 1024, 1024], "in_channels": 3, "out_channels": 3, "num_res_blocks": 2,
    "ffactor_spatial": 32, "downsample_match_channel": True, "upsample_match_channel": True, "z_channels": 64,
}  # fmt: skip


def hunyuan_image():
    """HunyuanImage 2.1's VAE of its real size, with random weights, as ComfyUI detects it."""
    room = "comfy.ldm.hunyuan_video.vae"
    model = AutoencodingEngine(
        regularizer_config={"target": "comfy.ldm.models.autoencoder.DiagonalGaussianRegularizer"},
        encoder_config={"target": f"{room}.Encoder", "params": IMAGE_2_1},
        decoder_config={"target": f"{room}.Decoder", "params": IMAGE_2_1},
    )
    vae = comfy.sd.VAE(sd=vaes.randomized(model).state_dict())
    assert vae.latent_dim == 2 and vae.latent_channels == 64
    return vae, torch.randn(1, 64, 2, 3)


def sound():
    return comfy.sd.VAE(sd=vaes.randomized(AudioOobleckVAE()).state_dict()), torch.randn(1, 64, 3)


def tiles_by_itself():
    """A video VAE that ComfyUI cannot cut, as SeedVR2's says of itself."""
    vae = vaes.vae()
    vae.handles_tiling = True
    vae.first_stage_model.decoder.head.append(torch.nn.BatchNorm3d(3).eval())  # no decoder of a known form
    return vae, vaes.latent("Wan 2.1", (1, 2, 3, 4))


def patched():
    vae = vaes.vae()
    name = "decoder.conv1.weight"
    weight = vae.first_stage_model.state_dict()[name]
    assert vae.patcher.add_patches({name: (torch.randn_like(weight),)}, 0.5)
    return vae, vaes.latent("Wan 2.1", (1, 2, 3, 4))


def not_built_from_weights():
    """A VAE of which ComfyUI makes another when it has its weights only."""
    vae = vaes.vae()
    vae.first_stage_model.register_buffer("of_another_pack", torch.ones(2))
    return vae, vaes.latent("Wan 2.1", (1, 2, 3, 4))


def narrow():
    return vaes.vae(), vaes.latent("Wan 2.1", (1, 2, 1, 1))


REFUSED = [
    (hunyuan_image, "auto", "single images"),
    (hunyuan_image, "tiled", "single images"),
    (sound, "auto", "sound"),
    (tiles_by_itself, "auto", "tiles by itself"),
    (tiles_by_itself, "whole", "tiles by itself"),
    (patched, "auto", "patched VAE"),
    (not_built_from_weights, "auto", "from its weights alone"),
    (narrow, "whole", "too few"),
]


@pytest.fixture(scope="module", autouse=True)
def two_workers():
    """What "all" means here."""
    vae, latent = vaes.vae(), vaes.latent("Wan 2.1", (1, 2, 3, 4))
    with torch.inference_mode():
        decode(vae, latent, DecodeConfig(devices="cpu,cpu"))
    yield
    release()


@pytest.mark.parametrize(("make", "mode", "sentence"), REFUSED, ids=lambda value: getattr(value, "__name__", value))
def test_all_falls_back_to_comfyuis_process_and_only_named_devices_are_refused(make, mode, sentence, monkeypatch):
    monkeypatch.setattr(VAEDecodeNode, "hidden", SimpleNamespace(unique_id=None))
    vae, latent = make()
    samples = {"samples": latent}
    stock = (
        nodes.VAEDecodeTiled().decode(vae, samples, **SIZES)
        if mode == "tiled"
        else nodes.VAEDecode().decode(vae, samples)
    )[0]
    workers = group._group
    for _ in range(2):
        frames = VAEDecodeNode.execute(samples, vae, mode=mode, devices="all", **SIZES)[0]
        assert frames.shape == stock.shape and (frames - stock).abs().max() < 1e-4
        assert torch.equal(frames, stock) or make is narrow  # which is decoded with the faster layers
    with pytest.raises(ValueError, match=sentence):
        decode(vae, latent, DecodeConfig(mode, "cpu,cpu", **SIZES))
    assert group._group is workers and workers.alive  # whom nothing of this has ended
    wan, video = vaes.vae(), vaes.latent("Wan 2.1", (1, 2, 3, 4))
    assert (decode(wan, video, DecodeConfig(devices="all")) - wan.decode(video)).abs().max() < 1e-4
    assert group._group is workers


def prompt_with(graph, devices, vae_name="pixel_space"):
    """The demo workflow, its latent decoded by our node with a VAE of images that ComfyUI has without a file."""
    graph = copy.deepcopy(graph)
    model = graph[node_id(graph, CACHE)]["inputs"]["model"]
    sampler = node_id(graph, SAMPLER)
    graph[sampler]["inputs"]["model"] = model
    wanted = {sampler}
    todo = [sampler]
    while todo:
        for value in graph[todo.pop()]["inputs"].values():
            if isinstance(value, list) and value[0] not in wanted:
                wanted.add(value[0])
                todo.append(value[0])
    graph = {name: node for name, node in graph.items() if name in wanted}
    graph["vae"] = {"class_type": "VAELoader", "inputs": {"vae_name": vae_name}}
    links = {"samples": [sampler, 0], "vae": ["vae", 0]}
    graph["decode"] = {
        "class_type": "SkeinVAEDecodeParallel",
        "inputs": {**links, "mode": "auto", "devices": devices, **SIZES},
    }
    graph["save"] = {"class_type": "PreviewImage", "inputs": {"images": ["decode", 0]}}
    return graph, sampler


def run(server, graph):
    """The sentence that a prompt ends with, and the nodes that have begun."""
    begun = []

    def note(event):
        if event["type"] == "executing":
            begun.append(event["data"]["node"])

    with pytest.raises(PromptError) as error:
        server.run(graph, note)
    return str(error.value), begun


def test_named_devices_that_cannot_share_the_vae_are_refused_before_the_sampling(server, prompt):
    graph, sampler = prompt_with(prompt, "cpu,cpu")
    told, begun = run(server, graph)
    assert "single images" in told and "\n" not in told
    assert "vae" in begun and sampler not in begun


def test_devices_that_are_not_there_are_refused_when_the_prompt_is_queued(server, prompt):
    for devices, sentence in (("0,7", "no GPU 0, 7 here"), ("gpu", "GPU numbers such as"), ("1,1", "twice")):
        told, begun = run(server, prompt_with(prompt, devices)[0])
        assert sentence in told and "decode" in told and not begun
