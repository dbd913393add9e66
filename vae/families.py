"""The video VAEs whose frames can be cut into strips, as data: ComfyUI's decoder class, and its memory."""

from dataclasses import dataclass
from typing import Any

from .layers import refusal


@dataclass(frozen=True)
class Family:
    """memory_share: what the layers of a whole decode take, over ComfyUI's own estimate of it; measured on an H200
    (bench/vae.py) where it is not 1."""

    name: str
    memory_share: float = 1.0


FAMILIES = {
    "comfy.ldm.modules.diffusionmodules.model.Decoder": Family("HunyuanVideo", 0.67),
    "comfy.ldm.hunyuan_video.vae_refiner.Decoder": Family("HunyuanVideo 1.5", 0.77),
    "comfy.ldm.wan.vae.Decoder3d": Family("Wan 2.1", 0.43),
    "comfy.ldm.wan.vae2_2.Decoder3d": Family("Wan 2.2"),
}


def family_of(vae: Any) -> Family | None:
    """The family of a VAE, or None if its frames cannot be cut into strips."""
    decoder = getattr(vae.first_stage_model, "decoder", None)
    family = FAMILIES.get(f"{type(decoder).__module__}.{type(decoder).__qualname__}")
    if decoder is None or family is None or vae.latent_dim != 3 or refusal(decoder) is not None:
        return None
    return family
