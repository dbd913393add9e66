"""Tiny random models of each architecture that Skein knows, made by ComfyUI's own classes: unet configurations as its
detection would find them, but small. All in float32 on the CPU.
"""

from collections.abc import Callable
from typing import Any

import comfy.sample
import comfy.samplers
import comfy.supported_models
import comfyui_version
import torch
from comfy.k_diffusion.sampling import sample_euler
from comfy.model_patcher import ModelPatcher
from comfy.nested_tensor import NestedTensor
from skein.bench import random_model as true
from skein.bench.cases import Case

IMAGE = (1, 16, 12, 10)
VIDEO = (1, 16, 3, 8, 6)


def sample(
    case: Case,
    patcher: ModelPatcher,
    steps: int = 2,
    cfg: float = 1.0,
    sampler: Callable = sample_euler,
    near: bool = False,
) -> torch.Tensor:
    """The sampled latent; that of a video with audio flat, one behind the other.

    near: a hundredth of the way only, in steps so small that the cache of a random model reuses calls.
    """
    latent: Any = torch.zeros(case.latent)
    if case.audio:
        latent = NestedTensor((latent, torch.zeros(case.audio)))
    noise = comfy.sample.prepare_noise(latent, 1)
    mask = None
    if case.first_frame:
        mask = torch.ones(1, 1, *case.latent[2:])
        mask[:, :, 0] = 0
    sigmas = comfy.samplers.calculate_sigmas(patcher.get_model_object("model_sampling"), "simple", steps)
    sigmas = torch.linspace(sigmas[0], 0.99 * sigmas[0], steps + 1) if near else sigmas
    with torch.inference_mode():
        out = comfy.sample.sample_custom(
            patcher, noise, cfg, comfy.samplers.KSAMPLER(sampler), sigmas, case.conditioning(),
            case.conditioning(seed=8), latent, noise_mask=mask, disable_pbar=True, seed=1,
        )  # fmt: skip
    return torch.cat([part.flatten() for part in out.unbind()]) if case.audio else out


def _mask(tokens: int, kept: int) -> torch.Tensor:
    return (torch.arange(tokens) < kept).long().unsqueeze(0)


def _random(*shape: int) -> Callable:
    return lambda generator: torch.randn(*shape, generator=generator)


def _reference(*shape: int) -> Callable:
    return lambda generator: [torch.randn(*shape, generator=generator)]


def guidance(name: str) -> float:
    """A scale of classifier-free guidance: two conditionings in a call, but where this ComfyUI cannot have them."""
    alone = name == "HunyuanVideo image to video" and comfyui_version.__version__.startswith("0.16.")
    return 1.0 if alone else 3.0


