"""Models of video that diffusers judges. Conventions are those of diffusers' pipelines, which each function names."""

from collections.abc import Callable
from typing import Any

import torch
from diffusers.models.attention import FeedForward
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from diffusers.pipelines.ltx.pipeline_ltx_condition import LTXConditionPipeline
from judge import Case, Given, randoms
from torch import Tensor, nn

SINCE = (0, 30, 0)  # the first ComfyUI of those supported that has CogVideoX
SIGMA = 0.7
TIME = torch.tensor([1000 * SIGMA])
TEXT = 4096  # T5's width, which ComfyUI takes for granted


def wan(channels: int = 16, image: int = 0, frames: bool = False, control: bool = False) -> Callable:
    """WanPipeline: timestep sigma * 1000 in both. image: so many images' tokens of CLIP (WanImageToVideoPipeline; text
    of 512 tokens, as diffusers has it there). frames: the first frame is given, at timestep 0: diffusers is told each
    token's timestep, ComfyUI each frame's (TI2V 5B). control: VACE's context, at strength 1 in both."""

    def inputs() -> tuple[Given, Given]:
        latent, text, clip, vace = randoms(
            (1, channels, 3, 8, 6), (1, 512 if image else 12, TEXT), (image or 1, 257, 1280), (1, 96, 3, 8, 6)
        )
        theirs: Given = dict(hidden_states=latent, timestep=TIME, encoder_hidden_states=text)
        ours: Given = dict(x=latent, timestep=TIME, context=text)
        if image:
            theirs["encoder_hidden_states_image"], ours["clip_fea"] = clip, clip.reshape(1, -1, 1280)
        if frames:
            each = torch.cat((torch.zeros(1), TIME, TIME))[None]
            theirs["timestep"], ours["timestep"] = each.repeat_interleave(12, dim=1), each
        if control:
            theirs["control_hidden_states"] = vace
            ours |= dict(vace_context=vace[:, None], vace_strength=[1.0])
        return theirs, ours

    return inputs


def ltx(causal: bool, kept: int) -> Callable:
    """LTXPipeline, and causal: LTXConditionPipeline, whose first frame is one frame and not eight. Latents are tokens;
    timestep sigma * 1000 there, sigma here; 25 frames a second; of 16 tokens of text so many are kept."""

    def inputs() -> tuple[Given, Given]:
        latent, text = randoms((1, 128, 3, 4, 4), (1, 16, TEXT))
        mask = (torch.arange(16) < kept).long()[None]
        theirs: Given = dict(
            hidden_states=latent.flatten(2).transpose(1, 2), encoder_hidden_states=text, timestep=TIME,
            encoder_attention_mask=mask,
        )  # fmt: skip
        if causal:
            at = LTXConditionPipeline._scale_video_ids(LTXConditionPipeline._prepare_video_ids(1, 3, 4, 4)).float()
            at[:, 0] /= 25
            theirs["video_coords"] = at
        else:
            theirs |= dict(num_frames=3, height=4, width=4, rope_interpolation_scale=(8 / 25, 32, 32))
        return theirs, dict(x=latent, timestep=torch.tensor([SIGMA]), context=text, attention_mask=mask)

    return inputs


def ltx_video(tokens: Tensor) -> Tensor:
    return tokens.transpose(1, 2).unflatten(2, (3, 4, 4))


