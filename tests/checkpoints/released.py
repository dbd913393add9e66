"""Configurations of models that are released in diffusers' format: what differs from diffusers' class as it is.

ComfyUI's class that each has to be taken for stands beside. Nothing was downloaded: the numbers are those of diffusers'
defaults, and otherwise what is known of these models.
"""

from typing import Any

WAN, VACE, FLUX = "WanTransformer3DModel", "WanVACETransformer3DModel", "FluxTransformer2DModel"
FLUX2, QWEN, LTX = "Flux2Transformer2DModel", "QwenImageTransformer2DModel", "LTXVideoTransformer3DModel"
COSMOS, COG, SD3 = "CosmosTransformer3DModel", "CogVideoXTransformer3DModel", "SD3Transformer2DModel"
WAN_SMALL: dict[str, Any] = dict(num_attention_heads=12, ffn_dim=8960, num_layers=30)
WAN_IMAGE: dict[str, Any] = dict(in_channels=36, image_dim=1280, added_kv_proj_dim=5120)
COG_5B: dict[str, Any] = dict(num_attention_heads=48, num_layers=42, use_rotary_positional_embeddings=True)
COG_15 = COG_5B | dict(patch_size_t=2, patch_bias=False, sample_height=300, sample_width=300, sample_frames=81)
SD3_MEDIUM: dict[str, Any] = dict(
    num_layers=24, num_attention_heads=24, joint_attention_dim=4096, caption_projection_dim=1536,
    pooled_projection_dim=2048, pos_embed_max_size=192,
)  # fmt: skip
COSMOS_2B: dict[str, Any] = dict(
    in_channels=16, out_channels=16, num_attention_heads=16, num_layers=28, rope_scale=(1.0, 4.0, 4.0),
    extra_pos_embed_type=None,
)  # fmt: skip

RELEASED: dict[str, tuple[str, dict[str, Any], str]] = {
    "Wan 2.1 T2V 1.3B": (WAN, WAN_SMALL, "WAN21_T2V"),
    "Wan 2.1 T2V 14B, Wan 2.2 T2V A14B": (WAN, {}, "WAN21_T2V"),
    "Wan 2.1 I2V 14B": (WAN, WAN_IMAGE, "WAN21_I2V"),
    "Wan 2.1 FLF2V 14B": (WAN, WAN_IMAGE | dict(pos_embed_seq_len=514), "WAN21_I2V"),
    "Wan 2.2 I2V A14B": (WAN, dict(in_channels=36), "WAN21_T2V"),  # as ComfyUI takes its own file of it
    "Wan 2.2 TI2V 5B": (
        WAN,
        dict(num_attention_heads=24, ffn_dim=14336, num_layers=30, in_channels=48, out_channels=48),
        "WAN22_T2V",
    ),
    "Wan 2.1 VACE 1.3B": (
        VACE, WAN_SMALL | dict(vace_layers=list(range(0, 30, 2)), vace_in_channels=96), "WAN21_Vace",
    ),
    "Wan 2.1 VACE 14B": (VACE, dict(vace_layers=list(range(0, 40, 5)), vace_in_channels=96), "WAN21_Vace"),
    "FLUX.1 dev, Kontext": (FLUX, dict(guidance_embeds=True), "Flux"),
    "FLUX.1 schnell": (FLUX, {}, "FluxSchnell"),
    "FLUX.1 Fill": (FLUX, dict(guidance_embeds=True, in_channels=384, out_channels=64), "FluxInpaint"),
    "FLUX.1 Depth, Canny": (FLUX, dict(guidance_embeds=True, in_channels=128, out_channels=64), "Flux"),
    "FLUX.2 dev": (FLUX2, {}, "Flux2"),
    "FLUX.2 klein 4B": (
        FLUX2,
        dict(
            num_layers=5, num_single_layers=20, num_attention_heads=24, joint_attention_dim=7680, guidance_embeds=False
        ),
        "Flux2",
    ),
    "FLUX.2 klein 9B": (
        FLUX2,
        dict(
            num_layers=8, num_single_layers=24, num_attention_heads=32, joint_attention_dim=12288, guidance_embeds=False
        ),
        "Flux2",
    ),
    "Qwen-Image, Qwen-Image Edit": (QWEN, {}, "QwenImage"),
    "Qwen-Image Layered": (QWEN, dict(use_additional_t_cond=True), "QwenImage"),
    "Z-Image": ("ZImageTransformer2DModel", {}, "ZImage"),
    "LTX-Video 2B": (LTX, {}, "LTXV"),
    "LTX-Video 13B": (LTX, dict(attention_head_dim=128, cross_attention_dim=4096, num_layers=48), "LTXV"),
    "CogVideoX 2B": (COG, {}, "CogVideoX_T2V"),
    "CogVideoX 5B": (COG, COG_5B, "CogVideoX_T2V"),
    "CogVideoX 5B I2V": (COG, COG_5B | dict(in_channels=32, use_learned_positional_embeddings=True), "CogVideoX_I2V"),
    "CogVideoX 1.5 5B": (COG, COG_15, "CogVideoX_T2V"),
    "CogVideoX 1.5 5B I2V": (COG, COG_15 | dict(in_channels=32, ofs_embed_dim=512), "CogVideoX_I2V"),
    "Mochi 1": ("MochiTransformer3DModel", {}, "GenmoMochi"),
    "SD3 medium": (SD3, SD3_MEDIUM, "SD3"),
    "SD3.5 medium": (
        SD3,
        SD3_MEDIUM | dict(qk_norm="rms_norm", pos_embed_max_size=384, dual_attention_layers=tuple(range(13))),
        "SD3",
    ),
    "SD3.5 large": (
        SD3,
        SD3_MEDIUM | dict(num_layers=38, num_attention_heads=38, caption_projection_dim=2432, qk_norm="rms_norm"),
        "SD3",
    ),
    "Lumina Image 2.0": ("Lumina2Transformer2DModel", {}, "Lumina2"),
    "Chroma1": ("ChromaTransformer2DModel", {}, "Chroma"),
    "AuraFlow": ("AuraFlowTransformer2DModel", {}, "AuraFlow"),
    "SkyReels V2 14B": ("SkyReelsV2Transformer3DModel", {}, "WAN21_T2V"),
    "Cosmos Predict2 2B Text2Image": (COSMOS, COSMOS_2B, "CosmosT2IPredict2"),
    "Cosmos Predict2 2B Video2World": (COSMOS, COSMOS_2B | dict(in_channels=17), "CosmosI2VPredict2"),
    "HiDream-I1": (
        "HiDreamImageTransformer2DModel",
        dict(
            patch_size=2, in_channels=16, out_channels=16, caption_channels=[4096, 4096], axes_dims_rope=(64, 32, 32),
            llama_layers=[*range(32), *[31] * 16],
        ),
        "HiDream",
    ),
    "Kandinsky 5 Lite": (
        "Kandinsky5Transformer3DModel",
        dict(in_visual_dim=16, out_visual_dim=16, visual_cond=True, model_dim=1792, ff_dim=7168),
        "Kandinsky5",
    ),
}  # fmt: skip
