"""Block stacks: the transformer blocks of an architecture, in the order in which they run.

An architecture is known by the class of its diffusion model in ComfyUI. HunyuanVideo, SkyReels, the
image-to-video variants, HunyuanVideo 1.5 (double blocks only) and HunyuanImage 2.1 are all one class there.
"""

from dataclasses import dataclass

BlockKey = tuple[str, int]  # a key of ComfyUI's patches_replace["dit"]


@dataclass(frozen=True)
class BlockStack:
    """The blocks of one model: `double` double-stream blocks (img and txt apart), then `single` single-stream
    blocks (one sequence of txt and img, text first)."""

    double: int
    single: int
    double_blocks: str = "double_blocks"  # attribute of the model that holds them
    single_blocks: str = "single_blocks"
    modulation: tuple[str, ...] = (
        "img_mod",
        "txt_mod",
        "modulation",
    )  # of a block

    @property
    def keys(self) -> list[BlockKey]:
        """All blocks in running order, as keys of `patches_replace["dit"]`."""
        return [("double_block", i) for i in range(self.double)] + [("single_block", i) for i in range(self.single)]

    @property
    def modules(self) -> list[str]:
        """The same blocks as attribute paths from the model."""
        return [f"{self.double_blocks}.{i}" for i in range(self.double)] + [
            f"{self.single_blocks}.{i}" for i in range(self.single)
        ]

    def is_modulation(self, layer: str) -> bool:
        """Whether a layer, by its path in a block, belongs to the block's modulation."""
        return layer.split(".")[0] in self.modulation


@dataclass(frozen=True)
class _Architecture:
    double_blocks: str  # attribute that holds the blocks
    single_blocks: str


_ARCHITECTURES = {
    "comfy.ldm.hunyuan_video.model.HunyuanVideo": _Architecture("double_blocks", "single_blocks"),
}


def find_stack(diffusion_model: object) -> BlockStack:
    """The block stack of a ComfyUI diffusion model.

    Raises ValueError if its architecture is not known.
    """
    for base in type(diffusion_model).__mro__:
        architecture = _ARCHITECTURES.get(f"{base.__module__}.{base.__qualname__}")
        if architecture is not None:
            break
    else:
        raise ValueError(
            f"Skein does not know the blocks of {type(diffusion_model).__name__} models; "
            "connect a HunyuanVideo model, or remove the Skein nodes."
        )
    return BlockStack(
        double=len(getattr(diffusion_model, architecture.double_blocks)),
        single=len(getattr(diffusion_model, architecture.single_blocks)),
        double_blocks=architecture.double_blocks,
        single_blocks=architecture.single_blocks,
    )
