"""Mochi: text and image apart in all blocks, the image in front."""

from ..architecture import Architecture, PerToken, Stack

BLOCK = Stack(
    "blocks",
    key="double_block",
    image="x",
    text="y",
    returns=("x", "y"),
    order="image text",
    tokens=(PerToken("rope_cos", "image"), PerToken("rope_sin", "image")),
    modulation=("mod_x", "mod_y"),
)
MOCHI = Architecture(
    networks=("comfy.ldm.genmo.joint_model.asymm_models_joint.AsymmDiTJoint",),
    stacks=(BLOCK,),
    width="hidden_size_x",
    patch=(1, "patch_size", "patch_size"),
    threshold=0.06,  # ParaAttention's default for it
)
