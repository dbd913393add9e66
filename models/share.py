"""A second module tree over the same tensors.

Every module, Parameter and buffer object is new, the storage is shared: moving or patching the copy leaves the original
as it is, and it costs no memory until then. What ComfyUI keeps on a loaded module (flags, patch functions, handles
of its dynamic VRAM) stays behind; the original must be unloaded.
"""

from types import MethodType

from torch import Tensor, nn

LEFT = (  # what ComfyUI's ModelPatchers write on modules and models
    "comfy_cast_weights", "prev_comfy_cast_weights", "comfy_force_cast_weights", "comfy_patched_weights",
    "weight_function", "bias_function", "weight_lowvram_function", "bias_lowvram_function",
    "_v", "_v_signature", "_v_weight", "_v_bias", "_prefetch", "_pin_state", "_pins", "seed_key",
    "model_loaded_weight_memory", "model_offload_buffer_memory", "model_lowvram", "lowvram_patch_counter",
    "current_weight_patches_uuid", "dynamic_vbars", "dynamic_pins", "dynamic_patchers",
    "_apply",  # of modules whose tensors come from elsewhere when they are moved (worker/weights.py)
)  # fmt: skip
OURS = "_skein"  # prefix of what Skein keeps on a model


def share(module: nn.Module, seen: dict[int, object] | None = None) -> nn.Module:
    """The second tree. Modules and tensors that occur twice in the original do so in the copy."""
    seen = {} if seen is None else seen
    if id(module) in seen:
        return seen[id(module)]  # type: ignore[return-value]
    copy = object.__new__(type(module))
    seen[id(module)] = copy
    for name, value in vars(module).items():
        if name not in LEFT and not name.startswith(OURS) and not is_own_method(module, name, value):
            vars(copy)[name] = value.copy() if isinstance(value, (dict, list, set)) else value
    for name, parameter in module._parameters.items():
        copy._parameters[name] = _same_storage(parameter, seen)
    for name, buffer in module._buffers.items():
        copy._buffers[name] = _same_storage(buffer, seen)
    for name, child in module._modules.items():
        copy._modules[name] = None if child is None else share(child, seen)
    if "current_patcher" in vars(copy):
        vars(copy)["current_patcher"] = None
    return copy


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
