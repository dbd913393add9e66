"""A worker's weights stay in the checkpoint's file: the host's memory has them once, as pages of that file that all
workers share and that it can take back, however many workers there are and wherever the model is.

ComfyUI's loaders read a safetensors file by mapping it into memory, convert what is not of the model's type, and copy
each weight into its Parameter. Here the Parameter takes what it would copy (checkpoints/taking.py); what is put
together of several weights is in memory that all have (checkpoints/together.py). Files that are read otherwise
(--disable-mmap) are in each worker's memory.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import comfy.model_management as memory
from torch import Tensor, nn

from ..attributes import changed
from ..checkpoints.taking import Taking
from ..files import memory_of_files
from .loading import load

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

KNOWN_KEY = "_skein_in_file"  # on a module: its Parameters that lie in the file's memory, or go back there

Weights = dict[str, tuple[Tensor, Tensor]]  # of a module, by name: a Parameter, and its data in the file's memory


@dataclass
class Held:
    """Bytes of weights that no file has. device: those on a device, which would come to the host's memory. host: those
    that are there."""

    device: int = 0
    host: int = 0


def load_from_file(recipe: dict[str, Any]) -> "ModelPatcher":
    """The model of a recipe (recipe.py) on the CPU, its weights in the file's memory.

    They go back there, uncopied, when ComfyUI takes the model or a part of it off the device.
    """
    # Or ComfyUI loads a checkpoint straight onto the device where more memory is free there: what it takes off again
    # would then be in this process's own memory.
    with changed([(memory, "DISABLE_SMART_MEMORY", True)]), Taking():
        patcher = load(recipe)
    here = [each.data_ptr() for each in patcher.model.parameters() if each.device.type == "cpu"]
    files = [each for each, _ in memory_of_files() if any(address in each for address in here)]
    for module in patcher.model.modules():
        weights: Weights = {}
        _note(module, weights, files)
        if weights:
            vars(module)[KNOWN_KEY] = weights
            vars(module)["_apply"] = partial(_apply, module, weights, files)
    return patcher


def held_outside_of_files(patchers: Iterable["ModelPatcher"]) -> Held:
    """What models that may share tensors take outside of the files that they were loaded from."""
    files, held, seen = [each for each, _ in memory_of_files()], Held(), set()
    for patcher in patchers:
        for prefix, module in patcher.model.named_modules():
            known = vars(module).get(KNOWN_KEY, {})
            for name, tensor in (*module._parameters.items(), *module._buffers.items()):
                if tensor is None or tensor.data_ptr() in seen:
                    continue
                seen.add(tensor.data_ptr())
                if tensor.device.type == "cpu":
                    outside = not any(tensor.data_ptr() in each for each in files)
                    held.host += tensor.nbytes if outside else 0
                elif known.get(name, (None,))[0] is not tensor and f"{prefix}.{name}" not in patcher.backup:
                    held.device += tensor.nbytes  # what is patched goes: ComfyUI has the weight as it was on the CPU
    return held


def _note(module: nn.Module, weights: Weights, files: list[range]) -> None:
    """Note which of a module's own Parameters lie in files' memory now, and where: name -> Parameter, its data."""
    for name, parameter in module._parameters.items():
        if parameter is None or parameter.device.type != "cpu":
            continue
        if any(parameter.data_ptr() in each for each in files):
            weights[name] = parameter, parameter.data


def _apply(
    module: nn.Module,
    weights: Weights,
    files: list[range],
    function: Callable[[Tensor], Tensor],
    recurse: bool = True,
) -> nn.Module:
    """A module's _apply, which moves its Parameters: those that come to the CPU take their memory in the file.

    What is patched is another Parameter, and ComfyUI restores it as yet another over the same memory.
    """
    _note(module, weights, files)
    for name, (known, data) in weights.items():
        parameter = module._parameters.get(name)
        if parameter is known and _comes_to_cpu(parameter, function):
            parameter.data = data
    return type(module)._apply(module, function, recurse)


def _comes_to_cpu(parameter: Tensor, function: Callable[[Tensor], Tensor]) -> bool:
    return parameter.device.type != "cpu" and function(parameter.new_empty(0)).device.type == "cpu"
