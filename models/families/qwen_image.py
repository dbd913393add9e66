"""Qwen-Image and Edit, Mage Flow: text and image apart in all blocks."""

from ..architecture import Architecture, PerToken, Stack

BLOCK = Stack(
    "transformer_blocks",
    key="double_block",
    image="hidden_states",
    text="encoder_hidden_states",
    returns=("encoder_hidden_states", "hidden_states"),
    order="text image",
    tokens=(
        PerToken("image_rotary_emb", "sequence", 2),
        PerToken("timestep_zero_index", "index"),
        PerToken("encoder_hidden_states_mask", "text", 1),
    ),
    modulation=("img_mod", "txt_mod"),
    queries=tuple(f"attn.{layer}" for layer in ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")),
)
QWEN_IMAGE = Architecture(
    networks=(
        "comfy.ldm.qwen_image.model.QwenImageTransformer2DModel",
        "comfy.ldm.mage_flow.model.MageFlowTransformer2DModel",
    ),
    stacks=(BLOCK,),
    width="inner_dim",
    heads="transformer_blocks.0.attn.heads",
    padding="right",
)
