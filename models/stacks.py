"""Block stacks: the transformer blocks of an architecture, in the order in which they run.

An architecture is known by the class of its diffusion model in ComfyUI. HunyuanVideo, SkyReels, the
image-to-video variants, HunyuanVideo 1.5 (double blocks only) and HunyuanImage 2.1 are all one class there.
"""

import math
from dataclasses import dataclass

BlockKey = tuple[str, int]  # a key of ComfyUI's patches_replace["dit"]


@dataclass(frozen=True)
class Architecture:
    """Attributes of a model that hold its blocks, their number of heads, the width of a token and its size in a latent;
    and parts of a block that compute shifts and scales."""

    double_blocks: str
    single_blocks: str
    heads: str
    width: str
    patch: str
    modulation: tuple[str, ...]


_ARCHITECTURES = {
    "comfy.ldm.hunyuan_video.model.HunyuanVideo": Architecture(
        "double_blocks",
        "single_blocks",
        "num_heads",
        "hidden_size",
        "patch_size",
        modulation=("img_mod", "txt_mod", "modulation"),
    ),
}


@dataclass(frozen=True)
class BlockStack:
    """The blocks of one model: `double` double-stream blocks (img and txt apart), then `single` single-stream
    blocks (one sequence of txt and img, text first)."""

    architecture: Architecture
    double: int
    single: int
    heads: int
    width: int
    patch: tuple[int, ...]

    def tokens(self, latent: tuple[int, ...]) -> int:
        """How many image tokens a latent (B, C, T, H, W) has."""
        return math.prod(math.ceil(length / step) for length, step in zip(latent[2:], self.patch))

    @property
    def keys(self) -> list[BlockKey]:
        """All blocks in running order, as keys of `patches_replace["dit"]`."""
        return [("double_block", i) for i in range(self.double)] + [("single_block", i) for i in range(self.single)]

    @property
    def modules(self) -> list[str]:
        """The same blocks as attribute paths from the model."""
        holders = {"double_block": self.architecture.double_blocks, "single_block": self.architecture.single_blocks}
        return [f"{holders[kind]}.{i}" for kind, i in self.keys]

    def is_modulation(self, layer: str) -> bool:
        """Whether a layer, by its path in a block, belongs to the block's modulation."""
        return layer.split(".")[0] in self.architecture.modulation


def find_stack(diffusion_model: object) -> BlockStack:
    """The block stack of a ComfyUI diffusion model.

    Raises ValueError if its architecture is not known.
    """
    for base in type(diffusion_model).__mro__:
        architecture = _ARCHITECTURES.get(f"{base.__module__}.{base.__qualname__}")
        if architecture is not None:
            return BlockStack(
                architecture,
                double=len(getattr(diffusion_model, architecture.double_blocks)),
                single=len(getattr(diffusion_model, architecture.single_blocks)),
                heads=getattr(diffusion_model, architecture.heads),
                width=getattr(diffusion_model, architecture.width),
                patch=tuple(getattr(diffusion_model, architecture.patch)),
            )
    raise ValueError(
        f"Skein does not know the blocks of {type(diffusion_model).__name__} models; "
        "connect a HunyuanVideo model, or remove the Skein nodes."
    )
