"""ModelPatchers over a second model: a run's own patcher, ComfyUI's books about what is loaded, which models a
technique does not reach."""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import comfy.model_management as memory
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP, add_wrapper_with_key
from torch import nn

from .files import require_unchanged
from .models.share import LEFT, is_own_method, names_in_code, stays_behind
from .plan import PLAN_KEY

PLAIN_KEY = "_skein_plain"  # what is Kept of a model under dynamic VRAM: the patcher over it without that
TWIN_KEY = "_skein_fp8"  # what is Kept of a model that is quantized: its quantization.twin.Twin
KEYS = (PLAIN_KEY, TWIN_KEY)


class Kept:
    """What one technique keeps of a model for its next run, a second model: None at first.

    It belongs to the patchers that have the technique in their plan, and not to the model. ComfyUI holds such a patcher
    as its node's output; when it drops the last one, because the node is gone or to have the memory, this goes as well.
    """

    value: Any = None


def keep(patcher: ModelPatcher, key: str) -> Kept:
    """The Kept of a patcher, and of its clones; all those over one model have the same."""
    if patcher.get_attachment(key) is None:
        known = vars(patcher.model).get(key, lambda: None)  # a weak reference
        kept = known() or Kept()
        vars(patcher.model)[key] = weakref.ref(kept)
        patcher.set_attachments(key, kept)
    return patcher.get_attachment(key)


def is_kept(patcher: ModelPatcher, key: str) -> bool:
    """Whether any patcher over the model has a Kept."""
    return vars(patcher.model).get(key, lambda: None)() is not None


def clone_over(source: ModelPatcher, root: ModelPatcher) -> ModelPatcher:
    """A clone of `source` over the model of `root`, with everything that other nodes have put on the source.

    ComfyUI falls back on the root when the clone is gone: it is held by whoever holds the second model.
    """
    patcher = source.clone(disable_dynamic=True, model_override=root.get_clone_model_override())
    patcher.parent = root
    patcher.size = root.model_size()
    patcher.model_options = source.model_options
    patcher.weight_inplace_update = False  # would write through to the source
    patcher.hook_backup, patcher.cached_hook_patches = root.hook_backup, {}
    patcher.cached_patcher_init = None  # it would load the source's model
    return patcher


def unload(patcher: ModelPatcher) -> None:
    """Take a model off its device, with all patches off its weights."""
    loaded = [entry for entry in memory.current_loaded_models if entry.model is not None]
    for entry in [entry for entry in loaded if patcher.is_clone(entry.model)]:
        memory.free_memory(1e30, entry.device, keep_loaded=[other for other in loaded if other is not entry])


def only_for(network: object, wrapper: Callable, technique: str) -> Callable:
    """A DIFFUSION_MODEL wrapper that refuses other networks: a guider with a second model calls that with the options
    of the first, wrappers included."""

    def around(execute: Any, *args: Any, **kwargs: Any) -> Any:
        if execute.class_obj is not network:
            raise ValueError(f"{technique} cannot work where a guider has two models; remove it from the first one.")
        return wrapper(execute, *args, **kwargs)

    return around


def refuse_multigpu(patcher: ModelPatcher, technique: str) -> None:
    """Raises ValueError if ComfyUI's MultiGPU node has made copies of the model, which a technique does not reach."""
    if patcher.get_additional_models_with_key("multigpu"):
        raise ValueError(f"{technique} and ComfyUI's MultiGPU node cannot work on one model; remove one of them.")


