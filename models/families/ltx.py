"""LTX-Video: the image attends to itself, then to the text. LTX-2 has audio beside it, each attending to the other."""

from ..architecture import Architecture, PerToken, Stack

BLOCK = Stack(
    "transformer_blocks",
    key="double_block",
    image="x",
    tokens=(
        PerToken("pe", "image", 1),
        PerToken("timestep", "frames", 1),
        PerToken("context", "text", 1),
        PerToken("attention_mask", "text", 3),
        PerToken("self_attention_mask", "mask"),
    ),
    attention=("image", "cross"),
)
LTXV = Architecture(
    networks=("comfy.ldm.lightricks.model.LTXVModel",),
    stacks=(BLOCK,),
    width="inner_dim",
    heads="num_attention_heads",
    patch=(),
    padding="any",
    threshold=0.1,  # WaveSpeed's workflow for LTX-Video 0.9.1, 30 steps
)
LTX2 = Architecture(
    networks=("comfy.ldm.lightricks.av_model.LTXAVModel",),
    stacks=(BLOCK,),  # its x is the video and the audio
    width="inner_dim",
    heads="num_attention_heads",
    patch=(),
    refuses={"parallel": "its video and its audio attend to each other"},
)
