"""Frames from a latent in one piece: the whole frame, or one rank's strip of it.

B batch, T frames of the video, H and W its height and width (of the strip).
"""

from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .families import family_of
from .layers import computing
from .strip import Strip


def frames_of(
    vae: Any, latent: Tensor, strip: Strip, before: Callable[[], None], frames: Callable[[int], None]
) -> Generator[Tensor, None, None]:
    """The strip of each video of the batch in turn, (T, H, W, 3) on the VAE's device, values 0 to 1.

    The VAE is loaded, and of a family that can be cut. before, frames: see layers.computing.
    """
    with computing(vae.first_stage_model.decoder, strip, before, frames):
        for sample in strip.cut(latent).split(1):
            yield vae.process_output(pixels_of(vae, sample)).movedim(1, -1)[0]


@contextmanager
def quick(vae: Any) -> Iterator[None]:
    """Within: a VAE of a family that can be cut decodes with the faster layers, whatever it is given."""
    if family_of(vae) is None:
        yield
        return
    with computing(vae.first_stage_model.decoder, Strip(-1, (1,)), lambda: None, lambda count: None):
        yield


def pixels_of(vae: Any, latent: Tensor) -> Tensor:
    """What the VAE's model makes of a latent, (B, 3, T, H, W) on the VAE's device: before process_output."""
    pixels = vae.first_stage_model.decode(latent.to(device=vae.device, dtype=vae.vae_dtype))
    return pixels.to(output_dtype(vae))


def output_dtype(vae: Any) -> torch.dtype:
    """The type of ComfyUI's images; older ones always take float32."""
    return vae.vae_output_dtype() if hasattr(vae, "vae_output_dtype") else torch.float32
