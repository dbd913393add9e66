"""Weights that a checkpoint holds quantized: which of them FP8 can take over, and how they are read.

One is taken over if it takes no less than FP8's byte a value; FP8 of GGUF's Q4_K would take twice its memory. FP8 with
one scale or with none is taken over as it is, so no error is added to the weight. GGUF's types are read by the pack
that has made them, and quantized from that: the pack dequantizes them anew in each call, which is saved then.
"""

import sys
from typing import Any

import comfy.lora
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor, nn

from ..float8 import FP8

READER = "dequantize_tensor"  # in the module of a GGUF weight's class: (tensor, type) -> the plain tensor


def is_plain(weight: Tensor) -> bool:
    return type(weight.data) in (Tensor, nn.Parameter)


def can_be_read(weight: Tensor) -> bool:
    """Whether FP8 can take a quantized weight's place: it is of a known form, and takes a byte a value or more."""
    known = scaled_fp8(weight) is not None or _reader(weight) is not None
    return known and weight.nbytes >= weight.shape.numel()


def scaled_fp8(weight: Tensor) -> tuple[Tensor, Tensor] | None:
    """FP8 values (O, I) and scale () of ComfyUI's quantized tensor, or of a plain one of FP8 values; None of others."""
    if is_plain(weight):
        return (weight, torch.ones((), device=weight.device)) if weight.dtype == FP8 else None
    data, parameters = getattr(weight, "_qdata", None), getattr(weight, "_params", None)
    scale = getattr(parameters, "scale", None)
    if data is None or scale is None or data.dtype != FP8 or scale.numel() != 1 or data.shape != weight.shape:
        return None
    return data, scale


def patched(source: ModelPatcher, key: str) -> Tensor | None:
    """A GGUF tensor on the load device, plain, in float32, with the model's patches in; None of another one.

    Its pack's patcher keeps patches for the layer's forward, and cannot be asked for the weight with them in.
    """
    plain = dequantized(source.model.get_parameter(key), source.load_device)
    patches = source.patches.get(key, [])
    if plain is None:
        return None
    return comfy.lora.calculate_weight(patches, plain.clone(), key) if patches else plain


def dequantized(weight: Tensor, device: torch.device) -> Tensor | None:
    """A GGUF tensor on a device, plain, in float32; None of another one."""
    reader = _reader(weight)
    return None if reader is None else reader(weight.to(device), torch.float32).as_subclass(Tensor).to(torch.float32)


def _reader(weight: Tensor) -> Any:
    """The function that makes a plain tensor of a GGUF one."""
    if not hasattr(weight, "tensor_type"):
        return None
    return getattr(sys.modules[type(weight).__module__], READER, None)
