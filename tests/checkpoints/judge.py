"""diffusers judges what is loaded from its format: its own class with random weights, saved in shards, and the same
weights in ComfyUI's class give the same output.

A row of CASES is a model. Conventions of timestep, guidance and text are the row's: it writes the inputs of both.
"""

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import comfy.model_detection
import diffusers
import torch
from skein.attention.text import without_padding
from skein.checkpoints.loading import load_diffusers
from torch import Tensor, nn

logging.getLogger("diffusers").setLevel(logging.ERROR)

Given = dict[str, Any]  # arguments of a network's forward


@dataclass(frozen=True)
class Case:
    """One model.

    network: diffusers' class. config: its arguments.
    inputs: what both networks are given, diffusers' first; the same each time it is called.
    output: diffusers' output as ComfyUI's network has it.
    cut: text that the mask hides is cut off before ComfyUI's network runs, as Skein's Attention does.
    since: ComfyUI's first version that has the model, as (0, 18, 2).
    pipeline: the class of the pipeline that it is a part of.
    bound: how far off the output may be, of its norm.
    fit: changes diffusers' network where ComfyUI's has a size that the config cannot ask for.
    sizes: what ComfyUI's detection takes for granted of released models, as it is in this one.
    """

    network: str
    config: dict[str, Any]
    inputs: Callable[[], tuple[Given, Given]]
    output: Callable[[Tensor], Tensor] = field(default=lambda output: output)
    cut: bool = False
    since: tuple[int, ...] = ()
    pipeline: str = ""
    bound: float = 1e-5
    fit: Callable[[nn.Module], None] | None = None
    sizes: dict[str, Any] = field(default_factory=dict)


def random_network(case: Case, seed: int = 0) -> nn.Module:
    """diffusers' network with weights that all matter, norms and biases too."""
    torch.manual_seed(seed)
    network = getattr(diffusers, case.network)(**case.config)
    if case.fit:
        case.fit(network)
    network.eval().requires_grad_(False)
    for name, weight in network.named_parameters():
        if weight.ndim > 1:
            nn.init.normal_(weight, std=weight[0].numel() ** -0.5)
        else:
            nn.init.normal_(weight, mean=float("norm" in name and name.endswith("weight")), std=0.1)
    return network


