"""FP8 storage for text encoders: half the memory, arithmetic as before."""

import logging
import uuid
import weakref
from typing import Any

import comfy.model_management as memory
from comfy.model_patcher import ModelPatcher
from comfy.sd import CLIP

from ..files import require_unchanged
from ..patchers import require_recipe, without_dynamic_vram
from ..report import show
from .layers import SCALED, require_float8, require_torchao, text_layers
from .run import describe
from .twin import Twin

logger = logging.getLogger("skein")

BEFORE = "connect the node that saves, merges or extracts to the text encoder before FP8 Text Encoder."


def quantize_text_encoder(clip: CLIP, node_id: str | None = None) -> CLIP:
    """A clone of the text encoder with its Linear weights in FP8, one scale per row.

    LoRA that is on it already is merged before the weights are quantized; LoRA put on the result is merged by ComfyUI
    through QuantizedLinear, under the scale that is there. Raises ValueError if torchao is missing, or the
    loader's recipe where dynamic VRAM needs it.
    """
    require_torchao()
    require_float8(clip.patcher.load_device)
    require_recipe(clip.patcher)
    if clip.patcher.is_dynamic():  # loaded again without
        require_unchanged(clip.patcher, "FP8 Text Encoder")
    source = without_dynamic_vram(clip.patcher)
    layers = text_layers(source.model)
    if not layers:
        logger.info("Skein %s", SCALED)
        show(node_id, SCALED)
        return clip
    twin = Twin(source, layers)
    quantized = QuantizedCLIP.of(clip.clone(), weakref.ref(clip))
    quantized.patcher = twin.patcher(source)
    quantized.patcher.__class__ = _QuantizedPatcher  # which its clones then have
    quantized.cond_stage_model = twin.model
    text = describe(twin, "weight_only")
    logger.info("Skein text encoder %s", text)
    show(node_id, text)
    return quantized


class QuantizedCLIP(CLIP):
    """A text encoder in FP8. Who asks for its weights, to save them or to merge them into others, gets the original's:
    a file of FP8 values would be loaded as if it were one of plain weights.

    original: a weak reference to the text encoder that was quantized, which ComfyUI holds as an output of another node.
    """

    original: "weakref.ref[CLIP]"

    @classmethod
    def of(cls, clip: CLIP, original: "weakref.ref[CLIP]") -> "QuantizedCLIP":
        """The text encoder, with another's weights to be asked for."""
        quantized = cls(no_init=True)
        for name, value in vars(clip).items():
            setattr(quantized, name, value)
        quantized.original = original
        return quantized

    def clone(self, *args: Any, **kwargs: Any) -> "QuantizedCLIP":
        return self.of(super().clone(*args, **kwargs), self.original)

    def get_sd(self) -> dict:
        """Of older ComfyUIs' nodes that save: they have the patches put into the weights before."""
        whole = self._unquantized()
        memory.load_models_gpu([whole.patcher], force_patch_weights=True)
        return whole.get_sd()

    def state_dict_for_saving(self) -> dict:
        whole = self._unquantized()
        whole.load_model()
        return whole.state_dict_for_saving()

    def get_key_patches(self) -> dict:
        return self._unquantized().get_key_patches()

    def _unquantized(self) -> CLIP:
        """The original, with all patches that are on this one. Raises ValueError if ComfyUI has dropped it."""
        original = self.original()
        if original is None:
            raise ValueError(f"The text encoder's 16-bit weights are no longer in memory; {BEFORE}")
        whole = original.clone()
        for key, patches in self.patcher.patches.items():
            known = whole.patcher.patches.setdefault(key, [])
            known += [patch for patch in patches if all(patch is not other for other in known)]
        whole.patcher.patches_uuid = uuid.uuid4()
        return whole


class _QuantizedPatcher(ModelPatcher):
    """The patcher of a text encoder in FP8, which LoraSave asks for the weights' values."""

    def model_state_dict(self, filter_prefix: str | None = None) -> dict:
        if filter_prefix is not None:  # without, ComfyUI wants to know the names
            raise ValueError(f"The text encoder's weights are in FP8; {BEFORE}")
        return super().model_state_dict()
