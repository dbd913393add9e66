"""Mochi 1."""

from ..keys import Changed, KeyMap, Weights, swap_halves, under

BLOCK: Weights = {
    "mod_x": "norm1.linear",
    "mod_y": "norm1_context.linear",
    "attn.qkv_x": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    "attn.q_norm_x": "attn1.norm_q",
    "attn.k_norm_x": "attn1.norm_k",
    "attn.proj_x": "attn1.to_out.0",
    "attn.qkv_y": ("attn1.add_q_proj", "attn1.add_k_proj", "attn1.add_v_proj"),
    "attn.q_norm_y": "attn1.norm_added_q",
    "attn.k_norm_y": "attn1.norm_added_k",
    "attn.proj_y": "attn1.to_add_out",
    "mlp_x.w1": Changed("ff.net.0.proj", swap_halves),  # gate before value
    "mlp_x.w2": "ff.net.2",
    "mlp_y.w1": Changed("ff_context.net.0.proj", swap_halves),
    "mlp_y.w2": "ff_context.net.2",
}

MOCHI = KeyMap(
    classes=("MochiTransformer3DModel",),
    weights={
        "pos_frequencies": "pos_frequencies",
        "x_embedder.proj": "patch_embed.proj",
        "t_embedder.mlp.0": "time_embed.timestep_embedder.linear_1",
        "t_embedder.mlp.2": "time_embed.timestep_embedder.linear_2",
        "t5_y_embedder.to_kv": "time_embed.pooler.to_kv",
        "t5_y_embedder.to_q": "time_embed.pooler.to_q",
        "t5_y_embedder.to_out": "time_embed.pooler.to_out",
        "t5_yproj": "time_embed.caption_proj",
        **under("blocks.*", "transformer_blocks.*", BLOCK),
        # The last block's, which only scales the text, has a name of its own:
        "blocks.*.mod_y.weight": "transformer_blocks.*.norm1_context.linear_1.weight",
        "blocks.*.mod_y.bias": "transformer_blocks.*.norm1_context.linear_1.bias",
        "final_layer.mod": Changed("norm_out.linear", swap_halves),
        "final_layer.linear": "proj_out",
    },
    blocks={"num_layers": "transformer_blocks.*"},
)
