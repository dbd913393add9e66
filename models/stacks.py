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

    @property
    def keys(self) -> list[BlockKey]:
        """All blocks in running order, as keys of `patches_replace["dit"]`."""
        return [("double_block", i) for i in range(self.double)] + [("single_block", i) for i in range(self.single)]


@dataclass(frozen=True)
class Blocks:
    """Where the blocks are: `names` of the modules in running order, relative to the diffusion model, and of the
    submodules of a block that make its `modulation` from the timestep vector."""

    names: tuple[str, ...]
    modulation: tuple[str, ...]


@dataclass(frozen=True)
class _Architecture:
    double_blocks: str  # attribute that holds the blocks
    single_blocks: str
    modulation: tuple[str, ...]


_ARCHITECTURES = {
    "comfy.ldm.hunyuan_video.model.HunyuanVideo": _Architecture(
        "double_blocks", "single_blocks", ("img_mod", "txt_mod", "modulation")
    ),
}


def find_stack(diffusion_model: object) -> BlockStack:
    """The block stack of a ComfyUI diffusion model.

    Raises ValueError if its architecture is not known, or if it has fewer than two blocks.
    """
    architecture = _architecture_of(diffusion_model)
    stack = BlockStack(
        double=len(getattr(diffusion_model, architecture.double_blocks)),
        single=len(getattr(diffusion_model, architecture.single_blocks)),
    )
    if len(stack.keys) < 2 or stack.double == 0:
        raise ValueError(f"This model has {len(stack.keys)} block(s); the first-block cache needs at least two.")
    return stack


def find_blocks(diffusion_model: object) -> Blocks:
    """Where the blocks of a ComfyUI diffusion model are. Raises ValueError if its architecture is not known."""
    architecture = _architecture_of(diffusion_model)
    names = [
        f"{attribute}.{index}"
        for attribute in (architecture.double_blocks, architecture.single_blocks)
        for index in range(len(getattr(diffusion_model, attribute)))
    ]
    return Blocks(tuple(names), architecture.modulation)


def _architecture_of(diffusion_model: object) -> _Architecture:
    for base in type(diffusion_model).__mro__:
        architecture = _ARCHITECTURES.get(f"{base.__module__}.{base.__qualname__}")
        if architecture is not None:
            return architecture
    raise ValueError(
        f"Skein does not know the blocks of {type(diffusion_model).__name__} models; "
        "connect a HunyuanVideo model, or remove the Skein nodes."
    )
