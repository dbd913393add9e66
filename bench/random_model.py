"""Models of true size with random weights: true times and memory, no pictures.

Each kind of block is drawn once, which saves host memory and changes no timing. Text is as long as ComfyUI's nodes make
it for a prompt of a few sentences.
"""

from argparse import ArgumentParser, Namespace
from dataclasses import replace

import torch
from safetensors.torch import save_file

from .cases import Case

HIDDEN = 3072
DOUBLE, SINGLE = 20, 40  # blocks of HunyuanVideo 13 B
CONTEXT, VECTOR = 4096, 768

FLUX_BLOCKS = {"double_blocks": "depth", "single_blocks": "depth_single_blocks"}
HUNYUAN_VIDEO = dict(
    image_model="hunyuan_video", in_channels=16, out_channels=16, vec_in_dim=VECTOR, context_in_dim=CONTEXT,
    hidden_size=HIDDEN, mlp_ratio=4.0, num_heads=24, depth=DOUBLE, depth_single_blocks=SINGLE, axes_dim=[16, 56, 56],
    theta=256, patch_size=[1, 2, 2], qkv_bias=True, guidance_embed=True, byt5=False, meanflow=False,
    use_cond_type_embedding=False, vision_in_dim=None, meanflow_sum=False,
)  # fmt: skip
FLUX_DEV = dict(
    image_model="flux", in_channels=16, out_channels=16, vec_in_dim=768, context_in_dim=4096, hidden_size=3072,
    mlp_ratio=4.0, num_heads=24, depth=19, depth_single_blocks=38, axes_dim=[16, 56, 56], theta=10000, patch_size=2,
    qkv_bias=True, guidance_embed=True, txt_ids_dims=[], yak_mlp=False, txt_norm=False,
)  # fmt: skip
SD35_LARGE = dict(
    in_channels=16, patch_size=2, out_channels=16, depth=38, num_blocks=38, input_size=None, adm_in_channels=2048,
    context_embedder_config={"target": "torch.nn.Linear", "params": {"in_features": 4096, "out_features": 2432}},
    num_patches=192 * 192, pos_embed_max_size=192, pos_embed_scaling_factor=None, qk_norm="rms",
    x_block_self_attn_layers=[],
)  # fmt: skip
WAN_14B = dict(
    image_model="wan2.1", model_type="t2v", dim=5120, out_dim=16, num_heads=40, ffn_dim=13824, num_layers=40,
    patch_size=(1, 2, 2), freq_dim=256, window_size=(-1, -1), qk_norm=True, cross_attn_norm=True, eps=1e-6, in_dim=16,
    text_dim=4096,
)  # fmt: skip
COGVIDEOX_5B = dict(
    image_model="cogvideox", num_attention_heads=48, attention_head_dim=64, time_embed_dim=512, num_layers=42,
    in_channels=16, patch_size=2, text_embed_dim=4096, use_learned_positional_embeddings=False,
    use_rotary_positional_embeddings=True,
)  # fmt: skip
MOCHI = dict(
    image_model="mochi_preview", depth=48, patch_size=2, num_heads=24, hidden_size_x=3072, hidden_size_y=1536,
    mlp_ratio_x=4.0, mlp_ratio_y=4.0, learn_sigma=False, in_channels=12, qk_norm=True, qkv_bias=False, out_bias=True,
    attn_drop=0.0, patch_embed_bias=True, posenc_preserve_area=True, timestep_mlp_bias=True, attend_to_padding=False,
    timestep_scale=1000.0, use_t5=True, t5_feat_dim=4096, t5_token_length=256, rope_theta=10000.0,
)  # fmt: skip
QWEN_IMAGE = dict(
    image_model="qwen_image", in_channels=64, num_layers=60, attention_head_dim=128, num_attention_heads=24,
    joint_attention_dim=3584,
)  # fmt: skip
MODELS = {
    "HunyuanVideo": Case(  # 1280 x 720, 129 frames
        "HunyuanVideo", HUNYUAN_VIDEO, (1, 16, 33, 90, 160), (60, CONTEXT), VECTOR, {"guidance": 6.0},
        blocks=FLUX_BLOCKS,
    ),
    "FLUX.1 dev": Case(  # 1024 x 1024
        "Flux", FLUX_DEV, (1, 16, 128, 128), (256, 4096), 768, {"guidance": 3.5}, blocks=FLUX_BLOCKS
    ),
    "SD3.5 large": Case(  # 1024 x 1024
        "SD3", SD35_LARGE, (1, 16, 128, 128), (154, 4096), 2048, blocks={"joint_blocks": "num_blocks"}
    ),
    "Wan 2.2 14B": Case(  # 1280 x 720, 81 frames
        "WAN21_T2V", WAN_14B, (1, 16, 21, 90, 160), (512, 4096), blocks={"blocks": "num_layers"}
    ),
    "CogVideoX 5B": Case(  # 720 x 480, 49 frames
        "CogVideoX_T2V", COGVIDEOX_5B, (1, 16, 13, 60, 90), (226, 4096), blocks={"blocks": "num_layers"}
    ),
    "Mochi": Case(  # 848 x 480, 163 frames
        "GenmoMochi", MOCHI, (1, 12, 28, 60, 106), (256, 4096),
        extra={"attention_mask": (torch.arange(256) < 60).long()[None]}, blocks={"blocks": "depth"},
    ),
    "Qwen-Image": Case(  # 1328 x 1328
        "QwenImage", QWEN_IMAGE, (1, 16, 1, 166, 166), (60, 3584), blocks={"transformer_blocks": "num_layers"}
    ),
}  # fmt: skip


