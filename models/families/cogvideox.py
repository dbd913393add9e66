"""CogVideoX 1 and 1.5: text and image apart in all blocks."""

from ..architecture import Architecture, PerToken, Stack

BLOCK = Stack(
    "blocks",
    image="hidden_states",
    text="encoder_hidden_states",
    returns=("hidden_states", "encoder_hidden_states"),
    order="text image",
    tokens=(PerToken("image_rotary_emb", "image"),),
    modulation=("norm1.linear", "norm2.linear"),
)
COGVIDEOX = Architecture(
    networks=("comfy.ldm.cogvideo.model.CogVideoXTransformer3DModel",),
    stacks=(BLOCK,),
    width="dim",
    heads="num_attention_heads",
    threshold=0.04,  # ParaAttention's default for it
)
