"""The networks that train.py trains: small ones of ComfyUI's own classes, so that their checkpoints have ComfyUI's keys
by construction.

All start as the identity (modulation and output zero-initialised, adaLN-zero). Letters: B batch, T latent frames, H and
W latent height and width, L words.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .prompt import POOLED_DIM, TOKEN_DIM

HEAD = 128  # channels of an attention head


@dataclass(frozen=True)
class TrainedNetwork(ABC):
    """A network, its size, and what differs in training it. shift: of ComfyUI's sampling of the model."""

    hidden_size: int = 256

    latents = ""  # class of its latents in comfy.latent_formats
    shift = 0.0

    @abstractmethod
    def build(self) -> Any:
        """The network in float32 on the CPU."""

    @abstractmethod
    def arguments(self, pooled: Tensor, guidance: Tensor) -> dict[str, Any]:
        """Those of a call beside the latent, timestep and text. pooled: (B, 768). guidance: (B,)."""

    @abstractmethod
    def make_trainable(self, network: Any) -> None:
        """Give autograd what ComfyUI's code for inference would take away."""


@dataclass(frozen=True)
class HunyuanVideo(TrainedNetwork):
    depth: int = 2
    depth_single_blocks: int = 4

    latents = "HunyuanVideo"
    shift = 7.0

    def build(self) -> Any:
        from comfy.ldm.hunyuan_video.model import HunyuanVideo as Network

        network = Network(
            in_channels=16, out_channels=16, vec_in_dim=POOLED_DIM, context_in_dim=TOKEN_DIM,
            hidden_size=self.hidden_size, mlp_ratio=4.0, num_heads=self.hidden_size // HEAD, depth=self.depth,
            depth_single_blocks=self.depth_single_blocks, axes_dim=[16, 56, 56], theta=256, patch_size=[1, 2, 2],
            qkv_bias=True, guidance_embed=True, byt5=False, meanflow=False, use_cond_type_embedding=False,
            vision_in_dim=None, meanflow_sum=False, dtype=torch.float32, device="cpu", operations=nn,
        )  # fmt: skip
        modulations = [m.lin for m in network.modules() if type(m).__name__ == "Modulation"]
        modulations += [m.adaLN_modulation[1] for m in network.modules() if hasattr(m, "adaLN_modulation")]
        _zero(*modulations, network.final_layer.linear)
        return network

    def arguments(self, pooled: Tensor, guidance: Tensor) -> dict[str, Any]:
        return {"y": pooled, "guidance": guidance}

    def make_trainable(self, network: Any) -> None:
        """The blocks add into their input, which the norm before has saved for the backward pass: so the norms get
        clones, and so does the first block. The residual stream stays in float32.

        Compiling the blocks takes longer to start than it gains in 9 minutes at sizes that change from batch to batch
        (docs/LOG.md).
        """
        for stem in (network.img_in, network.txt_in):
            stem.register_forward_hook(lambda _, __, output: output.float().clone())
        for block in [*network.double_blocks, *network.single_blocks]:
            for norm in block.children():
                if isinstance(norm, nn.LayerNorm):
                    norm.register_forward_pre_hook(lambda _, inputs: (inputs[0].clone(),))


@dataclass(frozen=True)
class Wan(TrainedNetwork):
    """Wan 2.1, text to video. ComfyUI takes the width of its text from the class, not from the file: it is to be loaded
    by a configuration."""

    layers: int = 6

    latents = "Wan21"
    shift = 8.0

    @property
    def config(self) -> dict[str, Any]:
        """As ComfyUI's detection would find it, but for the text's width."""
        return dict(
            image_model="wan2.1", model_type="t2v", dim=self.hidden_size, out_dim=16,
            num_heads=self.hidden_size // HEAD, ffn_dim=4 * self.hidden_size, num_layers=self.layers,
            patch_size=(1, 2, 2), freq_dim=256, window_size=(-1, -1), qk_norm=True, cross_attn_norm=True, eps=1e-6,
            in_dim=16, text_dim=TOKEN_DIM,
        )  # fmt: skip

    def build(self) -> Any:
        from comfy.ldm.wan.model import WanModel

        network = WanModel(**self.config, dtype=torch.float32, device="cpu", operations=nn)
        for module in network.modules():
            if hasattr(module, "modulation"):
                nn.init.zeros_(module.modulation)
        _zero(network.time_projection[1], network.head.head)
        return network

    def arguments(self, pooled: Tensor, guidance: Tensor) -> dict[str, Any]:
        return {"transformer_options": {}}  # guidance is not distilled into it, and its text has no pooled vector

    def make_trainable(self, network: Any) -> None:
        """The residual stream stays in float32."""
        network.patch_embedding.register_forward_hook(lambda _, __, output: output.float())


NETWORKS: dict[str, type[TrainedNetwork]] = {"HunyuanVideo": HunyuanVideo, "Wan": Wan}


def _zero(*layers: nn.Linear) -> None:
    for layer in layers:
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
