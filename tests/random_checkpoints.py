"""Random HunyuanVideo checkpoints that stay on disk, because workers load them again."""

import comfy.sd
import torch
from loras import with_lora as lora_on
from small_models import save_random_hunyuan_video

SMALL = dict(shape=(1, 16, 3, 8, 6), steps=2)
LORA = ["diffusion_model.double_blocks.0.img_attn.qkv", "diffusion_model.single_blocks.1.linear1"]


def random_model(folder, heads, dtype=None, **changes):
    """A ModelPatcher over 2 + 2 random blocks of so many heads, loaded from a file in `folder`. Stored in float32,
    loaded in `dtype` or what ComfyUI chooses."""
    path = folder / f"{heads}-{len(list(folder.iterdir()))}.safetensors"
    save_random_hunyuan_video(path, hidden_size=128 * heads, **changes)
    return comfy.sd.load_diffusion_model(str(path), model_options={"dtype": dtype} if dtype else {})


def text(length, batch=1, seed=3, **extra):
    """Conditioning of so many random tokens."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(batch, length, 64, generator=generator)
    return [[tokens, {"pooled_output": torch.randn(batch, 768, generator=generator), **extra}]]


def with_lora(model, strength=1.0):
    return lora_on(model, strength, LORA)
