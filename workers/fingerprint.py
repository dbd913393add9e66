"""What a model's weights are, in short: whether a worker has loaded the model that ComfyUI's process has.

A node between the loader and ours may have made a second model with other weights, of which the recipe knows nothing.
"""

import hashlib
import weakref
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..patchers import own_network

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

FINGERPRINT_KEY = "_skein_fingerprint"  # on a model: a weak reference to it, and its fingerprint
VALUES = 16  # of each weight, its first ones, that count: one page of a file


def fingerprint_of(patcher: "ModelPatcher") -> str:
    """The fingerprint of a model in ComfyUI's process, taken once. Empty under dynamic VRAM, where weights move by
    themselves."""
    if patcher.is_dynamic():
        return ""
    model = patcher.model
    noted, known = vars(model).get(FINGERPRINT_KEY, (lambda: None, ""))
    if noted() is not model:  # a copy of a model has a copy of this
        known = fingerprint(patcher)
        vars(model)[FINGERPRINT_KEY] = weakref.ref(model), known
    return known


def fingerprint(patcher: "ModelPatcher") -> str:
    """A hash of the names, types and shapes of a model's weights without patches, and of some of their values."""
    digest = hashlib.sha256()
    for name, weight in own_network(patcher).named_parameters():
        patched = patcher.backup.get(f"diffusion_model.{name}")
        weight = weight if patched is None else patched.weight
        digest.update(f"{name} {list(weight.shape)}\n".encode())
        if not hasattr(weight, "__tensor_flatten__"):  # several tensors in one, as ComfyUI's QuantizedTensor
            stored = weight.as_subclass(Tensor).detach().flatten()[:VALUES]
            digest.update(f"{weight.dtype} ".encode() + stored.view(torch.uint8).cpu().numpy().tobytes())
    return digest.hexdigest()
