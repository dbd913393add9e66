"""FP8 storage for text encoders: a CLIP whose linear layers hold their weights in FP8, weight-only."""

import copy
from typing import Any

from torch import nn

from .twin import quantized


def quantized_text_encoder(clip: Any) -> tuple[Any, str]:
    """A clone of a ComfyUI CLIP in FP8, with the LoRAs that it carries merged first, and a sentence on what was done.

    Embeddings, norms and projections that share an embedding's weight stay as they are. A LoRA added later is
    applied by ComfyUI on the FP8 weights. Raises ValueError if the loader cannot do without dynamic VRAM.
    """
    source = clip.patcher
    if source.is_dynamic():
        try:
            source = source.clone(disable_dynamic=True)
        except RuntimeError as error:
            raise ValueError("This text encoder's loader cannot do without dynamic VRAM; use ComfyUI's own.") from error
    shared = {
        module.weight.data_ptr()
        for module in source.model.modules()
        if isinstance(module, nn.Embedding) and module.weight is not None
    }
    layers = {
        name: "weight_only"
        for name, module in source.model.named_modules()
        if isinstance(module, nn.Linear) and module.weight is not None and module.weight.data_ptr() not in shared
    }
    patcher, sentence = quantized(source, layers, done="FP8 text encoder")
    result = copy.copy(clip)
    result.patcher, result.cond_stage_model = patcher, patcher.model
    result.tokenizer_options = dict(clip.tokenizer_options)
    return result, sentence
