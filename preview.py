"""Latents to RGB by a latent format's own factors, as ComfyUI's previews do it.

Letters: B batch, C latent channels, T latent frames, H and W latent height and width.
"""

import torch
from torch import Tensor

SCALE = (1, 16)  # least and most


def latent_to_frames(samples: Tensor, latent_format, scale: int = 1) -> Tensor:
    """RGB frames (B*T, H*scale, W*scale, 3) in 0..1 of a latent (B, C, T, H, W) or (B, C, H, W).

    `latent_format` is ComfyUI's (comfy.latent_formats). Raises ValueError if it has no RGB factors, or
    another number of channels than the latent, and where the scale is out of range.
    """
    least, most = SCALE
    if not least <= scale <= most:
        raise ValueError(f"The preview's scale must be {least} to {most}, not {scale}.")
    factors = getattr(latent_format, "latent_rgb_factors", None)
    name = type(latent_format).__name__
    if factors is None:
        raise ValueError(f"{name} latents have no RGB factors; decode them with their VAE instead.")
    channels = latent_format.latent_channels
    if getattr(samples, "is_nested", False) or samples.ndim not in (4, 5) or samples.shape[1] != channels:
        raise ValueError(
            f"{name} latents have {channels} channels, this one has not; connect the model that made the latent."
        )
    latent = latent_format.process_in(samples.float())
    reshape = getattr(latent_format, "latent_rgb_factors_reshape", None)
    if reshape is not None:
        latent = reshape(latent)
    if latent.ndim == 4:
        latent = latent.unsqueeze(2)
    bias = getattr(latent_format, "latent_rgb_factors_bias", None)
    rgb = torch.einsum("bcthw,cr->bthwr", latent, torch.tensor(factors, device=latent.device))
    if bias is not None:
        rgb = rgb + torch.tensor(bias, device=latent.device)
    frames = ((rgb + 1) / 2).clamp(0, 1).flatten(0, 1)
    return frames.repeat_interleave(scale, dim=1).repeat_interleave(scale, dim=2).cpu()
