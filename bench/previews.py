"""Quality on a trained model: RGB previews of 12 prompts against a reference, with fixed seeds."""

from collections.abc import Callable
from typing import Any

import numpy
from comfy.model_patcher import ModelPatcher
from skein.demo.sampling import PROMPTS, sample
from skein.demo.video import psnr
from skein.preview import latent_to_frames


def frames(latent, model: ModelPatcher) -> numpy.ndarray:
    return latent_to_frames(latent, model.model.latent_format).numpy()


def sampled(model: ModelPatcher, steps: int, count: int = len(PROMPTS), **arguments: Any) -> list[numpy.ndarray]:
    """Previews of all prompts, or of some. arguments: for demo.sampling.sample, the shape of the latent say."""
    prompts = enumerate(PROMPTS[:count])
    return [frames(sample(model, prompt, seed=100 + i, steps=steps, **arguments), model) for i, prompt in prompts]


def compare(
    prepare: Callable, model, references: list, steps: int, after_each: Callable = lambda: None, **arguments: Any
) -> dict:
    """PSNR of a model against references, of so many prompts: mean, worst, of each prompt, in dB.

    prepare: makes the model to sample, anew for each prompt. after_each: called after each prompt. arguments: those of
    the references.
    """
    qualities = []
    for index, prompt in enumerate(PROMPTS[: len(references)]):
        latent = sample(prepare(model), prompt, seed=100 + index, steps=steps, **arguments)
        qualities.append(psnr(frames(latent, model), references[index]))
        after_each()
    return {
        "psnr_mean": sum(qualities) / len(qualities),
        "psnr_worst": min(qualities),
        "psnr": [round(quality, 2) for quality in qualities],
    }
