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
from .slices import Carried, computing_in_slices
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


def frames_in_slices(
    vae: Any, latent: Tensor, before: Callable[[], None], frames: Callable[[int], None], carried: int
) -> Tensor:
    """The frames of all videos, (B, T, H, W, 3) on the VAE's output device, where each chunk goes as it is decoded.

    carried: bytes of carried frames that may stay on the VAE's device.
    """
    count, done = vae.upscale_ratio[0](latent.shape[2]), 0
    out: Tensor | None = None

    def take(pixels: Tensor) -> None:
        nonlocal out, done
        part = vae.process_output(pixels.to(output_dtype(vae))).movedim(1, -1)[0]
        if out is None:
            shape = (len(latent), count, *part.shape[1:])
            out = torch.empty(shape, dtype=part.dtype, device=vae.output_device)
        video, first = divmod(done, count)
        out[video, first : first + len(part)].copy_(part)
        done += len(part)
        frames(len(part))

    with computing_in_slices(vae.first_stage_model.decoder, before, take, Carried(carried)):
        for sample in latent.split(1):
            vae.first_stage_model.decode(sample.to(device=vae.device, dtype=vae.vae_dtype))
    assert out is not None and done == len(latent) * count
    return out


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
