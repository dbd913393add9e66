"""How a worker comes to the same model: the loader's recipe, and the patches that nodes have put on the weights.

Weights never travel. ComfyUI's loaders note on a ModelPatcher how to load it again; a worker does just that, with
weights of the type that ComfyUI chose in its own process: it chooses by the device, and devices may differ.
"""

import importlib
from typing import TYPE_CHECKING, Any

import comfy.weight_adapter
import torch
from comfy.cli_args import args

from ..attributes import changed
from ..checkpoints.loading import load_diffusers
from ..files import files_of
from .protocol import NotPlain, pack

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

Patches = dict[str, list[tuple]]
MODULE = "comfy.sd"  # whose loaders a worker calls, beside Skein's own
TYPES = {"float32": "fp32_unet", "bfloat16": "bf16_unet", "float16": "fp16_unet"}  # ComfyUI's options for each


def recipe_of(patcher: "ModelPatcher") -> dict[str, Any]:
    """How to load the model again, as plain data. Raises ValueError if its loader left no recipe that can travel."""
    recipe = patcher.cached_patcher_init
    if recipe is None or (recipe[0] is not load_diffusers and recipe[0].__module__ != MODULE):
        raise ValueError(
            "Context Parallel loads the model again in each worker, and this model's loader does not tell how; "
            "load it with Load Diffusion Model or Load Checkpoint (not GGUF, not a merged model)."
        )
    try:
        pack(recipe[1], [])
    except NotPlain as error:
        raise ValueError(f"Context Parallel cannot load this model again: {error}.") from error
    return {
        "loader": recipe[0].__name__,
        "arguments": list(recipe[1]),
        "index": recipe[2] if len(recipe) > 2 else None,
        "dtype": str(patcher.model.get_dtype()).removeprefix("torch."),
        "files": files_of(patcher),  # as ComfyUI loaded them: another file, another model
    }


def load(recipe: dict[str, Any]) -> "ModelPatcher":
    """The model of a recipe, by ComfyUI's loader."""
    options = [(args, option, dtype == recipe["dtype"]) for dtype, option in TYPES.items()]
    with changed(options if recipe["dtype"] in TYPES else []):
        own = recipe["loader"] == load_diffusers.__name__
        loader = load_diffusers if own else getattr(importlib.import_module(MODULE), recipe["loader"])
        loaded = loader(*recipe["arguments"])
    return loaded if recipe["index"] is None else loaded[recipe["index"]]


def inference_type(patcher: "ModelPatcher") -> torch.dtype:
    """The type that the model computes in, and that its inputs have: a node may have changed it (ModelComputeDtype)."""
    return patcher.get_model_object("manual_cast_dtype") or patcher.model.get_dtype()


def export_patches(patcher: "ModelPatcher") -> Patches:
    """The patches on the weights as plain data and tensors. Raises ValueError on one that is code."""
    exported: Patches = {}
    for key, patches in patcher.patches.items():
        for strength, value, strength_model, offset, function in patches:
            if function is not None:
                raise ValueError(f"Context Parallel cannot take a patch of {key} to the workers: it is a function.")
            exported.setdefault(key, []).append((strength, _export(value), strength_model, offset, None))
    try:
        pack(exported, [])
    except NotPlain as error:
        raise ValueError(f"Context Parallel cannot take a patch to the workers: {error}.") from error
    return exported


def import_patches(patches: Patches) -> Patches:
    """What export_patches() was given, in a worker; the tensors are copies on the CPU, where ComfyUI has them too."""
    return {
        key: [(strength, _import(value), *rest) for strength, value, *rest in several]
        for key, several in patches.items()
    }


def _export(value: Any) -> Any:
    if not isinstance(value, comfy.weight_adapter.WeightAdapterBase):
        return value
    return {"adapter": type(value).__name__, "keys": sorted(value.loaded_keys), "weights": value.weights}


def _import(value: Any) -> Any:
    if not isinstance(value, dict):
        return _copied(value)
    adapters = {adapter.__name__: adapter for adapter in comfy.weight_adapter.adapters}
    return adapters[value["adapter"]](set(value["keys"]), _copied(value["weights"]))


def _copied(value: Any) -> Any:
    """The tensors of a message lie in memory that the next message overwrites."""
    if isinstance(value, (list, tuple)):
        return type(value)(_copied(item) for item in value)
    return value.to("cpu", copy=True) if isinstance(value, torch.Tensor) else value