HUNYUAN_VIDEO = true.HUNYUAN_VIDEO | dict(
    context_in_dim=64, hidden_size=256, num_heads=2, depth=2, depth_single_blocks=2
)
HUNYUAN_IMAGE = HUNYUAN_VIDEO | dict(
    in_channels=64, out_channels=64, vec_in_dim=None, axes_dim=[64, 64], patch_size=[1, 1], guidance_embed=False
)
FLUX = true.FLUX_DEV | dict(
    vec_in_dim=64, context_in_dim=48, hidden_size=256, num_heads=2, depth=2, depth_single_blocks=3
)
FLUX2 = dict(
    image_model="flux2", in_channels=128, out_channels=128, vec_in_dim=None, context_in_dim=48, hidden_size=256,
    mlp_ratio=3.0, num_heads=2, depth=2, depth_single_blocks=3, axes_dim=[32] * 4, theta=2000, patch_size=1,
    qkv_bias=False, guidance_embed=True, txt_ids_dims=[3], global_modulation=True, mlp_silu_act=True, ops_bias=False,
    default_ref_method="index", ref_index_scale=10.0, yak_mlp=False, txt_norm=False,
)  # fmt: skip
CHROMA = dict(
    image_model="chroma", in_channels=64, out_channels=64, context_in_dim=48, hidden_size=256, mlp_ratio=4.0,
    num_heads=2, depth=19, depth_single_blocks=38, axes_dim=[16, 56, 56], theta=10000, patch_size=2, qkv_bias=True,
    in_dim=64, out_dim=256, hidden_dim=64, n_layers=2, txt_ids_dims=[], vec_in_dim=None,
)  # fmt: skip
SD3 = true.SD35_LARGE | dict(
    depth=4, num_blocks=4, adm_in_channels=64, num_patches=32 * 32, pos_embed_max_size=32,
    context_embedder_config={"target": "torch.nn.Linear", "params": {"in_features": 48, "out_features": 256}},
)  # fmt: skip
MOCHI = true.MOCHI | dict(depth=3, num_heads=2, hidden_size_x=256, hidden_size_y=128, mlp_ratio_x=48.0, t5_feat_dim=64)
COGVIDEOX = true.COGVIDEOX_5B | dict(num_attention_heads=2, time_embed_dim=64, num_layers=3, text_embed_dim=48)
WAN = true.WAN_14B | dict(dim=256, num_heads=2, ffn_dim=512, num_layers=3, text_dim=48)
QWEN_IMAGE = true.QWEN_IMAGE | dict(num_layers=3, num_attention_heads=2, joint_attention_dim=48)
LTXV = dict(
    image_model="ltxv", num_layers=3, attention_head_dim=64, num_attention_heads=4, cross_attention_dim=256,
    caption_channels=48, in_channels=128,
)  # fmt: skip
LTX2 = dict(
    image_model="ltxav", num_layers=3, attention_head_dim=64, num_attention_heads=4, cross_attention_dim=256,
    audio_cross_attention_dim=128, audio_attention_head_dim=32, audio_num_attention_heads=4, caption_channels=48,
    in_channels=128, connector_attention_head_dim=24, connector_num_attention_heads=2, connector_num_layers=1,
)  # fmt: skip
LUMINA2 = dict(
    image_model="lumina2", patch_size=2, in_channels=16, dim=384, cap_feat_dim=48, n_layers=3, qk_norm=True, n_heads=4,
    n_kv_heads=2, axes_dims=[32, 32, 32], axes_lens=[300, 512, 512], rope_theta=10000.0, ffn_dim_multiplier=1.0,
)  # fmt: skip
Z_IMAGE = LUMINA2 | dict(
    dim=256, n_heads=2, axes_dims=[32, 48, 48], axes_lens=[1536, 512, 512], rope_theta=256.0,
    ffn_dim_multiplier=8.0 / 3.0, z_image_modulation=True, time_scale=1000.0, pad_tokens_multiple=32,
)  # fmt: skip
HIDREAM = dict(
    image_model="hidream", attention_head_dim=128, axes_dims_rope=[64, 32, 32], caption_channels=[48, 40],
    max_resolution=[128, 128], in_channels=16, llama_layers=[0, 1, 2, 2], num_attention_heads=2, num_routed_experts=2,
    num_activated_experts=1, num_layers=2, num_single_layers=2, out_channels=16, patch_size=2, text_emb_dim=64,
)  # fmt: skip
KANDINSKY5 = dict(
    image_model="kandinsky5", model_dim=256, time_dim=64, ff_dim=512, visual_embed_dim=132, num_text_blocks=1,
    num_visual_blocks=3, axes_dims=(32, 48, 48), in_text_dim=48, in_text_dim2=32,
)  # fmt: skip
COSMOS_PREDICT2 = dict(
    image_model="cosmos_predict2", max_img_h=240, max_img_w=240, max_frames=128, in_channels=16, out_channels=16,
    patch_spatial=2, patch_temporal=1, model_channels=256, concat_padding_mask=True, crossattn_emb_channels=48,
    pos_emb_cls="rope3d", pos_emb_learnable=True, pos_emb_interpolation="crop", min_fps=1, max_fps=30,
    use_adaln_lora=True, adaln_lora_dim=16, num_blocks=3, num_heads=2, extra_per_block_abs_pos_emb=False,
    rope_h_extrapolation_ratio=4.0, rope_w_extrapolation_ratio=4.0, rope_t_extrapolation_ratio=1.0,
    extra_h_extrapolation_ratio=1.0, extra_w_extrapolation_ratio=1.0, extra_t_extrapolation_ratio=1.0,
    rope_enable_fps_modulation=False,
)  # fmt: skip
AURAFLOW = dict(max_seq=1024, cond_seq_dim=48, n_double_layers=2, n_layers=5, dim=256, n_heads=2, global_conddim=256)
OMNIGEN2 = dict(
    image_model="omnigen2", axes_dim_rope=[40, 40, 40], axes_lens=[1024, 1664, 1664], ffn_dim_multiplier=None,
    hidden_size=360, in_channels=16, multiple_of=16, norm_eps=1e-5, num_attention_heads=3, num_kv_heads=1, num_layers=3,
    num_refiner_layers=1, out_channels=None, patch_size=2, text_feat_dim=48, timestep_scale=1000.0,
)  # fmt: skip
KREA2 = dict(
    image_model="krea2", features=256, channels=16, patch=2, layers=3, heads=2, kvheads=1, txtlayers=2, txtdim=160,
    txtheads=2, txtkvheads=2, tdim=64,
)  # fmt: skip
IDEOGRAM4 = dict(
    image_model="ideogram4", in_channels=128, num_layers=3, num_attention_heads=2, attention_head_dim=128,
    intermediate_size=256, adaln_dim=64, llm_features_dim=48,
)  # fmt: skip
JOYIMAGE = dict(
    image_model="joyimage", in_channels=16, hidden_size=256, patch_size=[1, 2, 2], num_layers=3, num_attention_heads=2,
    text_dim=48,
)  # fmt: skip
LENS = dict(
    image_model="lens", in_channels=128, out_channels=32, num_layers=3, num_attention_heads=4, enc_hidden_dim=48,
    multi_layer_encoder_feature=False, selected_layer_index=(0,),
)  # fmt: skip
MAGE_FLOW = dict(image_model="mage_flow", in_channels=128, num_layers=3, num_attention_heads=2, joint_attention_dim=48)
BOOGU = dict(
    image_model="boogu", hidden_size=360, num_layers=3, num_double_stream_layers=2, num_refiner_layers=1,
    instruction_feat_dim=48, num_attention_heads=3, num_kv_heads=1,
)  # fmt: skip
PIXART = dict(
    image_model="pixart_sigma", num_heads=4, patch_size=2, hidden_size=288, in_channels=4, depth=3,
    model_max_length=300, input_size=64, pe_interpolation=1, micro_condition=False, caption_channels=48,
)  # fmt: skip
ERNIE = dict(
    image_model="ernie", hidden_size=256, num_attention_heads=2, num_layers=3, ffn_hidden_size=512, text_in_dim=48
)
ALL = {"attention_mask": _mask(7, 7)}
LLAMA = {"conditioning_llama3": lambda generator: torch.randn(1, 3, 5, 40, generator=generator)}

