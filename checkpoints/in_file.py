"""Weights that stay in the checkpoint's file: the host's memory has them once, as pages of that file that all processes
share and that it can take back, wherever the model is.

ComfyUI's loaders read a safetensors file by mapping it into memory, convert what is not of the model's type, and copy
each weight into its Parameter. Within Taking (taking.py) the Parameter takes what would be copied; keep_in_file then
has it go back there, uncopied, when ComfyUI takes the model or a part of it off the device. What is converted, and
files that are read otherwise (--disable-mmap), are in the process's own memory. So is what ComfyUI pins, for the
system gives a process its own copy of a page that is pinned for writing: of a model partly on the device, the rest.
Layers of ComfyUI's that are quantized make new Parameters when they are moved: they come off the device as copies.
"""

import weakref
from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

from ..files import memory_of_files

KNOWN_KEY = "_skein_in_file"  # on a module: its Parameters that lie in the file's memory, or go back there

Weights = dict[str, tuple[Tensor, Tensor]]  # of a module, by name: a Parameter, and its data in the file's memory


def keep_in_file(model: nn.Module) -> None:
    """Have a model's weights that lie in a file's memory now go back there, uncopied, when they come to the CPU."""
    here = [each.data_ptr() for each in model.parameters() if each.device.type == "cpu"]
    mapped = [each.addresses for each in memory_of_files()]
    files = [each for each in mapped if any(address in each for address in here)]
    for module in model.modules():
        weights: Weights = {}
        _note(module, weights, files)
        if weights:
            vars(module)[KNOWN_KEY] = weights
            vars(module)["_apply"] = partial(_apply, weakref.ref(module), weights, files)


def _note(module: nn.Module, weights: Weights, files: list[range]) -> None:
    """Note which of a module's own Parameters lie in files' memory now, and where: name -> Parameter, its data."""
    for name, parameter in module._parameters.items():
        if parameter is None or parameter.device.type != "cpu":
            continue
        if any(parameter.data_ptr() in each for each in files):
            weights[name] = parameter, parameter.data


def _apply(
    own: "weakref.ref[nn.Module]",
    weights: Weights,
    files: list[range],
    function: Callable[[Tensor], Tensor],
    recurse: bool = True,
) -> nn.Module:
    """A module's _apply, which moves its Parameters: those that come to the CPU take their memory in the file.

    own: the module; not itself, so that the model goes with its last user. What is patched is another Parameter, and
    ComfyUI restores it as yet another over the same memory.
    """
    module = own()
    assert module is not None
    _note(module, weights, files)
    for name, (known, data) in weights.items():
        parameter = module._parameters.get(name)
        if parameter is known and _comes_to_cpu(parameter, function):
            parameter.data = data
    return type(module)._apply(module, function, recurse)


def _comes_to_cpu(parameter: Tensor, function: Callable[[Tensor], Tensor]) -> bool:
    return parameter.device.type != "cpu" and function(parameter.new_empty(0)).device.type == "cpu"