def save_in_shards(network: nn.Module, folder: Path, shards: int = 4) -> None:
    """As diffusers saves it: config, index, and at least so many shards."""
    size = sum(weight.nbytes for weight in network.state_dict().values())
    network.save_pretrained(str(folder), max_shard_size=size // shards)


@contextmanager
def of_sizes(sizes: dict[str, Any]) -> Iterator[None]:
    """Within: ComfyUI's detection, which says what it does, but with these sizes."""
    detect = comfy.model_detection.detect_unet_config

    def detected(*args: Any, **kwargs: Any) -> dict[str, Any] | None:
        found = detect(*args, **kwargs)
        return found and found | sizes

    with mock.patch.object(comfy.model_detection, "detect_unet_config", detected):
        yield


def outputs(case: Case, network: nn.Module, patcher) -> tuple[Tensor, Tensor]:
    """diffusers' output, and that of the loaded model's network on the same."""
    theirs, ours = case.inputs()
    loaded = patcher.model.diffusion_model

    def run(given: Given) -> Tensor:
        return loaded(**given)

    with torch.inference_mode():
        expected = case.output(network(**theirs, return_dict=False)[0])
        given = {"transformer_options": {}, **ours}
        return expected, without_padding(run, given) if case.cut else run(given)


def error(case: Case, folder: Path) -> float:
    """How far the loaded model's output is from diffusers', of its norm."""
    network = random_network(case)
    save_in_shards(network, folder / "transformer")
    if case.pipeline:
        (folder / "model_index.json").write_text(json.dumps({"_class_name": case.pipeline}))
    with of_sizes(case.sizes):
        patcher = load_diffusers(str(folder))
    expected, found = outputs(case, network, patcher)
    assert expected.shape == found.shape
    return float((found - expected).norm() / expected.norm())


def randoms(*shapes: tuple[int, ...], seed: int = 1) -> list[Tensor]:
    """Normal random tensors, the same each time."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator) for shape in shapes]


def hunyuan_video(channels: int = 16, guidance: bool = True, kept: int = 7) -> Callable[[], tuple[Given, Given]]:
    """A video of 16 channels, its text of 7 tokens, of which so many are kept. The timestep is sigma * 1000 in both,
    the guidance diffusers' times 1000."""

    def inputs() -> tuple[Given, Given]:
        latent, text, pooled = randoms((1, channels, 3, 8, 6), (1, 7, 64), (1, 768))
        mask, time = (torch.arange(7) < kept).long()[None], torch.tensor([700.0])
        theirs: Given = dict(
            hidden_states=latent, timestep=time, encoder_hidden_states=text, encoder_attention_mask=mask,
            pooled_projections=pooled,
        )  # fmt: skip
        ours: Given = dict(x=latent, timestep=time, context=text, y=pooled, attention_mask=mask)
        if guidance:
            theirs["guidance"], ours["guidance"] = torch.tensor([6000.0]), torch.tensor([6.0])
        return theirs, ours

    return inputs


def hunyuan_video_15(image: bool, kept: int) -> Callable[[], tuple[Given, Given]]:
    """With byt5's text, whole, and with an image's tokens or without."""

    def inputs() -> tuple[Given, Given]:
        latent, text, byt5, vision = randoms((1, 65, 3, 5, 4), (1, 7, 64), (1, 5, 1472), (1, 9, 1152))
        mask, time = (torch.arange(7) < kept).long()[None], torch.tensor([700.0])
        theirs: Given = dict(
            hidden_states=latent, timestep=time, encoder_hidden_states=text, encoder_attention_mask=mask,
            encoder_hidden_states_2=byt5, encoder_attention_mask_2=torch.ones(1, 5),
            image_embeds=vision if image else torch.zeros_like(vision),
        )  # fmt: skip
        ours: Given = dict(x=latent, timestep=time, context=text, attention_mask=mask, txt_byt5=byt5)
        return theirs, ours | (dict(clip_fea=vision) if image else {})

    return inputs


def hunyuan_image(guidance: bool = False, kept: int = 7, meanflow: bool = False) -> Callable[[], tuple[Given, Given]]:
    """With byt5's text, whole. meanflow: the network is told the next step's time too."""

    def inputs() -> tuple[Given, Given]:
        latent, text, byt5 = randoms((1, 64, 8, 6), (1, 7, 64), (1, 5, 1472))
        mask, time = (torch.arange(7) < kept).long()[None], torch.tensor([700.0])
        theirs: Given = dict(
            hidden_states=latent, timestep=time, encoder_hidden_states=text, encoder_attention_mask=mask,
            encoder_hidden_states_2=byt5, encoder_attention_mask_2=torch.ones(1, 5),
        )  # fmt: skip
        ours: Given = dict(x=latent, timestep=time, context=text, attention_mask=mask, txt_byt5=byt5)
        if guidance:
            theirs["guidance"], ours["guidance"] = torch.tensor([6000.0]), torch.tensor([6.0])
        if meanflow:
            sigmas = torch.tensor([0.7, 0.4, 0.0])
            theirs["timestep_r"] = 1000 * sigmas[1:2]
            ours["transformer_options"] = dict(sigmas=sigmas[:1], sample_sigmas=sigmas)
        return theirs, ours

    return inputs


TINY = dict(num_attention_heads=2, attention_head_dim=128, num_layers=2, text_embed_dim=64)
HUNYUAN = TINY | dict(num_single_layers=2, pooled_projection_dim=768)
HUNYUAN_IMAGE = TINY | dict(num_single_layers=2, text_embed_2_dim=1472)

CASES = {
    "HunyuanVideo": Case("HunyuanVideoTransformer3DModel", HUNYUAN, hunyuan_video(), cut=True),
    "HunyuanVideo, padded text": Case("HunyuanVideoTransformer3DModel", HUNYUAN, hunyuan_video(kept=4), cut=True),
    "HunyuanVideo image to video": Case(
        "HunyuanVideoTransformer3DModel",
        HUNYUAN | dict(in_channels=33, out_channels=16, guidance_embeds=False, image_condition_type="latent_concat"),
        hunyuan_video(33, guidance=False),
        cut=True,
    ),
    "SkyReels": Case(
        "HunyuanVideoTransformer3DModel",
        HUNYUAN | dict(in_channels=32, out_channels=16, guidance_embeds=False),
        hunyuan_video(32, guidance=False, kept=5),
        cut=True,
    ),
    "HunyuanVideo 1.5, text": Case(
        "HunyuanVideo15Transformer3DModel", TINY, hunyuan_video_15(image=False, kept=4), cut=True
    ),
    "HunyuanVideo 1.5, image": Case(
        "HunyuanVideo15Transformer3DModel", TINY, hunyuan_video_15(image=True, kept=7), cut=True
    ),
    "HunyuanImage 2.1": Case("HunyuanImageTransformer2DModel", HUNYUAN_IMAGE, hunyuan_image(kept=4), cut=True),
    "HunyuanImage 2.1, distilled": Case(
        "HunyuanImageTransformer2DModel",
        HUNYUAN_IMAGE | dict(guidance_embeds=True, use_meanflow=True),
        hunyuan_image(guidance=True, meanflow=True),
        cut=True,
    ),
}
