"""ComfyUI's own tiled decoding, with the tiles decoded anywhere.

ComfyUI asks a function for each tile in turn and blends what it gets. Asked once with a latent that has a shape and no
values, it tells which tiles these will be; asked again, it blends tiles that were decoded side by side.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import comfy.utils
import torch
from torch import Tensor

from ..plan import DecodeConfig


@dataclass(frozen=True)
class Tiling:
    """Sizes in latent frames, rows and columns."""

    tile: tuple[int, int, int]
    overlap: tuple[int, int, int]


def tiling_of(vae: Any, config: DecodeConfig) -> Tiling:
    """The settings in pixels and frames as ComfyUI's node VAE Decode (Tiled) reads them, for a video VAE."""
    overlap = min(config.overlap, config.tile_size // 4)
    frames, shared = config.temporal_size, config.temporal_overlap
    if frames < 2 * shared:
        shared //= 2
    compression, side = vae.temporal_compression_decode() or 1, vae.spacial_compression_decode()
    frames = max(2, frames // compression)
    shared = max(1, min(frames // 2, shared // compression))
    tile, overlap = config.tile_size // side, overlap // side
    return Tiling((frames, tile, tile), (shared, overlap, overlap))


def tiles_of(vae: Any, latent: Tensor, tiling: Tiling) -> list[Tensor]:
    """The tiles of a latent (B, C, T, H, W), as views, in the order in which blended() asks for them."""
    latent, tiles = latent.contiguous(), []
    nothing = torch.empty(1, vae.output_channels, 1, 1, 1, device="meta")

    def note(tile: Tensor) -> Tensor:
        first = latent.storage_offset() + tile.storage_offset()  # a batch's second half is contiguous, too
        tiles.append(latent.as_strided(tile.shape, latent.stride(), first))
        return nothing

    _scaled(vae, torch.empty_like(latent, device="meta"), note, tiling, "meta")
    return tiles


def blended(vae: Any, latent: Tensor, decode: Callable[[Tensor], Tensor], tiling: Tiling) -> Tensor:
    """Frames (B, T, H, W, 3), values 0 to 1, from what `decode` makes of each tile: (1, 3, T, H, W)."""
    return vae.process_output(_scaled(vae, latent, decode, tiling, vae.output_device)).movedim(1, -1)


def _scaled(vae: Any, latent: Tensor, function: Callable, tiling: Tiling, device: Any) -> Tensor:
    return comfy.utils.tiled_scale_multidim(
        latent, function, tile=tiling.tile, overlap=tiling.overlap, upscale_amount=vae.upscale_ratio,
        out_channels=vae.output_channels, index_formulas=vae.upscale_index_formula, output_device=device,
    )  # fmt: skip
