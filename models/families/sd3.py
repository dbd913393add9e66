"""Stable Diffusion 3 and 3.5: text and image apart in all blocks; in 3.5 medium the image attends to itself as well."""

from ..architecture import Architecture, Stack

BLOCK = Stack(
    "joint_blocks",
    key="double_block",
    image="x",
    text="context",
    returns=("context", "x"),
    order="text image",
    attention=("sequence", "image"),
    parameters=("context", "x"),
    modulation=("context_block.adaLN_modulation", "x_block.adaLN_modulation"),
)
SD3 = Architecture(
    networks=("comfy.ldm.modules.diffusionmodules.mmdit.MMDiT",),
    stacks=(BLOCK,),
    threshold=0.12,  # WaveSpeed's workflow for SD3.5 large, 30 steps
)
