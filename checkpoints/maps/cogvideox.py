"""CogVideoX 2B, 5B and 1.5, text to video and image to video.

ComfyUI finds out from the weights how positions are embedded, and is right for 1.5 only; `settings` says what the
config does. 2B and 5B were trained on 720 x 480 alone; ComfyUI's positions are diffusers' at that size.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..keys import KeyMap, Weights, under

EMBEDDER = ("linear_1", "linear_2")
BLOCK: Weights = {
    "norm1.linear": "norm1.linear",
    "norm1.norm": "norm1.norm",
    "q": "attn1.to_q",
    "k": "attn1.to_k",
    "v": "attn1.to_v",
    "norm_q": "attn1.norm_q",
    "norm_k": "attn1.norm_k",
    "attn_out": "attn1.to_out.0",
    "norm2.linear": "norm2.linear",
    "norm2.norm": "norm2.norm",
    "ff_proj": "ff.net.0.proj",
    "ff_out": "ff.net.2",
}

OF_CLASS = dict(  # of diffusers' class, where a config is older than an entry
    use_rotary_positional_embeddings=False, patch_size_t=None, patch_size=2, num_attention_heads=30,
    attention_head_dim=64, sample_width=90, sample_height=60, sample_frames=49, temporal_compression_ratio=4,
    max_text_seq_length=226, spatial_interpolation_scale=1.875, temporal_interpolation_scale=1.0,
)  # fmt: skip


def settings(config: Mapping[str, Any], _pipeline: str) -> dict[str, Any]:
    """See SETTINGS."""
    if not config:
        raise ValueError("CogVideoX's config.json is missing, which says how positions are embedded: put it there.")
    config = {**OF_CLASS, **config}
    if config["patch_size_t"]:
        return {}
    if config["use_rotary_positional_embeddings"]:  # ComfyUI takes a model with learned positions for one without these
        return {"use_rotary_positional_embeddings": True, "spatial_interpolation_scale": 1.0}
    return {
        "use_rotary_positional_embeddings": False,
        "patch_embed.use_learned_positional_embeddings": True,
        "patch_embed.pos_embedding": _positions(config),
    }


def _positions(config: Mapping[str, Any]) -> Tensor:
    """CogVideoX 2B's fixed embeddings of positions (1, S, C), of a video of the size that it was trained on. S: those
    of the text, which are zero, then frames x height x width. Of the C channels a quarter is the frame's, three eighths
    are the column's and three eighths the row's."""
    channels = config["num_attention_heads"] * config["attention_head_dim"]
    patch, scale = config["patch_size"], config["spatial_interpolation_scale"]
    frames = (config["sample_frames"] - 1) // config["temporal_compression_ratio"] + 1
    height, width = config["sample_height"] // patch, config["sample_width"] // patch
    t = _sines(torch.arange(frames) / config["temporal_interpolation_scale"], channels // 4)
    x = _sines(torch.arange(width) / scale, channels // 8 * 3)
    y = _sines(torch.arange(height) / scale, channels // 8 * 3)
    video = (frames, height, width, -1)
    parts = (t[:, None, None].expand(video), x.expand(video), y[:, None].expand(video))
    positions = torch.cat(parts, dim=-1).reshape(1, -1, channels)
    return torch.cat((positions.new_zeros(1, config["max_text_seq_length"], channels), positions), dim=1)


def _sines(at: Tensor, channels: int) -> Tensor:
    """Sines, then cosines of positions (N,) at frequencies from 1 down to almost 1/10000: (N, channels)."""
    frequencies = 10000 ** -torch.linspace(0, 1, channels // 2 + 1, dtype=torch.float64)[:-1]
    angles = torch.outer(at.double(), frequencies)
    return torch.cat((angles.sin(), angles.cos()), dim=-1).float()


COGVIDEOX = KeyMap(
    classes=("CogVideoXTransformer3DModel",),
    weights={
        "patch_embed.proj": "patch_embed.proj",
        "patch_embed.text_proj": "patch_embed.text_proj",
        "patch_embed.pos_embedding": "patch_embed.pos_embedding",
        **{f"time_embedding_{name}": f"time_embedding.{name}" for name in EMBEDDER},
        **{f"ofs_embedding_{name}": f"ofs_embedding.{name}" for name in EMBEDDER},
        **under("blocks.*", "transformer_blocks.*", BLOCK),
        "norm_final": "norm_final",
        "norm_out.linear": "norm_out.linear",
        "norm_out.norm": "norm_out.norm",
        "proj_out": "proj_out",
    },
    blocks={"num_layers": "transformer_blocks.*"},
)
