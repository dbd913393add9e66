"""Cosmos Predict 2."""

from ..keys import KeyMap, Weights, under

ATTENTION: Weights = {
    "q_proj": "to_q",
    "k_proj": "to_k",
    "v_proj": "to_v",
    "output_proj": "to_out.0",
    "q_norm": "norm_q",
    "k_norm": "norm_k",
}
BLOCK: Weights = {
    **under("self_attn", "attn1", ATTENTION),
    **under("cross_attn", "attn2", ATTENTION),
    "mlp.layer1": "ff.net.0.proj",
    "mlp.layer2": "ff.net.2",
    **under("adaln_modulation_self_attn", "norm1", {"1": "linear_1", "2": "linear_2"}),
    **under("adaln_modulation_cross_attn", "norm2", {"1": "linear_1", "2": "linear_2"}),
    **under("adaln_modulation_mlp", "norm3", {"1": "linear_1", "2": "linear_2"}),
}

COSMOS_PREDICT2 = KeyMap(
    classes=("CosmosTransformer3DModel",),
    weights={
        "x_embedder.proj.1": "patch_embed.proj",
        "t_embedder.1.linear_1": "time_embed.t_embedder.linear_1",
        "t_embedder.1.linear_2": "time_embed.t_embedder.linear_2",
        "t_embedding_norm": "time_embed.norm",
        **under("blocks.*", "transformer_blocks.*", BLOCK),
        **under("final_layer.adaln_modulation", "norm_out", {"1": "linear_1", "2": "linear_2"}),
        "final_layer.linear": "proj_out",
    },
    blocks={"num_layers": "transformer_blocks.*"},
)
