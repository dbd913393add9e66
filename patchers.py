"""ModelPatchers over a second model: a run's own patcher, ComfyUI's books about what is loaded."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import comfy.model_management as memory
from comfy.model_patcher import ModelPatcher
from torch import nn

PLAIN_KEY = "_skein_plain"  # on a model under dynamic VRAM: the patcher over the same model without it


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


def is_loaded(model: nn.Module) -> bool:
    """Whether ComfyUI has the model in its books."""
    return any(entry.model is not None and entry.model.model is model for entry in memory.current_loaded_models)


@contextmanager
def plain(guider) -> Iterator[None]:
    """Within: the guider's model without dynamic VRAM, which moves and patches weights inside layers of its own only.

    ComfyUI loads the model a second time for it, once for all runs. Raises ValueError if the loader left no recipe.
    """
    source = guider.model_patcher
    if not source.is_dynamic():
        yield
        return
    require_recipe(source)
    kept = vars(source.model)
    if PLAIN_KEY not in kept:
        root = kept[PLAIN_KEY] = source.clone(disable_dynamic=True)
        root.patches, root.parent = {}, None
    guider.model_patcher = clone_over(source, kept[PLAIN_KEY])
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
