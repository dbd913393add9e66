"""Lumina Image 2.0. Z-Image, which is the same class in ComfyUI, ComfyUI converts itself."""

from ..keys import KeyMap, Weights, under

BLOCK: Weights = {
    "attention.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "attention.q_norm": "attn.norm_q",
    "attention.k_norm": "attn.norm_k",
    "attention.out": "attn.to_out.0",
    "feed_forward.w1": "feed_forward.linear_1",
    "feed_forward.w2": "feed_forward.linear_2",
    "feed_forward.w3": "feed_forward.linear_3",
    "attention_norm2": "norm2",
    "ffn_norm1": "ffn_norm1",
    "ffn_norm2": "ffn_norm2",
}
MODULATED: Weights = {**BLOCK, "attention_norm1": "norm1.norm", "adaLN_modulation.1": "norm1.linear"}

LUMINA2 = KeyMap(
    classes=("Lumina2Transformer2DModel",),
    weights={
        "x_embedder": "x_embedder",
        "t_embedder.mlp.0": "time_caption_embed.timestep_embedder.linear_1",
        "t_embedder.mlp.2": "time_caption_embed.timestep_embedder.linear_2",
        "cap_embedder.0": "time_caption_embed.caption_embedder.0",
        "cap_embedder.1": "time_caption_embed.caption_embedder.1",
        **under("noise_refiner.*", "noise_refiner.*", MODULATED),
        **under("context_refiner.*", "context_refiner.*", {**BLOCK, "attention_norm1": "norm1"}),
        **under("layers.*", "layers.*", MODULATED),
        "final_layer.adaLN_modulation.1": "norm_out.linear_1",
        "final_layer.linear": "norm_out.linear_2",
    },
    blocks={"num_layers": "layers.*", "num_refiner_layers": "noise_refiner.*"},
)
