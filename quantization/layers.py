"""Which layers are quantized, and what stands in the way."""

import logging
from functools import cache

import torch
from comfy.model_patcher import ModelPatcher
from torch import nn

from ..float8 import FP8
from ..models import TEXT_ENCODER_KEEPS, Network
from ..out_of_memory import is_out_of_memory
from ..plan import FP8Config
from .given import can_be_read, is_plain
from .linear import MULTIPLE, QuantizedLinear

logger = logging.getLogger("skein")

MISSING = "FP8 needs torchao: run `python -m pip install torchao` with ComfyUI's Python, then restart ComfyUI."
SCALED = (
    "The checkpoint is already quantized, to fewer bits than FP8 or to a form that gains nothing by it; it runs as it "
    "is loaded, without Skein's FP8."
)
NONE_FIT = (
    "No layer of this model's blocks has sizes that FP8 can compute (multiples of 16); it runs as ComfyUI loads it."
)
OLD_GPU = "This GPU cannot run the chosen mode (FP8 needs compute capability 8.9); {} is used instead"


def require_torchao() -> None:
    """Raises ValueError if torchao is not installed."""
    try:
        import torchao.quantization  # noqa: F401
    except ImportError as error:
        raise ValueError(MISSING) from error


def require_float8(device: torch.device) -> None:
    """Raises ValueError if a device has no type of 8-bit floats."""
    try:
        torch.empty(1, dtype=FP8, device=device)
    except TypeError as error:
        raise ValueError(f"This device ({device}) cannot store FP8 weights; remove Skein's FP8 node.") from error


@cache
def supported_mode(mode: str, device: torch.device) -> str:
    """The mode itself, or the nearest one that the device can do: it is tried on a small product.

    FP8 products need compute capability 8.9, one scale per row more than some of those GPUs and older PyTorchs have.
    """
    if mode == "weight_only":
        return mode
    for candidate in dict.fromkeys((mode, "per_tensor")):
        try:
            ones = torch.ones(32, 32, device=device, dtype=torch.bfloat16)
            QuantizedLinear(ones, None, candidate)(ones)
        except (RuntimeError, ValueError) as error:  # a product that the device lacks: the type differs by version
            if is_out_of_memory(error):
                raise  # says nothing about what the device can do
            logger.info("Skein FP8: %s cannot run on %s (%s)", candidate, device, str(error).partition("\n")[0])
            continue
        return candidate
    return "weight_only"


def block_layers(model: nn.Module, config: FP8Config, mode: str) -> dict[str, str] | None:
    """Paths of the Linear layers in a model's blocks, in running order -> mode; None if FP8 leaves them as they are,
    because they are quantized already (given.py).

    Raises ValueError if the architecture is not known.
    """
    layers: dict[str, str] = {}
    for block in Network(model.get_submodule("diffusion_model")).blocks:
        for name, layer in block.module.named_modules():
            if left_as_it_is(layer):
                return None
            if quantizable(layer):
                modulation = block.is_modulation(name)
                if not modulation or config.modulation:
                    layers[f"diffusion_model.{block.path}.{name}"] = "weight_only" if modulation else mode
    return layers


def is_quantized(model: nn.Module) -> bool:
    """Whether a model's blocks are quantized already so that FP8 leaves it as it is."""
    try:
        blocks = Network(model.get_submodule("diffusion_model")).blocks
    except ValueError:
        return False
    return any(left_as_it_is(layer) for block in blocks for layer in block.module.modules())


def computes_in_fp8(device: torch.device) -> bool:
    """Whether a device is faster in FP8 than in 16 bits."""
    return device.type == "cuda" and supported_mode("per_row", device) != "weight_only"


def saved_bytes(model: nn.Module, config: FP8Config) -> int:
    """Bytes that FP8 takes off a model's weights, without their scales. Raises ValueError if the architecture is not
    known."""
    weights = [model.get_parameter(f"{path}.weight") for path in block_layers(model, config, config.mode) or ()]
    return sum(weight.nbytes - weight.shape.numel() for weight in weights)


def text_layers(model: nn.Module) -> dict[str, str] | None:
    """The same for a text encoder: all its Linear layers but heads, weight-only."""
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    layers: dict[str, str] = {}
    for name, layer in model.named_modules():
        if already_quantized(layer):
            return None
        head = name.rsplit(".", 1)[-1] in TEXT_ENCODER_KEEPS
        if quantizable(layer) and not head and id(layer.weight) not in embeddings:
            layers[name] = "weight_only"
    return layers


def already_quantized(layer: nn.Module) -> bool:
    """Whether the weight is a tensor subclass: ComfyUI's scaled FP8, GGUF, another torchao."""
    weight = layer._parameters.get("weight")
    return weight is not None and not is_plain(weight)


def left_as_it_is(layer: nn.Module) -> bool:
    """Whether the weight is quantized already so that FP8 cannot take its place."""
    weight = layer._parameters.get("weight")
    return weight is not None and not is_plain(weight) and not can_be_read(weight)


def quantizable(layer: nn.Module) -> bool:
    weight = layer._parameters.get("weight")
    if weight is None or len(weight.shape) != 2 or any(size % MULTIPLE for size in weight.shape):
        return False
    if already_quantized(layer):  # ComfyUI's layer for these is no nn.Linear
        return hasattr(layer, "in_features") and can_be_read(weight)
    return isinstance(layer, nn.Linear) and weight.is_floating_point()


def refuse_conflicts(patcher: ModelPatcher, layers: dict[str, str]) -> None:
    """Raises ValueError if another node has put something on the quantized layers that a twin cannot take over; what
    does not depend on the layers is in conflicts.py."""
    keys = {f"{name}.{part}" for name in layers for part in ("weight", "bias")}
    if any(keys.intersection(patches) for patches in patcher.hook_patches.values()):
        raise ValueError("A scheduled LoRA cannot change FP8 weights; load the LoRA with a LoRA node, or remove FP8.")
    for path in patcher.object_patches:
        if any(path == name or path.startswith(f"{name}.") or name.startswith(f"{path}.") for name in layers):
            raise ValueError(f"Another node has replaced {path}, which FP8 would replace too; remove one of them.")
