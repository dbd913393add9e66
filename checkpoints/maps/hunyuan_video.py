"""HunyuanVideo (also image to video, and SkyReels' of it), HunyuanVideo 1.5 and HunyuanImage 2.1.

All are one class in ComfyUI.
"""

from ..keys import Changed, KeyMap, Weights, swap_halves, under

QKV = ("attn.to_q", "attn.to_k", "attn.to_v")
EMBEDDER: Weights = {"in_layer": "linear_1", "out_layer": "linear_2"}
BYT5: Weights = {"layernorm": "norm", "fc1": "linear_1", "fc2": "linear_2", "fc3": "linear_3"}

REFINER: Weights = {
    "input_embedder": "proj_in",
    **under("t_embedder", "time_text_embed.timestep_embedder", EMBEDDER),
    **under("c_embedder", "time_text_embed.text_embedder", EMBEDDER),
    **under(
        "individual_token_refiner.blocks.*",
        "token_refiner.refiner_blocks.*",
        {
            "norm1": "norm1",
            "norm2": "norm2",
            "adaLN_modulation.1": "norm_out.linear",
            "self_attn.qkv": QKV,
            "self_attn.proj": "attn.to_out.0",
            "mlp.0": "ff.net.0.proj",
            "mlp.2": "ff.net.2",
        },
    ),
}
DOUBLE: Weights = {
    "img_mod.lin": "norm1.linear",
    "img_attn.qkv": QKV,
    "img_attn.norm.query_norm": "attn.norm_q",
    "img_attn.norm.key_norm": "attn.norm_k",
    "img_attn.proj": "attn.to_out.0",
    "img_mlp.0": "ff.net.0.proj",
    "img_mlp.2": "ff.net.2",
    "txt_mod.lin": "norm1_context.linear",
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "txt_attn.norm.query_norm": "attn.norm_added_q",
    "txt_attn.norm.key_norm": "attn.norm_added_k",
    "txt_attn.proj": "attn.to_add_out",
    "txt_mlp.0": "ff_context.net.0.proj",
    "txt_mlp.2": "ff_context.net.2",
}
SINGLE: Weights = {
    "modulation.lin": "norm.linear",
    "linear1": (*QKV, "proj_mlp"),
    "linear2": "proj_out",
    "norm.query_norm": "attn.norm_q",
    "norm.key_norm": "attn.norm_k",
}
AROUND: Weights = {
    "img_in.proj": "x_embedder.proj",
    **under("txt_in", "context_embedder", REFINER),
    **under("double_blocks.*", "transformer_blocks.*", DOUBLE),
    **under("single_blocks.*", "single_transformer_blocks.*", SINGLE),
    "final_layer.adaLN_modulation.1": Changed("norm_out.linear", swap_halves),
    "final_layer.linear": "proj_out",
}

HUNYUAN_VIDEO = KeyMap(
    classes=("HunyuanVideoTransformer3DModel",),
    weights={
        **AROUND,
        **under("time_in", "time_text_embed.timestep_embedder", EMBEDDER),
        **under("vector_in", "time_text_embed.text_embedder", EMBEDDER),
        **under("guidance_in", "time_text_embed.guidance_embedder", EMBEDDER),
    },
    blocks={"num_layers": "transformer_blocks.*", "num_single_layers": "single_transformer_blocks.*"},
)
HUNYUAN_VIDEO_15 = KeyMap(
    classes=("HunyuanVideo15Transformer3DModel",),
    weights={
        **AROUND,
        **under("time_in", "time_embed.timestep_embedder", EMBEDDER),
        **under("time_r_in", "time_embed.timestep_embedder_r", EMBEDDER),
        **under("byt5_in", "context_embedder_2", BYT5),
        "vision_in.proj.0": "image_embedder.norm_in",
        "vision_in.proj.1": "image_embedder.linear_1",
        "vision_in.proj.3": "image_embedder.linear_2",
        "vision_in.proj.4": "image_embedder.norm_out",
        "cond_type_embedding": "cond_type_embed",
    },
    blocks={"num_layers": "transformer_blocks.*"},
)
HUNYUAN_IMAGE = KeyMap(
    classes=("HunyuanImageTransformer2DModel",),
    weights={
        **AROUND,
        **under("time_in", "time_guidance_embed.timestep_embedder", EMBEDDER),
        **under("time_r_in", "time_guidance_embed.timestep_embedder_r", EMBEDDER),
        **under("guidance_in", "time_guidance_embed.guidance_embedder", EMBEDDER),
        **under("byt5_in", "context_embedder_2", BYT5),
    },
    blocks={"num_layers": "transformer_blocks.*", "num_single_layers": "single_transformer_blocks.*"},
)
