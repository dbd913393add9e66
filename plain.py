"""Models without ComfyUI's dynamic VRAM, which moves and patches weights inside layers of its own only."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

PLAIN_KEY = "_skein_plain"  # on a model under dynamic VRAM: what clones over the same model without it share


def plain_clone(patcher: "ModelPatcher") -> "ModelPatcher":
    """A clone without dynamic VRAM. ComfyUI loads the model a second time for it; here once for all clones.

    Raises ValueError if the loader left no recipe for that.
    """
    if not patcher.is_dynamic():
        return patcher.clone()
    require_recipe(patcher)
    kept = vars(patcher.model)
    clone = patcher.clone(disable_dynamic=True, model_override=kept.get(PLAIN_KEY))
    kept[PLAIN_KEY] = clone.get_clone_model_override()
    return clone


def require_recipe(patcher: "ModelPatcher") -> None:
    """Raises ValueError if ComfyUI does not know how to load the model again."""
    if patcher.is_dynamic() and patcher.cached_patcher_init is None:
        raise ValueError(
            "This model's loader left no recipe for loading it without dynamic VRAM; use one of ComfyUI's own loaders, "
            "or start ComfyUI with --disable-dynamic-vram."
        )
