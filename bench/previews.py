"""Quality on the embedded, trained model: RGB previews of 12 prompts against a reference, with fixed seeds."""

from collections.abc import Callable

import comfy.latent_formats
import numpy
from skein.demo.sampling import PROMPTS, sample
from skein.demo.video import psnr
from skein.preview import latent_to_frames


def frames(latent) -> numpy.ndarray:
    return latent_to_frames(latent, comfy.latent_formats.HunyuanVideo()).numpy()


def sampled(model, steps: int) -> list[numpy.ndarray]:
    """Previews of all prompts."""
    return [frames(sample(model, prompt, seed=100 + i, steps=steps)) for i, prompt in enumerate(PROMPTS)]


def compare(prepare: Callable, model, references: list, steps: int, after_each: Callable = lambda: None) -> dict:
    """PSNR of a model against references: mean, worst, of each prompt, in dB.

    prepare: makes the model to sample, anew for each prompt. after_each: called after each prompt.
    """
    qualities = []
    for index, prompt in enumerate(PROMPTS):
        latent = sample(prepare(model), prompt, seed=100 + index, steps=steps)
        qualities.append(psnr(frames(latent), references[index]))
        after_each()
    return {
        "psnr_mean": sum(qualities) / len(qualities),
        "psnr_worst": min(qualities),
        "psnr": [round(quality, 2) for quality in qualities],
    }
