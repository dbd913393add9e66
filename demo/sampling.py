"""Sampling in this process with ComfyUI's own loader and sampler, for tests and benchmarks.

Letters: B batch, T latent frames, H and W latent height and width.
"""

from typing import Any

import torch
from torch import Tensor

from . import MODEL_FOLDER, MODEL_NAME
from .prompt import PromptEncoder

PROMPTS = (
    "a red circle moves left",
    "a small blue square moves right",
    "a large green triangle moves up over sand",
    "a yellow circle moves down over water",
    "a purple square moves left over snow",
    "a small cyan triangle moves right over grass",
    "a large orange circle moves up",
    "a blue triangle moves down over stone",
    "a small red square moves up over sand",
    "a large yellow triangle moves left",
    "a green circle moves right over water",
    "a cyan square moves down",
)


def load_demo_model():
    """The embedded checkpoint as a ModelPatcher, as the node "Load Demo Model" loads it."""
    import comfy.sd

    return comfy.sd.load_diffusion_model(str(MODEL_FOLDER / MODEL_NAME))


def conditioning(prompt: str, **extra: Any) -> list:
    """ComfyUI conditioning of a prompt, with more entries for its dict."""
    tokens, pooled = PromptEncoder().encode(prompt)
    return [[tokens, {"pooled_output": pooled, **extra}]]


def sample(
    patcher,
    positive: str | list,
    negative: str | list = "",
    *,
    seed: int = 1,
    steps: int = 20,
    cfg: float = 1.0,
    sampler: str = "euler",
    scheduler: str = "simple",
    shape: tuple[int, ...] = (1, 16, 5, 24, 24),
    latent: Tensor | None = None,
    callback=None,
) -> Tensor:
    """What ComfyUI's KSampler node does: the sampled latent (B, 16, T, H, W), starting from zeros or `latent`."""
    import comfy.sample

    latent = torch.zeros(shape) if latent is None else latent
    noise = comfy.sample.prepare_noise(latent, seed)
    positive = conditioning(positive) if isinstance(positive, str) else positive
    negative = conditioning(negative) if isinstance(negative, str) else negative
    return comfy.sample.sample(
        patcher, noise, steps, cfg, sampler, scheduler, positive, negative, latent,
        callback=callback, disable_pbar=True, seed=seed,
    )  # fmt: skip
