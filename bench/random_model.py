"""A HunyuanVideo of true size with random weights, through ComfyUI's own loader: true times and memory, no pictures.

Weights are Gaussian with a fixed seed, scaled so that hidden states keep their size; each kind of block is drawn once
and repeated, which saves host memory and changes no timing.
"""

import torch
from safetensors.torch import save_file

HIDDEN, HEADS, MLP = 3072, 24, 12288
DOUBLE, SINGLE = 20, 40  # blocks of the 13 B model
CONTEXT, VECTOR = 4096, 768


def _linear(name: str, outputs: int, inputs: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def _embedder(name: str, inputs: int, hidden: int) -> dict[str, tuple[int, ...]]:
    return {**_linear(f"{name}.in_layer", hidden, inputs), **_linear(f"{name}.out_layer", hidden, hidden)}


def _stem(hidden: int) -> dict[str, tuple[int, ...]]:
    shapes = {"img_in.proj.weight": (hidden, 16, 1, 2, 2), "img_in.proj.bias": (hidden,)}
    shapes |= _embedder("time_in", 256, hidden) | _embedder("vector_in", VECTOR, hidden)
    shapes |= _embedder("guidance_in", 256, hidden) | _embedder("txt_in.t_embedder", 256, hidden)
    shapes |= _embedder("txt_in.c_embedder", CONTEXT, hidden) | _linear("txt_in.input_embedder", hidden, CONTEXT)
    for i in range(2):
        block = f"txt_in.individual_token_refiner.blocks.{i}"
        for norm in ("norm1", "norm2"):
            shapes |= {f"{block}.{norm}.weight": (hidden,), f"{block}.{norm}.bias": (hidden,)}
        shapes |= _linear(f"{block}.self_attn.qkv", 3 * hidden, hidden) | _linear(f"{block}.mlp.0", 4 * hidden, hidden)
        shapes |= _linear(f"{block}.self_attn.proj", hidden, hidden) | _linear(f"{block}.mlp.2", hidden, 4 * hidden)
        shapes |= _linear(f"{block}.adaLN_modulation.1", 2 * hidden, hidden)
    shapes |= _linear("final_layer.linear", 64, hidden) | _linear("final_layer.adaLN_modulation.1", 2 * hidden, hidden)
    return shapes


def _double_block(hidden: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for stream in ("img", "txt"):
        shapes |= _linear(f"{stream}_mod.lin", 6 * hidden, hidden)
        shapes |= _linear(f"{stream}_attn.qkv", 3 * hidden, hidden) | _linear(f"{stream}_attn.proj", hidden, hidden)
        shapes |= _linear(f"{stream}_mlp.0", 4 * hidden, hidden) | _linear(f"{stream}_mlp.2", hidden, 4 * hidden)
        shapes |= {f"{stream}_attn.norm.{norm}.weight": (128,) for norm in ("query_norm", "key_norm")}
    return shapes


def _single_block(hidden: int) -> dict[str, tuple[int, ...]]:
    shapes = _linear("linear1", 7 * hidden, hidden) | _linear("linear2", hidden, 5 * hidden)
    shapes |= _linear("modulation.lin", 3 * hidden, hidden)
    return shapes | {f"norm.{norm}.weight": (128,) for norm in ("query_norm", "key_norm")}


def _draw(shapes: dict[str, tuple[int, ...]], generator: torch.Generator) -> dict[str, torch.Tensor]:
    tensors = {}
    for name, shape in shapes.items():
        if len(shape) == 1:
            value = torch.full(shape, float("norm" in name and name.endswith("weight")))
        else:
            fan_in = torch.Size(shape[1:]).numel()
            value = torch.randn(shape, generator=generator, device=generator.device) * fan_in**-0.5
        tensors[name] = value.to("cpu", torch.bfloat16)
    return tensors


def random_state_dict(double: int, single: int, hidden: int = HIDDEN, seed: int = 0) -> dict[str, torch.Tensor]:
    """A HunyuanVideo checkpoint in ComfyUI's keys, bfloat16 on the CPU. `hidden` is a multiple of 128."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(seed)
    state = _draw(_stem(hidden), generator)
    for blocks, count, shapes in (
        ("double_blocks", double, _double_block(hidden)),
        ("single_blocks", single, _single_block(hidden)),
    ):
        drawn = _draw(shapes, generator)
        state |= {f"{blocks}.{i}.{name}": value for i in range(count) for name, value in drawn.items()}
    return state


def random_model(double: int = DOUBLE, single: int = SINGLE, hidden: int = HIDDEN):
    """The model as ComfyUI's loader makes it (a ModelPatcher), bfloat16."""
    import comfy.sd

    return comfy.sd.load_diffusion_model_state_dict(
        random_state_dict(double, single, hidden), model_options={"dtype": torch.bfloat16}
    )


def random_checkpoint(folder: str, double: int = DOUBLE, single: int = SINGLE, hidden: int = HIDDEN) -> str:
    """The same as a file in a folder; its path. Workers load the model by ComfyUI's loader from there."""
    path = f"{folder}/random.safetensors"
    save_file({name: value.clone() for name, value in random_state_dict(double, single, hidden).items()}, path)
    return path


def latent_shape(width: int, height: int, frames: int) -> tuple[int, int, int, int, int]:
    """The latent (B, 16, T, H, W) of a video."""
    return 1, 16, (frames - 1) // 4 + 1, height // 8, width // 8


def conditioning(tokens: int, seed: int = 0, padded: int = 0) -> list:
    """Random text conditioning of some tokens, optionally padded to a length with its mask."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randn(1, padded or tokens, CONTEXT, generator=generator)
    extra: dict = {"pooled_output": torch.randn(1, VECTOR, generator=generator), "guidance": 6.0}
    if padded:
        extra["attention_mask"] = (torch.arange(padded) < tokens).long()[None]
    return [[text, extra]]
