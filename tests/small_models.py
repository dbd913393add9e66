"""Random HunyuanVideo checkpoints of any shape, saved to a real file and loaded by ComfyUI's own loader."""

import functools
import tempfile
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import comfy.ldm.hunyuan3d.model
import comfy.ldm.hunyuan_video.model
import comfy.sd
import pytest
import torch
from safetensors.torch import save_file
from skein.bench.random_model import HUNYUAN_VIDEO

# What moves between two devices needs two. Beside each such test stands one where the CPU's memory is both.
on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="moves weights off a GPU; SKEIN_DEVICES=0 lets it")

# What makes a HunyuanVideo 1.5 of it.
HUNYUAN_VIDEO_15 = dict(
    in_channels=65, out_channels=32, vec_in_dim=None, patch_size=(1, 1, 1), guidance_embed=False, byt5=True,
    use_cond_type_embedding=True, vision_in_dim=1152, meanflow_sum=True, depth=4, depth_single_blocks=0,
)  # fmt: skip


def around_the_text() -> dict:
    """What HunyuanVideo 1.5 takes beside the text: byt5's tokens, and those of an image."""
    vision = SimpleNamespace(last_hidden_state=torch.ones(1, 9, 1152))
    return {"conditioning_byt5small": torch.ones(1, 7, 1472), "clip_vision_output": vision}


def around_each_call(network: torch.nn.Module, name: str):
    """A model_function_wrapper such as other packs' caches have: something else in a network's place while it runs."""
    kept = getattr(network, name)
    another = torch.nn.ModuleList if isinstance(kept, torch.nn.ModuleList) else functools.partial

    def around(call, given):
        with mock.patch.object(network, name, another(kept)):
            return call(given["input"], given["timestep"], **given["c"])

    return around


def random_hunyuan_video(dtype: torch.dtype | None = None, **changes):
    """A ModelPatcher over a random HunyuanVideo, 2 + 2 blocks unless `changes` says otherwise. Stored in float32,
    loaded in `dtype` or what ComfyUI chooses."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        save_random_hunyuan_video(path, **changes)
        return comfy.sd.load_diffusion_model(str(path), model_options={"dtype": dtype} if dtype else {})


def save_random_hunyuan3d(path: Path) -> None:
    """A model that Skein does not know."""
    network = comfy.ldm.hunyuan3d.model.Hunyuan3Dv2(
        context_in_dim=64, hidden_size=256, depth=2, depth_single_blocks=2,
        device="cpu", dtype=torch.float32, operations=torch.nn,
    )  # fmt: skip
    save_file(network.state_dict(), str(path))


def save_random_hunyuan_video(path: Path, seed: int = 0, hidden_size: int = 256, **changes):
    sizes = dict(
        context_in_dim=64, hidden_size=hidden_size, num_heads=hidden_size // 128, depth=2, depth_single_blocks=2
    )
    settings = {**HUNYUAN_VIDEO, **sizes, **changes}
    torch.manual_seed(seed)
    network = comfy.ldm.hunyuan_video.model.HunyuanVideo(
        **settings, dtype=torch.float32, device="cpu", operations=torch.nn
    )
    save_file({key: value.contiguous() for key, value in network.state_dict().items()}, str(path))


def random_clip(seed: int = 0):
    """A CLIP-L, loaded by the names and shapes that tell ComfyUI's loader what it is; then all weights random."""
    key = "text_model.encoder.layers.1.mlp.fc1.weight"
    clip = comfy.sd.load_text_encoder_state_dicts([{key: torch.zeros(3072, 768)}])
    torch.manual_seed(seed)
    for name, parameter in clip.cond_stage_model.named_parameters():
        value = torch.randn(parameter.shape) * 0.03
        parameter.data.copy_(value + 1 if "norm" in name and name.endswith("weight") else value)
    return clip
