"""A second module tree over the same tensors.

Every module, Parameter and buffer object is new, the storage is shared: moving or patching the copy leaves the original
as it is, and it costs no memory until then. What ComfyUI keeps on a loaded module (flags, patch functions, handles
of its dynamic VRAM, captured graphs) stays behind; the original must be unloaded.
"""

from functools import cache
from types import CodeType, MethodType
from typing import Any

from torch import Tensor, nn

LEFT = (  # what ComfyUI writes on loaded modules and models, and is not private
    "comfy_cast_weights", "prev_comfy_cast_weights", "comfy_force_cast_weights", "comfy_patched_weights",
    "weight_function", "bias_function", "weight_lowvram_function", "bias_lowvram_function", "seed_key",
    "model_loaded_weight_memory", "model_offload_buffer_memory", "model_lowvram", "lowvram_patch_counter",
    "current_weight_patches_uuid", "dynamic_vbars", "dynamic_pins", "dynamic_patchers",
    "_apply",  # of modules whose tensors come from elsewhere when they are moved (worker/weights.py)
)  # fmt: skip
PREFIXES = ("_skein", "_comfy_")  # of what Skein keeps on a model, and ComfyUI, its models' own code included
OF_EVERY_MODULE = frozenset(vars(nn.Module()))


def share(module: nn.Module, seen: dict[int, object] | None = None, named: frozenset[str] | None = None) -> nn.Module:
    """The second tree. Modules and tensors that occur twice in the original do so in the copy."""
    seen = {} if seen is None else seen
    named = names_in_code(module) if named is None else named
    if id(module) in seen:
        return seen[id(module)]  # type: ignore[return-value]
    copy = object.__new__(type(module))
    seen[id(module)] = copy
    for name, value in vars(module).items():
        if not stays_behind(name, named) and not is_own_method(module, name, value):
            vars(copy)[name] = value.copy() if isinstance(value, (dict, list, set)) else value
    for name, parameter in module._parameters.items():
        copy._parameters[name] = _same_storage(parameter, seen)
    for name, buffer in module._buffers.items():
        copy._buffers[name] = _same_storage(buffer, seen)
    for name, child in module._modules.items():
        copy._modules[name] = None if child is None else share(child, seen, named)
    if "current_patcher" in vars(copy):
        vars(copy)["current_patcher"] = None
    return copy


def stays_behind(name: str, named: frozenset[str]) -> bool:
    """Whether an attribute of a module is not the model's own. named: names_in_code of the model.

    What is private and named nowhere in the code of the model's classes has been put there by others, who keep a state
    of this one module in it.
    """
    foreign = name.startswith("_") and name not in OF_EVERY_MODULE and name not in named
    return foreign or name in LEFT or name.startswith(PREFIXES)


def names_in_code(model: nn.Module) -> frozenset[str]:
    """All names of attributes in the code of the classes of a model's modules."""
    kinds: set[Any] = {type(module) for module in model.modules()}
    return frozenset().union(*map(_names_in_class, kinds))


@cache
def _names_in_class(kind: type) -> frozenset[str]:
    names: set[str] = set()
    for base in kind.__mro__:
        names.update(vars(base), vars(base).get("__annotations__", {}))
        for value in vars(base).values():
            function = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
            names.update(_names_in(getattr(function, "__code__", None)))
    return frozenset(names)


def _names_in(code: object) -> set[str]:
    """Of a function's code, with the functions inside of it; the constants for getattr and setattr."""
    if not isinstance(code, CodeType):
        return set()
    texts = {constant for constant in code.co_consts if isinstance(constant, str) and constant.isidentifier()}
    return texts.union(code.co_names, *map(_names_in, code.co_consts))


def is_own_method(module: nn.Module, name: str, value: object) -> bool:
    """Whether an attribute of a module is but its class's method: ComfyUI leaves it there when it takes an object patch
    off that method."""
    # By its type: ComfyUI's model_config warns of each attribute that it is asked for and does not have.
    if not isinstance(value, MethodType) or value.__self__ is not module:
        return False
    return value.__func__ is getattr(type(module), name, None)


def _same_storage(tensor: Tensor | None, seen: dict):
    if tensor is None:
        return None
    if id(tensor) not in seen:
        view = tensor.detach()
        seen[id(tensor)] = nn.Parameter(view, requires_grad=False) if isinstance(tensor, nn.Parameter) else view
    return seen[id(tensor)]