def refuse_code(patcher: ModelPatcher, technique: str) -> None:
    """Raises ValueError if another node's code holds the model itself: a second model in its place would be without
    that, or its copy would run the first."""
    if patcher.injections:
        raise ValueError(
            f"{technique} cannot work with layers that another node puts into the model while it samples (a LoRA in "
            f"bypass mode, say); use an ordinary LoRA node, or remove {technique}."
        )
    put_on = patcher.object_patches_backup  # path -> the model's own, where ComfyUI has an object patch on it now
    own = {module for kept in put_on.values() if isinstance(kept, nn.Module) for module in kept.modules()}
    for path, module in patcher.model.named_modules():
        if any(f"{path}.".startswith(f"{patched}.") for patched in put_on):
            continue
        own.add(module)
        for name, value in vars(module).items():
            known = name in LEFT or f"{path}.{name}".lstrip(".") in put_on or is_own_method(module, name, value)
            if not known and callable(value) and callable(getattr(type(module), name, None)):
                raise ValueError(
                    f"Another node has put a {name} of its own on the model's {type(module).__name__}, with which "
                    f"{technique} cannot work; remove one of them."
                )
    for path, value in patcher.object_patches.items():
        bound_to = [value.__self__] if isinstance(value, MethodType) else []
        held = value.modules() if isinstance(value, nn.Module) else bound_to
        if any(isinstance(each, nn.Module) and each in own for each in held):
            raise ValueError(
                f"Another node has replaced {path} by what holds the model, with which {technique} cannot work; remove "
                "one of them."
            )


def refuse_late_code(options: dict, technique: str, *patchers: ModelPatcher) -> None:
    """Let a run refuse what other nodes put on models whose code it does not run, since others stand in for them: a
    change around each call, as other packs' caches make it, would have no effect.

    options: the run's transformer_options. Raises ValueError, when the model is called.
    """
    known = [(patcher, _code(patcher)) for patcher in patchers]

    def around(execute: Callable, *args: Any, **kwargs: Any) -> Any:
        if any(_code(patcher) != code for patcher, code in known):
            raise ValueError(
                "Another node changes the model's own code while it samples (as TeaCache and WaveSpeed's cache do), "
                f"which would have no effect under {technique}; remove one of them."
            )
        return execute(*args, **kwargs)

    add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, PLAN_KEY, around, options)


def _code(patcher: ModelPatcher) -> dict[str, Any]:
    """What a network runs: its modules, and functions that stand in for its class's methods. Below ComfyUI's object
    patches, which come and go with the model's loading."""
    network, below = patcher.get_model_object("diffusion_model"), patcher.object_patches_backup
    named = names_in_code(network)
    return {
        name: below.get(f"diffusion_model.{name}", value)
        for name, value in (vars(network) | network._modules).items()
        if callable(value) and not stays_behind(name, named)
    }


def is_loaded(model: nn.Module) -> bool:
    """Whether ComfyUI has the model in its books."""
    return any(entry.model is not None and entry.model.model is model for entry in memory.current_loaded_models)


@contextmanager
def plain(guider, technique: str) -> Iterator[None]:
    """Within: the guider's model without dynamic VRAM, which moves and patches weights inside layers of its own only.

    ComfyUI loads the model a second time for it, once for all runs. Raises ValueError if the loader left no recipe, or
    if other nodes' work on the model would be lost by it.
    """
    source = guider.model_patcher
    if not source.is_dynamic():
        yield
        return
    require_recipe(source)
    refuse_code(source, technique)
    refuse_late_code(guider.model_options["transformer_options"], technique, source)
    kept = keep(source, PLAIN_KEY)
    if kept.value is None:
        require_unchanged(source, technique)
        root = source.clone(disable_dynamic=True)
        root.patches, root.parent, root.attachments = {}, None, {}
        kept.value = root
    guider.model_patcher = clone_over(source, kept.value)
    try:
        yield
    finally:
        guider.model_patcher = source


def require_recipe(patcher: ModelPatcher) -> None:
    """Raises ValueError if ComfyUI does not know how to load the model again."""
    if patcher.is_dynamic() and patcher.cached_patcher_init is None:
        raise ValueError(
            "This model's loader left no recipe for loading it without dynamic VRAM; use one of ComfyUI's own loaders, "
            "or start ComfyUI with --disable-dynamic-vram."
        )
