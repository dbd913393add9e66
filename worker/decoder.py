"""A worker's VAE: built from the weights that ComfyUI's process sends, it decodes this rank's strip or tile."""

from collections.abc import Callable
from typing import Any

import comfy.model_management as memory
import comfy.sd
import torch
from torch import Tensor

from .. import report
from ..parallel.mesh import Mesh
from ..vae.strip import Strip
from ..vae.whole import frames_of, pixels_of, quick


class Decoder:
    """The VAE of this rank. Only the pixels of this rank leave it."""

    def __init__(self, mesh: Mesh, end_run: Callable[[], object]):
        """end_run: ends a sampling run that an interrupt has left open, with the hidden states that it keeps."""
        self.mesh = mesh
        self.end_run = end_run
        self.vae: Any = None

    def take_vae(self, state: dict[str, Tensor], dtype: torch.dtype) -> bool:
        """Build a VAE in the place of the one before; false, and none, if ComfyUI makes another of these weights."""
        self.end_run()
        self.vae = None
        vae = comfy.sd.VAE(sd=dict(state), dtype=dtype)
        built = {} if vae.first_stage_model is None else vae.get_sd()
        if {name: value.shape for name, value in built.items()} != {name: value.shape for name, value in state.items()}:
            return False
        self.vae = vae
        return True

    def decode_strip(self, latent: Tensor, dim: int, parts: list[int], need: int) -> Tensor:
        """This rank's strip of the frames (B, T, H, W, 3), of a latent that is dealt out in these parts."""
        self.end_run()
        memory.load_models_gpu([self.vae.patcher], memory_required=need, force_full_load=self.vae.disable_offload)
        strip = Strip(dim, tuple(parts), self.mesh.rank)
        frames = torch.stack(list(frames_of(self.vae, latent, strip, lambda: None, report.progress)))
        memory.soft_empty_cache()  # what decoding took: ComfyUI's process could not ask for it
        return frames

    def decode_tile(self, latents: list[Tensor], need: int, last: bool) -> Tensor | None:
        """The pixels (1, 3, T, H, W) of this rank's tile among at most as many tiles as there are ranks.

        last: whether these are a decode's last tiles.
        """
        self.end_run()
        pixels = None
        if self.mesh.rank < len(latents):
            memory.load_models_gpu([self.vae.patcher], memory_required=need, force_full_load=self.vae.disable_offload)
            with quick(self.vae):
                pixels = pixels_of(self.vae, latents[self.mesh.rank])
        if last:
            memory.soft_empty_cache()
        return pixels