_ALL_CASES = {
    "HunyuanVideo": Case("HunyuanVideo", HUNYUAN_VIDEO, VIDEO, (7, 64), 768),
    "HunyuanVideo image to video": Case(
        "HunyuanVideo", HUNYUAN_VIDEO, VIDEO, (7, 64), 768, {"guiding_frame_index": 0}
    ),
    "HunyuanImage 2.1": Case("HunyuanImage21", HUNYUAN_IMAGE, (1, 64, 6, 5), (7, 64)),
    "FLUX.1": Case("Flux", FLUX, IMAGE, (7, 48), 64),
    "FLUX.1 Kontext": Case(
        "Flux", FLUX, IMAGE, (7, 48), 64,
        {"reference_latents": _reference(1, 16, 8, 8), "reference_latents_method": "offset"},
    ),
    "FLUX.2": Case("Flux2", FLUX2, (1, 128, 6, 5), (512, 48), 64),  # ComfyUI before 0.30 asks for a pooled output,
    "Chroma": Case("Chroma", CHROMA, IMAGE, (7, 48), 64),  # and does not use it
    "SD3": Case("SD3", SD3, IMAGE, (7, 48), 64),
    "SD3.5 medium": Case("SD3", SD3 | dict(x_block_self_attn_layers=[0, 1]), IMAGE, (7, 48), 64),
    "Mochi": Case("GenmoMochi", MOCHI, (1, 12, 3, 8, 6), (256, 64), extra={"attention_mask": _mask(256, 11)}),
    "CogVideoX": Case("CogVideoX_T2V", COGVIDEOX, VIDEO, (226, 48)),
    "Wan 2.1": Case("WAN21_T2V", WAN, VIDEO, (16, 48)),
    "Wan 2.1 image to video": Case("WAN21_I2V", WAN | dict(model_type="i2v", in_dim=36), VIDEO, (16, 48)),
    "Wan 2.1 Camera": Case("WAN21_Camera", WAN | dict(model_type="camera", in_dim=36), VIDEO, (16, 48)),
    "Wan 2.1 VACE": Case(
        "WAN21_Vace", WAN | dict(model_type="vace", vace_in_dim=96, vace_layers=2, num_layers=4), VIDEO, (16, 48)
    ),
    "Wan 2.2 5B": Case("WAN22_T2V", WAN | dict(out_dim=48, in_dim=48), (1, 48, 3, 8, 6), (16, 48)),
    "Wan 2.2 5B image to video": Case(
        "WAN22_T2V", WAN | dict(out_dim=48, in_dim=48), (1, 48, 3, 8, 6), (16, 48), first_frame=True
    ),
    "Wan 2.2 S2V": Case(
        "WAN22_S2V", WAN | dict(model_type="s2v", audio_dim=64, audio_inject_layers=[0, 2]), VIDEO, (16, 48),
        extra={"audio_embed": _random(1, 25, 64, 12), "reference_latents": _reference(1, 16, 1, 8, 6)},
    ),
    "Wan 2.1 HuMo": Case(
        "WAN21_HuMo", WAN | dict(model_type="humo", in_dim=36), VIDEO, (16, 48),
        extra={"audio_embed": _random(1, 3, 8, 5, 1280), "reference_latents": _reference(1, 16, 1, 8, 6)},
    ),
    "Wan 2.2 Animate": Case(
        "WAN22_Animate", WAN | dict(model_type="animate", in_dim=36, num_layers=6), VIDEO, (16, 48),
        extra={"pose_video_latent": _random(1, 16, 2, 8, 6)},
    ),
    "Wan 2.2 WanDancer": Case(
        "WAN22_WanDancer", WAN | dict(model_type="wandancer", in_dim=36, audio_inject_layers=[0, 2]), (1, 16, 3, 8, 16),
        (16, 48), extra={"audio_embed": _random(1, 24, 35)},  # its eight parts of a frame divide the tokens
    ),
    "Wan 2.1 SCAIL": Case(
        "WAN21_SCAIL", WAN | dict(model_type="scail", in_dim=20), VIDEO, (16, 48),
        extra={"pose_video_latent": _random(1, 16, 3, 8, 6), "reference_latents": _reference(1, 16, 1, 8, 6)},
    ),
    "Qwen-Image": Case("QwenImage", QWEN_IMAGE, (1, 16, 1, 12, 10), (7, 48)),
    "Qwen-Image Edit": Case(
        "QwenImage", QWEN_IMAGE, (1, 16, 1, 12, 10), (7, 48),
        extra={"reference_latents": _reference(1, 16, 1, 8, 8), "reference_latents_method": "index_timestep_zero"},
    ),
    "LTX-Video": Case("LTXV", LTXV, (1, 128, 3, 4, 4), (16, 48), extra={"attention_mask": _mask(16, 9)}),
    "LTX-2": Case(
        "LTXAV", LTX2, (1, 128, 3, 4, 4), (128, 48), extra={"unprocessed_ltxav_embeds": True}, audio=(1, 8, 10, 16)
    ),
    "Lumina 2": Case("Lumina2", LUMINA2, IMAGE, (7, 48), extra=ALL),
    "Z-Image": Case("Lumina2", Z_IMAGE, IMAGE, (7, 48), extra=ALL),
    "HiDream": Case("HiDream", HIDREAM, IMAGE, (7, 48), 64, LLAMA),
    "Kandinsky 5": Case("Kandinsky5", KANDINSKY5, VIDEO, (7, 48), 32),
    "Cosmos Predict 2": Case("CosmosT2IPredict2", COSMOS_PREDICT2, VIDEO, (7, 48)),
    "Anima": Case(
        "Anima", COSMOS_PREDICT2 | dict(image_model="anima", crossattn_emb_channels=1024), (1, 16, 1, 8, 6), (7, 1024)
    ),
    "AuraFlow": Case("AuraFlow", AURAFLOW, (1, 4, 12, 10), (7, 48)),
    "OmniGen 2": Case("Omnigen2", OMNIGEN2, IMAGE, (7, 48), extra=ALL),
    "Krea 2": Case("Krea2", KREA2, IMAGE, (7, 320)),
    "Ideogram 4": Case("Ideogram4", IDEOGRAM4, (1, 128, 6, 5), (7, 48)),
    "JoyImage": Case("JoyImage", JOYIMAGE, (1, 16, 1, 12, 10), (7, 48)),
    "Lens": Case("Lens", LENS, (1, 128, 6, 5), (7, 48)),
    "Mage Flow": Case("MageFlow", MAGE_FLOW, (1, 128, 6, 5), (7, 48)),
    "Boogu": Case("Boogu", BOOGU, IMAGE, (7, 48), extra=ALL),
    "PixArt Sigma": Case("PixArtSigma", PIXART, (1, 4, 64, 64), (7, 48)),
    "Ernie Image": Case("ErnieImage", ERNIE, (1, 128, 6, 5), (7, 48)),
}  # fmt: skip
CASES = {
    name: case for name, case in _ALL_CASES.items() if hasattr(comfy.supported_models, case.model)
}  # of this ComfyUI
WHOLE_FRAMES = ("Wan 2.2 S2V", "Wan 2.1 HuMo", "Wan 2.2 Animate", "Wan 2.2 WanDancer")
NOT_SHARED = [name for name in ("LTX-2", "PixArt Sigma", "Ernie Image", *WHOLE_FRAMES) if name in CASES]
