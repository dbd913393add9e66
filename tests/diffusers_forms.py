"""The embedded demo model in diffusers' format. Other forms are in forms.py.

Each function makes one form in a folder and returns the path that its loader takes.
"""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import diffusers
import torch
from forms import demo_weights
from skein.checkpoints.keys import KeyMap, make, plan
from skein.checkpoints.maps.hunyuan_video import HUNYUAN_VIDEO
from torch import Tensor, nn


def diffusers_folder(folder: Path, shards: int = 3) -> Path:
    """A whole pipeline's folder, the transformer in shards with an index."""
    network = demo_in_diffusers()
    size = sum(weight.nbytes for weight in network.state_dict().values())
    network.save_pretrained(str(folder / "transformer"), max_shard_size=size // shards)
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "HunyuanVideoPipeline"}))
    return folder


def diffusers_file(folder: Path) -> Path:
    """The transformer's folder, in one file."""
    demo_in_diffusers().save_pretrained(str(folder))
    return folder / "diffusion_pytorch_model.safetensors"


FORMS: dict[str, Callable[[Path], Path]] = {
    "diffusers, a folder with shards": diffusers_folder,
    "diffusers, one file": diffusers_file,
}


def demo_in_diffusers() -> nn.Module:
    """diffusers' own class with the demo model's weights, of their type."""
    own = demo_weights()
    width, channels, *patch = own["img_in.proj.weight"].shape
    config = dict(
        in_channels=channels,
        out_channels=len(own["final_layer.linear.weight"]) // math.prod(patch),
        num_attention_heads=width // 128,
        attention_head_dim=128,
        num_layers=_count(own, "double_blocks"),
        num_single_layers=_count(own, "single_blocks"),
        guidance_embeds="guidance_in.in_layer.weight" in own,
        text_embed_dim=own["txt_in.input_embedder.weight"].shape[1],
        pooled_projection_dim=own["vector_in.in_layer.weight"].shape[1],
    )
    network = diffusers.HunyuanVideoTransformer3DModel(**config).to(own["img_in.proj.weight"].dtype)
    shapes = {key: weight.shape for key, weight in network.state_dict().items()}
    network.load_state_dict(backwards(HUNYUAN_VIDEO, own, shapes))
    return network


def backwards(known: KeyMap, own: dict[str, Tensor], shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """diffusers' weights of these shapes, from ComfyUI's: a map run backwards.

    It only moves numbers about. So it is run on the numbers of the places, and tells from where each one comes.
    """
    ends = torch.tensor([shape.numel() for shape in shapes.values()]).cumsum(0).tolist()
    places = {
        key: torch.arange(end - shape.numel(), end).view(shape) for end, (key, shape) in zip(ends, shapes.items())
    }
    planned, strange = plan(known, shapes)
    assert not strange and set(planned) == set(own)
    numbers = torch.empty(ends[-1], dtype=next(iter(own.values())).dtype)
    for name, made in planned.items():
        numbers[make(made, places)] = own[name].to(numbers.dtype)
    return {key: numbers[place] for key, place in places.items()}


def _count(own: dict[str, Tensor], blocks: str) -> int:
    return len({key.split(".")[1] for key in own if key.startswith(f"{blocks}.")})
