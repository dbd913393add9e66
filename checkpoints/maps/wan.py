"""Wan 2.1 and 2.2: text to video, image to video, first and last frame, VACE; SkyReels V2, which has Wan's weights."""

from ..keys import KeyMap, Weights, under

ATTENTION: Weights = {
    "q": "to_q",
    "k": "to_k",
    "v": "to_v",
    "o": "to_out.0",
    "norm_q": "norm_q",
    "norm_k": "norm_k",
    "k_img": "add_k_proj",
    "v_img": "add_v_proj",
    "norm_k_img": "norm_added_k",
}
BLOCK: Weights = {
    "modulation": "scale_shift_table",
    **under("self_attn", "attn1", ATTENTION),
    **under("cross_attn", "attn2", ATTENTION),
    "norm3": "norm2",  # the one before cross attention; those without weights have the other numbers
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
}
CONDITIONS: Weights = {
    "time_embedding.0": "time_embedder.linear_1",
    "time_embedding.2": "time_embedder.linear_2",
    "time_projection.1": "time_proj",
    "text_embedding.0": "text_embedder.linear_1",
    "text_embedding.2": "text_embedder.linear_2",
    "img_emb.emb_pos": "image_embedder.pos_embed",
    "img_emb.proj.0": "image_embedder.norm1",
    "img_emb.proj.1": "image_embedder.ff.net.0.proj",
    "img_emb.proj.3": "image_embedder.ff.net.2",
    "img_emb.proj.4": "image_embedder.norm2",
}
AROUND: Weights = {
    "patch_embedding": "patch_embedding",
    **{path: f"condition_embedder.{of}" for path, of in CONDITIONS.items()},
    **under("blocks.*", "blocks.*", BLOCK),
    "head.modulation": "scale_shift_table",
    "head.head": "proj_out",
}

WAN = KeyMap(
    classes=("WanTransformer3DModel", "SkyReelsV2Transformer3DModel"),
    weights=AROUND,
    blocks={"num_layers": "blocks.*"},
)
WAN_VACE = KeyMap(
    classes=("WanVACETransformer3DModel",),
    weights={
        **AROUND,
        "vace_patch_embedding": "vace_patch_embedding",
        **under("vace_blocks.*", "vace_blocks.*", {**BLOCK, "before_proj": "proj_in", "after_proj": "proj_out"}),
    },
    blocks={"num_layers": "blocks.*"},
)