def add_arguments(parser: ArgumentParser, model: str = "HunyuanVideo") -> None:
    """Which model, and of what size: see `chosen`."""
    parser.add_argument("--model", default=model, choices=list(MODELS))
    parser.add_argument("--blocks", type=int, nargs="*", default=[], help="how many of each stack are built; all")
    parser.add_argument("--latent", type=int, nargs="*", default=[], help="its shape, B C T H W or B C H W")


def chosen(options: Namespace) -> Case:
    """The model that add_arguments's options name, with their blocks and latent."""
    case = MODELS[options.model]
    return replace(shortened(case, options.blocks), latent=tuple(options.latent) or case.latent)


def inputs(case: Case, steps: int) -> dict:
    """What a model is sampled with (demo.sampling.sample)."""
    return {
        "positive": case.conditioning(0), "negative": case.conditioning(1), "latent": torch.zeros(case.latent),
        "steps": steps,
    }  # fmt: skip


def shortened(case: Case, counts: list[int]) -> Case:
    """The model with so many blocks of each stack, as many as it has where none are given."""
    if not counts:
        return case
    if len(counts) != len(case.blocks):
        raise ValueError(f"Give {len(case.blocks)} numbers of blocks, of {', '.join(case.blocks)}; not {len(counts)}.")
    return replace(case, config={**case.config, **dict(zip(case.blocks.values(), counts))})


def random_model(case: Case):
    """A ModelPatcher in bfloat16, for ComfyUI's device."""
    import comfy.model_management

    return case.patcher(dtype=torch.bfloat16, device=comfy.model_management.get_torch_device())


def hunyuan_video(double: int = DOUBLE, single: int = SINGLE, hidden: int = HIDDEN) -> Case:
    """HunyuanVideo with so many blocks of such a width, a multiple of 128."""
    case = shortened(MODELS["HunyuanVideo"], [double, single])
    return replace(case, config={**case.config, "hidden_size": hidden, "num_heads": hidden // 128})


def random_checkpoint(folder: str, case: Case) -> str:
    """A model as a file in a folder; its path. Workers load it by ComfyUI's loader from there.

    ComfyUI takes SD3 and Mochi to have all of their blocks, others as many as are in the file.
    """
    state = random_model(case).model.diffusion_model.state_dict()
    path = f"{folder}/random.safetensors"
    save_file({name: value.clone() for name, value in state.items()}, path)
    return path


def latent_shape(width: int, height: int, frames: int) -> tuple[int, int, int, int, int]:
    """The latent (B, 16, T, H, W) of a video of HunyuanVideo."""
    return 1, 16, (frames - 1) // 4 + 1, height // 8, width // 8


def conditioning(tokens: int, seed: int = 0, padded: int = 0) -> list:
    """HunyuanVideo's text conditioning of some tokens, optionally padded to a length with its mask."""
    ((text, extra),) = MODELS["HunyuanVideo"].conditioning(seed, padded or tokens)
    if padded:
        extra["attention_mask"] = (torch.arange(padded) < tokens).long()[None]
    return [[text, extra]]
