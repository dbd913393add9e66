"""The video VAEs whose frames can be cut into strips, as data: ComfyUI's decoder class, and its memory."""

from dataclasses import dataclass
from typing import Any

from .layers import refusal


@dataclass(frozen=True)
class Family:
    """What decoding takes, over ComfyUI's own estimate of it.

    memory_share: the layers of a whole decode; measured on an H200 (bench/vae.py) where it is not 1.
    sliced_share: in slices, with the middle block's attention and twice a slice for what a convolution takes beside;
        None: it is not decoded in slices. HunyuanVideo's was measured on cards of 12 GB (bench/dynamic_card.py).
        carried_share: the frames that convolutions carry from chunk to chunk, which come to that or wait on the host.
        What was not measured is counted (bench/vae_memory.py).
    """

    name: str
    memory_share: float = 1.0
    sliced_share: float | None = None
    carried_share: float = 0.0


FAMILIES = {
    "comfy.ldm.modules.diffusionmodules.model.Decoder": Family("HunyuanVideo", 0.67, 0.218, 0.16),
    "comfy.ldm.hunyuan_video.vae_refiner.Decoder": Family("HunyuanVideo 1.5", 0.77, 0.28, 0.24),
    "comfy.ldm.wan.vae.Decoder3d": Family("Wan 2.1", 0.43, 0.5),
    "comfy.ldm.wan.vae2_2.Decoder3d": Family("Wan 2.2"),  # which makes pixels of what its decoder gives
}


def family_of(vae: Any) -> Family | None:
    """The family of a VAE, or None if its frames cannot be cut into strips."""
    decoder = getattr(vae.first_stage_model, "decoder", None)
    family = FAMILIES.get(f"{type(decoder).__module__}.{type(decoder).__qualname__}")
    if decoder is None or family is None or vae.latent_dim != 3 or refusal(decoder) is not None:
        return None
    return family
