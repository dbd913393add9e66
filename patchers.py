"""ModelPatchers over a second model: a run's own patcher, ComfyUI's books about what is loaded."""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import comfy.model_management as memory
from comfy.model_patcher import ModelPatcher
from torch import nn

from .files import require_unchanged

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


def own_network(patcher: ModelPatcher) -> Any:
    """The model's own network, below an object patch that another workflow may have left on it."""
    return patcher.object_patches_backup.get("diffusion_model", patcher.model.diffusion_model)


def loaded_entries() -> list[Any]:
    """ComfyUI's books of what is loaded, without those of patchers that are gone."""
    return [entry for entry in memory.current_loaded_models if entry.model is not None]


def unload(patcher: ModelPatcher) -> None:
    """Take a model off its device, with all patches off its weights."""
    loaded = loaded_entries()
    for entry in [entry for entry in loaded if patcher.is_clone(entry.model)]:
        memory.free_memory(1e30, entry.device, keep_loaded=[other for other in loaded if other is not entry])


def take_off_others(patcher: ModelPatcher) -> None:
    """Take off what another workflow has left in the place of the model's network: ComfyUI's object patches stay on a
    model that stays loaded."""
    if patcher.model.diffusion_model is not patcher.get_model_object("diffusion_model"):
        unload(patcher)


def is_loaded(model: nn.Module) -> bool:
    """Whether ComfyUI has the model in its books."""
    return any(entry.model.model is model for entry in loaded_entries())


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
    kept = keep(source, PLAIN_KEY)
    if kept.value is None:
        require_unchanged(source, "Skein")
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
            "This model's loader does not tell how to load it without dynamic VRAM; use one of ComfyUI's own loaders, "
            "or start ComfyUI with --disable-dynamic-vram."
        )
