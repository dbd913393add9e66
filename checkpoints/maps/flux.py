"""FLUX.2 and Chroma. FLUX.1 ComfyUI converts itself."""

from ..keys import Changed, KeyMap, Weights, swap_halves, under

QKV = ("attn.to_q", "attn.to_k", "attn.to_v")
EMBEDDER: Weights = {"in_layer": "linear_1", "out_layer": "linear_2"}

DOUBLE: Weights = {
    "img_attn.qkv": QKV,
    "img_attn.norm.query_norm": "attn.norm_q",
    "img_attn.norm.key_norm": "attn.norm_k",
    "img_attn.proj": "attn.to_out.0",
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "txt_attn.norm.query_norm": "attn.norm_added_q",
    "txt_attn.norm.key_norm": "attn.norm_added_k",
    "txt_attn.proj": "attn.to_add_out",
}
SINGLE_NORMS: Weights = {"norm.query_norm": "attn.norm_q", "norm.key_norm": "attn.norm_k"}
AROUND: Weights = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    **under("double_blocks.*", "transformer_blocks.*", DOUBLE),
    **under("single_blocks.*", "single_transformer_blocks.*", SINGLE_NORMS),
    "final_layer.linear": "proj_out",
}
BLOCKS = {"num_layers": "transformer_blocks.*", "num_single_layers": "single_transformer_blocks.*"}

FLUX2 = KeyMap(
    classes=("Flux2Transformer2DModel",),
    weights={
        **AROUND,
        **under("time_in", "time_guidance_embed.timestep_embedder", EMBEDDER),
        **under("guidance_in", "time_guidance_embed.guidance_embedder", EMBEDDER),
        "double_stream_modulation_img.lin": "double_stream_modulation_img.linear",
        "double_stream_modulation_txt.lin": "double_stream_modulation_txt.linear",
        "single_stream_modulation.lin": "single_stream_modulation.linear",
        "double_blocks.*.img_mlp.0": "transformer_blocks.*.ff.linear_in",
        "double_blocks.*.img_mlp.2": "transformer_blocks.*.ff.linear_out",
        "double_blocks.*.txt_mlp.0": "transformer_blocks.*.ff_context.linear_in",
        "double_blocks.*.txt_mlp.2": "transformer_blocks.*.ff_context.linear_out",
        "single_blocks.*.linear1": "single_transformer_blocks.*.attn.to_qkv_mlp_proj",
        "single_blocks.*.linear2": "single_transformer_blocks.*.attn.to_out",
        "final_layer.adaLN_modulation.1": Changed("norm_out.linear", swap_halves),
    },
    blocks=BLOCKS,
)
CHROMA = KeyMap(
    classes=("ChromaTransformer2DModel",),
    weights={
        **AROUND,
        "distilled_guidance_layer.in_proj": "distilled_guidance_layer.in_proj",
        "distilled_guidance_layer.layers.*.in_layer": "distilled_guidance_layer.layers.*.linear_1",
        "distilled_guidance_layer.layers.*.out_layer": "distilled_guidance_layer.layers.*.linear_2",
        "distilled_guidance_layer.norms.*": "distilled_guidance_layer.norms.*",
        "distilled_guidance_layer.out_proj": "distilled_guidance_layer.out_proj",
        "double_blocks.*.img_mlp.0": "transformer_blocks.*.ff.net.0.proj",
        "double_blocks.*.img_mlp.2": "transformer_blocks.*.ff.net.2",
        "double_blocks.*.txt_mlp.0": "transformer_blocks.*.ff_context.net.0.proj",
        "double_blocks.*.txt_mlp.2": "transformer_blocks.*.ff_context.net.2",
        **under(
            "single_blocks.*", "single_transformer_blocks.*", {"linear1": (*QKV, "proj_mlp"), "linear2": "proj_out"}
        ),
    },
    blocks=BLOCKS,
)
