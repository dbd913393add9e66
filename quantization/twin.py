"""The FP8 twin of a model: the same model with its blocks' linear layers in FP8, under a ModelPatcher of its own.

ComfyUI merges a LoRA into a layer's weight when it loads the layer. On an FP8 weight it would be rounded twice or lost.
So the twin is made from the model's own weights with their patches merged first, by ComfyUI's own function, and
quantized after; those patches are done then, all others stay on the twin and go ComfyUI's way. To ComfyUI the twin is
one more model, of half the size: it is loaded, in part if need be, unloaded and counted like any other.

A twin lives as long as its model. Layers are made anew only when their patches have changed. What is not quantized
shares its memory with the model, as long as both are in main memory.
"""

import copy
import logging
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import comfy.model_management as memory
import comfy.utils
import torch
from torch import nn

from .linear import ALIGNMENT, FP8, QuantizedLinear, supported_mode

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

logger = logging.getLogger("skein")

PARAMETERS = ("weight", "bias")


@dataclass
class _Twin:
    """mode: by layer. merged: the patches in each layer. root: keeps ComfyUI's view of the model alive."""

    mode: dict[str, str]
    model: nn.Module
    root: Any
    merged: dict[str, list] = field(default_factory=dict)


_twins: "WeakKeyDictionary[nn.Module, _Twin]" = WeakKeyDictionary()


def quantized(patcher: "ModelPatcher", layers: dict[str, str], done: str = "FP8") -> tuple["ModelPatcher", str]:
    """The twin's patcher for a model's patcher, and a sentence on what was done.

    layers: mode by layer, as attribute paths from the patcher's model. Those that hold no wide floating-point
    weight (checkpoints that are FP8 already) are left alone; with none left the patcher comes back as it is.
    Raises ValueError on what FP8 layers cannot honour; running out of memory leaves no half-made twin.
    """
    layers, left_out = _eligible(patcher, layers)
    if not layers:
        return patcher, f"{done}: this checkpoint's layers are quantized already; ComfyUI runs them as they are"
    _refuse_what_would_be_lost(patcher, layers)
    twin = _twins.get(patcher.model)
    if twin is None or twin.mode != layers:
        _twins.pop(patcher.model, None)
        twin = _build(patcher, layers)
        changed = list(layers)
    else:
        changed = [layer for layer in layers if not _same(twin.merged[layer], _patches(patcher, layer))]
    started = time.perf_counter()
    if changed:
        _quantize_layers(patcher, twin, changed)
        _twins[patcher.model] = twin
    patched = sum(any(patches) for patches in twin.merged.values())
    size = memory.module_size(twin.model)
    sentence = (
        f"{done}: {_gigabytes(memory.module_size(patcher.model))} -> {_gigabytes(size)} GB, {len(layers)} layers "
        + " and ".join(sorted(set(twin.mode.values())))
        + (f", LoRA merged into {patched}" if patched else "")
        + (f", {left_out} left as they are" if left_out else "")
        + (f"; {len(changed)} quantized in {time.perf_counter() - started:.1f} s" if changed else "")
    )
    return _patcher_over(twin, patcher), sentence


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.3g}"


def _eligible(patcher: "ModelPatcher", layers: dict[str, str]) -> tuple[dict[str, str], int]:
    """The layers that can be quantized, with the mode that the GPU runs; how many cannot."""
    eligible = {}
    for layer, mode in layers.items():
        module = comfy.utils.get_attr(patcher.model, layer)
        weight = getattr(module, "weight", None)
        plain = isinstance(module, nn.Linear) and type(weight) in (nn.Parameter, torch.Tensor)
        if not plain or not weight.is_floating_point() or any(size % ALIGNMENT for size in weight.shape):
            continue
        eligible[layer] = supported_mode(mode, patcher.load_device)
    return eligible, len(layers) - len(eligible)


def _refuse_what_would_be_lost(patcher: "ModelPatcher", layers: Iterable[str]) -> None:
    keys = {f"{layer}.{name}" for layer in layers for name in PARAMETERS}
    if any(keys & set(patches) for patches in patcher.hook_patches.values()):
        raise ValueError("FP8 cannot follow LoRA hooks, which change weights during sampling; remove one of the two.")
    for path in (*patcher.object_patches, *patcher.weight_wrapper_patches):
        if any(f"{layer}.".startswith(f"{path}.") or path.startswith(f"{layer}.") for layer in layers):
            raise ValueError(f"FP8 would undo another node's patch of {path}; remove that node or the FP8 node.")


