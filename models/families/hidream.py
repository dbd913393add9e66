"""HiDream I1: text and image apart, then in one sequence; each block is given its own text."""

from ..architecture import Architecture, PerToken, Stack

ROPE = PerToken("rope", "sequence", 1)
MODULATION = ("block.adaLN_modulation",)
HIDREAM = Architecture(
    networks=("comfy.ldm.hidream.model.HiDreamImageTransformer2DModel",),
    stacks=(
        Stack(
            "double_stream_blocks",
            image="image_tokens",
            text="text_tokens",
            returns=("image_tokens", "text_tokens"),
            order="image text",
            tokens=(ROPE,),
            modulation=MODULATION,
        ),
        Stack(
            "single_stream_blocks",
            image="image_tokens",
            order="image text",
            tokens=(ROPE,),
            modulation=MODULATION,
        ),
    ),
    width="inner_dim",
    heads="num_attention_heads",
    after="final_layer",
)
