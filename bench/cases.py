"""Random models of ComfyUI's own classes: what a model is built of and sampled with, as data."""

import math
import re
from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher


@dataclass(frozen=True)
class Case:
    """A model and its inputs.

    model: its class in comfy.supported_models. config: its unet configuration, as ComfyUI's detection would find it.
    latent: shape (B, C, ...). text: (tokens, channels) of the conditioning. pooled: channels of its pooled output.
    extra: what else goes with the text; functions are called with a random generator. audio: shape of a second latent.
    first_frame: is given, so that each frame has a timestep of its own. blocks: path of each stack's blocks -> the
    entry of the configuration that says how many there are.
    """

    model: str
    config: Mapping[str, Any]
    latent: tuple[int, ...]
    text: tuple[int, int]
    pooled: int = 0
    extra: Mapping[str, Any] = field(default_factory=dict)
    audio: tuple[int, ...] = ()
    first_frame: bool = False
    blocks: Mapping[str, str] = field(default_factory=dict)

    def patcher(
        self, seed: int = 0, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
    ) -> "ModelPatcher":
        """The model with random weights, held on the CPU and sampled on a device."""
        import comfy.supported_models
        from comfy.model_patcher import ModelPatcher

        kind = getattr(comfy.supported_models, self.model)(dict(self.config))
        kind.unet_config.update(self.config)  # also over what a family has fixed sizes of
        kind.set_inference_dtype(dtype, None)
        model = kind.get_model({}, "", device="cpu")
        fill(model.diffusion_model, torch.Generator(device).manual_seed(seed), shared=self.blocks)
        return ModelPatcher(model, load_device=torch.device(device), offload_device=torch.device("cpu"))

    def conditioning(self, seed: int = 3, tokens: int = 0) -> list:
        """Random text, of so many tokens where they are given."""
        generator = torch.Generator().manual_seed(seed)
        extra = {name: value(generator) if callable(value) else value for name, value in self.extra.items()}
        if self.pooled:
            extra["pooled_output"] = torch.randn(1, self.pooled, generator=generator)
        return [[torch.randn(1, tokens or self.text[0], self.text[1], generator=generator), extra]]


def fill(network: torch.nn.Module, generator: torch.Generator, shared: Container[str] = ()) -> None:
    """Random weights that keep activations near 1 through all layers.

    shared: paths of stacks whose blocks have one set of tensors, which saves the host's memory and changes no time.
    """
    drawn: dict[tuple, torch.Tensor] = {}
    for name, parameter in network.named_parameters():
        stack, *rest = re.split(r"\.\d+\.", name, maxsplit=1)
        key = (stack, *rest, parameter.shape) if stack in shared else (name,)
        if key not in drawn:
            values = torch.randn(parameter.shape, generator=generator, device=generator.device)
            if parameter.ndim >= 2:
                values = values / math.sqrt(max(parameter[0].numel(), 1))
            else:
                values = values * 0.1 + name.endswith(("weight", "scale"))
            drawn[key] = values.to("cpu", parameter.dtype)
        parameter.data = drawn[key]
    for name, buffer in network.named_buffers():
        if name == "pos_embed" or (buffer.is_floating_point() and not torch.isfinite(buffer).all()):
            values = torch.randn(buffer.shape, generator=generator, device=generator.device) * 0.5
            buffer.data = values.to("cpu", buffer.dtype)