def cogvideox(shape: tuple[int, ...], rotary: bool = True, image: bool = False, offset: bool = False) -> Callable:
    """CogVideoXPipeline and CogVideoXImageToVideoPipeline: frames before channels; the same timestep; rotary factors as
    their _prepare_rotary_positional_embeddings makes them of a video of the trained size. offset: 1.5, with two frames
    a token; its image to video is told 2.0."""

    def inputs() -> tuple[Given, Given]:
        latent, text = randoms((1, 32 if image else 16, *shape), (1, 226, 48))
        theirs: Given = dict(hidden_states=latent.transpose(1, 2), encoder_hidden_states=text, timestep=TIME)
        ours: Given = dict(x=latent, timestep=TIME, context=text)
        grid = (shape[1] // 2, shape[2] // 2)
        if offset:
            theirs["image_rotary_emb"] = get_3d_rotary_pos_embed(
                64, None, grid, shape[0] // 2, grid_type="slice", max_size=(150, 150)
            )
            theirs["ofs"] = ours["ofs"] = torch.tensor([2.0])
        elif rotary:
            theirs["image_rotary_emb"] = get_3d_rotary_pos_embed(64, ((0, 0), grid), grid, shape[0])
        return theirs, ours

    return inputs


def frames_second(output: Tensor) -> Tensor:
    return output.transpose(1, 2)


def mochi() -> tuple[Given, Given]:
    """MochiPipeline: its time goes from 0 to 1000, and the output is the opposite of ComfyUI's; 11 of 256 tokens of
    text are kept."""
    latent, text = randoms((1, 12, 3, 8, 6), (1, 256, 64))
    mask = (torch.arange(256) < 11).long()[None]
    theirs: Given = dict(
        hidden_states=latent, encoder_hidden_states=text, timestep=1000 - TIME, encoder_attention_mask=mask
    )
    ours: Given = dict(x=latent, timestep=TIME / 1000, context=text, attention_mask=mask, num_tokens=11)
    return theirs, ours


def mochi_feed_forward(network: nn.Module) -> None:
    """ComfyUI's Mochi has one width inside of the image's feed forward, whatever the others."""
    for block in network.transformer_blocks:
        block.ff = FeedForward(256, inner_dim=8192, activation_fn="swiglu", bias=False)


def opposite(output: Tensor) -> Tensor:
    return -output


def kandinsky5() -> tuple[Given, Given]:
    """Kandinsky5T2VPipeline: channels last; the scheduler's timestep in both; positions of 512 x 768."""
    latent, text, pooled = randoms((1, 33, 3, 8, 6), (1, 12, 3584), (1, 768))
    theirs: Given = dict(
        hidden_states=latent.permute(0, 2, 3, 4, 1), encoder_hidden_states=text, timestep=TIME,
        pooled_projections=pooled, visual_rope_pos=(torch.arange(3), torch.arange(4), torch.arange(3)),
        text_rope_pos=torch.arange(12), scale_factor=(1.0, 2.0, 2.0),
    )  # fmt: skip
    return theirs, dict(x=latent, timestep=TIME, context=text, y=pooled)


def cosmos() -> tuple[Given, Given]:
    """Cosmos2TextToImagePipeline: the same time in both; nothing of the image is padding."""
    latent, text = randoms((1, 16, 3, 8, 6), (1, 12, 1024))
    time = torch.tensor([SIGMA])
    theirs: Given = dict(
        hidden_states=latent, timestep=time, encoder_hidden_states=text, padding_mask=torch.zeros(1, 1, 64, 48)
    )
    return theirs, dict(x=latent, timesteps=time, context=text)


WAN: dict[str, Any] = dict(num_attention_heads=2, attention_head_dim=128, ffn_dim=64, num_layers=2)
WAN_IMAGE = WAN | dict(in_channels=36, image_dim=1280, added_kv_proj_dim=256)
VACE = WAN | dict(num_layers=4, vace_layers=[0, 2], in_channels=16, vace_in_channels=96)
LTX = dict(num_attention_heads=32, attention_head_dim=8, cross_attention_dim=256, num_layers=2)
COG: dict[str, Any] = dict(num_attention_heads=3, time_embed_dim=64, text_embed_dim=48, num_layers=2)
SMALL = dict(sample_height=8, sample_width=6, sample_frames=9)  # the trained size
COG_15 = dict(patch_size_t=2, sample_height=300, sample_width=300, sample_frames=81)

CASES = {
    "Wan 2.1": Case("WanTransformer3DModel", WAN, wan()),
    "Wan 2.1 image to video": Case("WanTransformer3DModel", WAN_IMAGE, wan(36, image=1)),
    "Wan 2.1 first and last frame": Case(
        "WanTransformer3DModel", WAN_IMAGE | dict(pos_embed_seq_len=514), wan(36, image=2)
    ),
    "Wan 2.2 image to video": Case("WanTransformer3DModel", WAN | dict(in_channels=36), wan(36)),
    "Wan 2.2 5B": Case("WanTransformer3DModel", WAN | dict(in_channels=48, out_channels=48), wan(48, frames=True)),
    "SkyReels V2": Case("SkyReelsV2Transformer3DModel", WAN, wan()),
    "Wan 2.1 VACE": Case("WanVACETransformer3DModel", VACE, wan(control=True)),
    "LTX-Video": Case("LTXVideoTransformer3DModel", LTX, ltx(causal=False, kept=9), ltx_video),
    "LTX-Video 0.9.5 and later": Case(
        "LTXVideoTransformer3DModel",
        LTX,
        ltx(causal=True, kept=16),
        ltx_video,
        pipeline="LTXConditionPipeline",
    ),
    "CogVideoX 2B": Case(
        "CogVideoXTransformer3DModel", COG | SMALL, cogvideox((3, 8, 6), rotary=False), frames_second, since=SINCE
    ),
    "CogVideoX 5B": Case(
        "CogVideoXTransformer3DModel",
        COG | SMALL | dict(use_rotary_positional_embeddings=True),
        cogvideox((3, 8, 6)),
        frames_second,
        since=SINCE,
    ),
    "CogVideoX 5B image to video": Case(  # its learned positions have the released size in ComfyUI
        "CogVideoXTransformer3DModel",
        COG | dict(in_channels=32, use_rotary_positional_embeddings=True, use_learned_positional_embeddings=True),
        cogvideox((1, 60, 90), image=True),
        frames_second,
        since=SINCE,
    ),
    "CogVideoX 1.5 image to video": Case(
        "CogVideoXTransformer3DModel",
        COG
        | COG_15
        | dict(time_embed_dim=512, ofs_embed_dim=512, in_channels=32, use_rotary_positional_embeddings=True),
        cogvideox((4, 8, 6), image=True, offset=True),
        frames_second,
        since=SINCE,
    ),
    "Mochi": Case(
        "MochiTransformer3DModel",
        dict(num_attention_heads=2, num_layers=3, pooled_projection_dim=96, text_embed_dim=64),
        mochi,
        opposite,
        fit=mochi_feed_forward,
        sizes=dict(depth=3, num_heads=2, hidden_size_x=256, hidden_size_y=96, mlp_ratio_x=48.0, t5_feat_dim=64),
    ),
    "Kandinsky 5": Case(
        "Kandinsky5Transformer3DModel",
        dict(
            in_visual_dim=16,
            out_visual_dim=16,
            time_dim=64,
            model_dim=256,
            ff_dim=128,
            num_text_blocks=1,
            num_visual_blocks=2,
            axes_dims=(32, 48, 48),
            visual_cond=True,
        ),
        kandinsky5,
        lambda output: output[None].permute(0, 4, 1, 2, 3),
        bound=1e-3,  # diffusers rounds queries and keys to bfloat16, whatever the model's type
        sizes=dict(axes_dims=(32, 48, 48)),
    ),
    "Cosmos Predict 2": Case(
        "CosmosTransformer3DModel",
        dict(
            in_channels=16,
            out_channels=16,
            num_attention_heads=2,
            num_layers=2,
            rope_scale=(1.0, 4.0, 4.0),
            extra_pos_embed_type=None,
        ),
        cosmos,
        sizes=dict(num_blocks=2, num_heads=2),
    ),
}
