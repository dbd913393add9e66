"""A worker's weights stay in the checkpoint's file (checkpoints/in_file.py): the host has them once, however many
workers there are. What is put together of several weights is in memory that all have (checkpoints/together.py).
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import comfy.model_management as memory

from ..attributes import changed
from ..checkpoints.in_file import KNOWN_KEY, keep_in_file
from ..checkpoints.taking import Taking
from ..files import memory_of_files
from .loading import load

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher


@dataclass
class Held:
    """Bytes of weights that no file has. device: those on a device, which would come to the host's memory. host: those
    that are there."""

    device: int = 0
    host: int = 0


def load_from_file(recipe: dict[str, Any]) -> "ModelPatcher":
    """The model of a recipe (recipe.py) on the CPU, its weights in the file's memory."""
    # Or ComfyUI loads a checkpoint straight onto the device where more memory is free there: what it takes off again
    # would then be in this process's own memory.
    with changed([(memory, "DISABLE_SMART_MEMORY", True)]), Taking():
        patcher = load(recipe)
    keep_in_file(patcher.model)
    return patcher


def held_outside_of_files(patchers: Iterable["ModelPatcher"]) -> Held:
    """What models that may share tensors take outside of the files that they were loaded from."""
    files, held, seen = [each.addresses for each in memory_of_files()], Held(), set()
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
