"""FP8 storage for text encoders: half the memory, arithmetic as before."""

import logging
from typing import TYPE_CHECKING

from ..patchers import require_recipe
from ..report import show
from .layers import SCALED, require_float8, require_torchao, text_layers
from .run import describe
from .twin import Twin

if TYPE_CHECKING:
    from comfy.sd import CLIP

logger = logging.getLogger("skein")


def quantize_text_encoder(clip: "CLIP", node_id: str | None = None) -> "CLIP":
    """A clone of the text encoder with its Linear weights in FP8, one scale per row.

    LoRA that is on it already is merged before the weights are quantized; LoRA put on the result is merged by ComfyUI
    through QuantizedLinear, under the scale that is there. Raises ValueError if torchao is missing, or the
    loader's recipe where dynamic VRAM needs it.
    """
    require_torchao()
    require_float8(clip.patcher.load_device)
    require_recipe(clip.patcher)
    source = clip.patcher.clone(disable_dynamic=True)
    layers = text_layers(source.model)
    if not layers:
        logger.info("Skein %s", SCALED)
        show(node_id, SCALED)
        return clip
    twin = Twin(source, layers)
    quantized = clip.clone()
    quantized.patcher = twin.patcher(source)
    quantized.cond_stage_model = twin.model
    text = describe(twin, "weight_only")
    logger.info("Skein text encoder %s", text)
    show(node_id, text)
    return quantized
