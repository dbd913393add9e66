"""ModelPatchers over a second model: a run's own patcher, ComfyUI's books about what is loaded."""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import comfy.memory_management
import comfy.model_management as memory
import torch
from comfy.model_patcher import ModelPatcher
from torch import nn

from .attributes import changed
from .checkpoints.in_file import keep_in_file
from .checkpoints.taking import Taking
from .files import Watched, files_of, require_unchanged

PLAIN_KEY = "_skein_plain"  # what is Kept of a model under dynamic VRAM: its Plain
TWIN_KEY = "_skein_fp8"  # what is Kept of a model that is quantized: its quantization.twin.Twin
KEYS = (PLAIN_KEY, TWIN_KEY)
PROXY_KEY = "_skein_proxy"  # on a proxy's model; and on its source's, so that the proxy goes when that goes


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


def let_go(patcher: ModelPatcher) -> None:
    """A run's patcher (clone_over) goes, and the model stays. ComfyUI unpins all weights of a model when any patcher
    over it goes, and pins them anew only when it has left them off the device anew."""
    patcher.pinned = set()  # the root has those that there are: ComfyUI's clones share one set


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


def take_off_weights(patcher: ModelPatcher) -> None:
    """Take all weights of a model without dynamic VRAM off its device. It stays in ComfyUI's books as loaded."""
    patcher.partially_unload(patcher.offload_device, 1e32)
    memory.soft_empty_cache(force=True)


def take_off_unless_beside(patcher: ModelPatcher, work: float) -> None:
    """Take a model's weights off its device where so many bytes have no room beside those that are there. ComfyUI would
    take off some layers here and some there, and the memory of each is too small for what a run needs; loaded anew,
    those that stay lie together."""
    device, loaded = patcher.load_device, patcher.loaded_size()
    beside = room_of(device) - (loaded if is_loaded(patcher.model) else 0)
    if loaded and device != patcher.offload_device and beside < work:
        take_off_weights(patcher)


def take_off_others(patcher: ModelPatcher) -> None:
    """Take off what another workflow has left in the place of the model's network: ComfyUI's object patches stay on a
    model that stays loaded."""
    if patcher.model.diffusion_model is not patcher.get_model_object("diffusion_model"):
        unload(patcher)


def room_of(device: torch.device) -> int:
    """Bytes on a device that are free, or could be without the models that this process has there. Not counted: what
    workers have (workers/proxy.py), who are asked for it."""
    loaded = [entry for entry in loaded_entries() if entry.device == device and not is_proxy(entry.model.model)]
    return int(memory.get_free_memory(device) + sum(entry.model_loaded_memory() for entry in loaded))


def is_proxy(model: Any) -> bool:
    """Whether a model is a Proxy's (workers/proxy.py), whose weights are in the workers."""
    return PROXY_KEY in vars(model) and vars(model)[PROXY_KEY].model is model


def is_loaded(model: nn.Module) -> bool:
    """Whether ComfyUI has the model in its books."""
    return any(entry.model.model is model for entry in loaded_entries())


class Plain:
    """A model without dynamic VRAM, which ComfyUI loads for it; its weights stay in the checkpoint's file.

    root: the patcher over it, with nothing that other nodes have put on the source. Raises ValueError if the file is no
    longer what the source was loaded from.
    """

    def __init__(self, source: ModelPatcher):
        require_unchanged(source, "Skein")
        self._files = [Watched(file["path"]) for file in files_of(source)]
        self.root = without_dynamic_vram(source)
        self.root.patches, self.root.parent, self.root.attachments = {}, None, {}

    def is_overwritten(self) -> bool:
        """Whether a file has been written to, in which the weights lie."""
        return any(file.is_overwritten() for file in self._files)


@contextmanager
def plain(guider) -> Iterator[None]:
    """Within: the guider's model without dynamic VRAM, which moves and patches weights inside layers of its own only.

    It is a second model, loaded once for all runs. Raises ValueError if the loader left no recipe, or the file has
    changed.
    """
    source = guider.model_patcher
    if not source.is_dynamic():
        yield
        return
    require_recipe(source)
    kept = keep(source, PLAIN_KEY)
    if kept.value is None or kept.value.is_overwritten():
        kept.value = None
        kept.value = Plain(source)
    guider.model_patcher = run = clone_over(source, kept.value.root)
    try:
        yield
    finally:
        guider.model_patcher = source
        let_go(run)


def without_dynamic_vram(source: ModelPatcher) -> ModelPatcher:
    """A clone over a second model, loaded as ComfyUI does without dynamic VRAM, its weights in the file's memory on the
    CPU; of a model that has no dynamic VRAM, over the same."""
    if not source.is_dynamic():
        return source.clone()
    load, arguments, *index = source.cached_patcher_init
    # With dynamic VRAM switched on ComfyUI would read the file into pages that nothing may be written to, copy from
    # there and convert nothing. Without, it would load a model straight onto the device where much memory is free
    # there: what it takes off again would be in this process's own memory.
    options = [(comfy.memory_management, "aimdo_enabled", False), (memory, "vram_state", memory.VRAMState.NO_VRAM)]
    with changed(options), Taking():
        loaded = load(*arguments, disable_dynamic=True)
    loaded = loaded[index[0]] if index else loaded
    unload(loaded)  # out of ComfyUI's books, where a text encoder now is
    keep_in_file(loaded.model)
    return source.clone(disable_dynamic=True, model_override=loaded.get_clone_model_override())


def require_recipe(patcher: ModelPatcher) -> None:
    """Raises ValueError if ComfyUI does not know how to load the model again."""
    if patcher.is_dynamic() and patcher.cached_patcher_init is None:
        raise ValueError(
            "This model's loader does not tell how to load it without dynamic VRAM; use one of ComfyUI's own loaders, "
            "or start ComfyUI with --disable-dynamic-vram."
        )