def _patches(patcher: "ModelPatcher", layer: str) -> list[tuple]:
    """What ComfyUI would merge into a layer."""
    return [(name, *patch) for name in PARAMETERS for patch in patcher.patches.get(f"{layer}.{name}", ())]


def _same(one: list[tuple], other: list[tuple]) -> bool:
    """Whether two lists hold the same patches at the same strengths: patches are compared as objects, not by value."""
    numbers = (str, int, float)
    return len(one) == len(other) and all(
        a is b or (isinstance(a, numbers) and a == b) for p, q in zip(one, other) for a, b in zip(p, q)
    )


def _build(patcher: "ModelPatcher", layers: dict[str, str]) -> _Twin:
    """A copy of the model's structure, its tensors shared, its layers to be filled."""
    patcher.detach()  # clean weights, in main memory
    model = _structure(patcher.model, {})
    model.current_patcher = None
    model.model_loaded_weight_memory = 0
    root = patcher.clone(model_override=(model, ({}, {}, {}, set())))
    root.parent = None
    return _Twin(layers, model, root)


def _structure(module: nn.Module, parameters: dict[int, nn.Parameter]) -> nn.Module:
    """New modules and parameters all the way down, over the same tensors: what is done to one is not done to the other.
    Everything else (settings, tables) is read only and shared."""
    for parameter in [p for p in module._parameters.values() if p is not None]:
        parameters.setdefault(id(parameter), nn.Parameter(parameter.data, requires_grad=False))
    twin = object.__new__(type(module))
    for name, value in vars(module).items():
        twin.__dict__[name] = copy.copy(value) if isinstance(value, (dict, list, set)) else value
    twin._parameters = {n: None if p is None else parameters[id(p)] for n, p in module._parameters.items()}
    twin._modules = {n: None if m is None else _structure(m, parameters) for n, m in module._modules.items()}
    return twin


def _quantize_layers(patcher: "ModelPatcher", twin: _Twin, layers: list[str]) -> None:
    """Merge, quantize and put in place, one layer at a time on the GPU. All or nothing for the caller: a twin that
    raised is not kept."""
    patcher.detach()
    twin.root.detach()
    _twins.pop(patcher.model, None)
    device, target = patcher.load_device, patcher.offload_device
    width = torch.float16 if device.type == "mps" else torch.bfloat16
    size = sum(comfy.utils.get_attr(patcher.model, f"{layer}.weight").numel() for layer in layers)
    memory.free_memory(2 * size, device)
    if memory.get_free_memory(device) > 3 * size:  # ComfyUI would bring it here next anyway
        target = device
    for layer in layers:
        memory.throw_exception_if_processing_interrupted()
        source = comfy.utils.get_attr(patcher.model, layer)
        tensors = [
            None if getattr(source, name, None) is None else _merged(patcher, f"{layer}.{name}", device, width)
            for name in PARAMETERS
        ]
        made = QuantizedLinear(*tensors, mode=twin.mode[layer]).to(target)
        comfy.utils.set_attr(twin.model, layer, made)
        twin.merged[layer] = _patches(patcher, layer)
        del tensors
    twin.root.size = 0  # counted anew


def _merged(patcher: "ModelPatcher", key: str, device: torch.device, width: torch.dtype) -> torch.Tensor:
    """A parameter as ComfyUI would have patched it, on the device."""
    value = patcher.patch_weight_to_device(key, device_to=device, return_weight=True).detach().to(device)
    return value.to(width) if value.dtype == FP8 or value.dtype == torch.float8_e5m2 else value


def _patcher_over(twin: _Twin, patcher: "ModelPatcher") -> "ModelPatcher":
    """A clone of the patcher over the twin, without the patches that are merged."""
    root = twin.root
    clone = patcher.clone(model_override=root.get_clone_model_override())
    clone.parent = root
    clone.size = memory.module_size(twin.model)
    clone.patches = {key: value for key, value in clone.patches.items() if key.rsplit(".", 1)[0] not in twin.merged}
    return clone
