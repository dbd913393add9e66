"""The twin of a model: the same modules over the same tensors, but with FP8 in the place of chosen Linear layers.

ComfyUI's patches (LoRA) on a quantized layer are merged first, by ComfyUI's own code and with its rounding, and the
result is quantized: FP8 with a LoRA is to the bit FP8 of the weights that ComfyUI would have run with it. Patches on
all other layers stay patches. The original is unloaded before its weights are read, and is never written to.
"""

import logging
import time
import uuid
from collections.abc import Collection, Iterable, Iterator
from typing import TypeVar

import comfy.model_management as memory
import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor, nn

from .. import live
from ..checkpoints.in_file import keep_in_file
from ..models import share
from ..patchers import clone_over, unload
from .given import patched
from .linear import QuantizedLinear

logger = logging.getLogger("skein")

T = TypeVar("T")


class Twin:
    """An FP8 twin and ComfyUI's books about it, which persist between runs.

    modes: path of each quantized layer in the model -> its mode (see QuantizedLinear), in running order.
    work: bytes that the run takes beside the weights, which stay on the device if there is room for both.
    Raises what the device raises when it is full, and ComfyUI's interrupt; the source is then as it was.
    """

    def __init__(self, source: ModelPatcher, modes: dict[str, str], work: float = 0):
        started = time.perf_counter()
        unload(source)
        self.modes = modes
        self.merged: dict[str, list] = {}  # layer -> the patches that its FP8 weights contain
        self.model = share(source.model)
        self.model.device = source.offload_device
        keep_in_file(self.model)  # what is not quantized, where the source's weights lie there
        self._rest: list = []  # the patches of the last run that were left to ComfyUI
        self._rest_uuid = uuid.uuid4()
        self.resident = self._quantize(source, work)
        # The patcher that ComfyUI falls back on when a run's own is gone: it must not be one over the source's model.
        self.root = ModelPatcher(self.model, source.load_device, source.offload_device)
        self.bytes = self.root.model_size()
        self.source_bytes = memory.module_size(source.model)
        self.seconds = time.perf_counter() - started

    def patcher(self, source: ModelPatcher) -> ModelPatcher:
        """A run's patcher over the twin, with everything that other nodes have put on the source."""
        patcher = clone_over(source, self.root)
        for key in _keys(self.modes):
            patcher.patches.pop(key, None)
        rest = [item for key, value in patcher.patches.items() for item in ((key,), *value)]
        rest += [(key, *functions) for key, functions in patcher.weight_wrapper_patches.items()]
        rest += [(patcher.force_cast_weights,)]
        if not _same(rest, self._rest):
            self._rest, self._rest_uuid = rest, uuid.uuid4()
        patcher.patches_uuid = self._rest_uuid  # ComfyUI reloads the model when this changes
        return patcher

    def update(self, source: ModelPatcher) -> int:
        """Quantize again the layers whose patches have changed; how many those were."""
        changed = [name for name in self.modes if not _same(_patches(source, name), self.merged[name])]
        if changed:
            unload(source)
        for name in _told(changed):
            memory.throw_exception_if_processing_interrupted()
            layer = self.model.get_submodule(name)
            assert isinstance(layer, QuantizedLinear)
            self.root.unpin_weight(f"{name}.bias")  # another takes its place; the weight is written into
            layer.replace(*merged_weights(source, name))
            self.merged[name] = _patches(source, name)
        return len(changed)

    @property
    def merged_count(self) -> int:
        return sum(bool(patches) for patches in self.merged.values())

    def _quantize(self, source: ModelPatcher, work: float) -> bool:
        """Replace the layers one by one; whether all of them are on the load device in the end.

        The FP8 weights stay there if there was room for all beforehand: those of some would lie in the way.
        """
        device, offload = source.load_device, source.offload_device
        resident = _make_room(source, self.modes, work)
        for name, mode in _told(self.modes.items()):
            memory.throw_exception_if_processing_interrupted()
            layer = QuantizedLinear(*merged_weights(source, name), mode)
            comfy.utils.set_attr(self.model, name, layer)
            self.merged[name] = _patches(source, name)
            if resident and not _room_for(0, device):  # another program has taken some meanwhile
                resident = False
                self.model.to(offload)
            if not resident:
                layer.to(offload)
        return resident


def _told(layers: Collection[T]) -> Iterator[T]:
    """The layers, and while they are gone through, how far."""
    with live.activity("Quantizing to FP8") as progress:
        for done, layer in enumerate(layers):
            progress(done / len(layers))
            yield layer


def merged_weights(source: ModelPatcher, name: str) -> tuple[Tensor, Tensor | None]:
    """Weight (O, I) and bias (O,) of a layer on the load device, with its patches in, as ComfyUI would run them."""

    def merged(key: str) -> Tensor:
        read = patched(source, key)
        if read is not None:
            return read
        if key in source.patches:
            return source.patch_weight_to_device(key, device_to=source.load_device, return_weight=True)
        return memory.cast_to_device(comfy.utils.get_attr(source.model, key), source.load_device, None)

    layer: nn.Module = source.model.get_submodule(name)
    return merged(f"{name}.weight"), None if layer.bias is None else merged(f"{name}.bias")


def _make_room(source: ModelPatcher, modes: dict[str, str], work: float) -> bool:
    """Unload other models for the twin, and for its largest layer or the run's work; whether there is room for all."""
    if source.load_device.type == "cpu":
        return True
    weights = [source.model.get_submodule(name).weight for name in modes]
    twin = memory.module_size(source.model) - sum(weight.nbytes - weight.shape.numel() for weight in weights)
    need = twin + max(work, 16 * max(weight.shape.numel() for weight in weights))
    memory.free_memory(need + memory.minimum_inference_memory(), source.load_device)
    memory.soft_empty_cache(force=True)
    return _room_for(need, source.load_device)


def _room_for(size: int, device: torch.device) -> bool:
    """Whether so many bytes more leave the device what ComfyUI wants for inference at the least."""
    return device.type == "cpu" or memory.get_free_memory(device) >= size + memory.minimum_inference_memory()


def _keys(names: Iterable[str]) -> list[str]:
    return [f"{name}.{part}" for name in names for part in ("weight", "bias")]


def _patches(source: ModelPatcher, name: str) -> list:
    """The patches on a layer, those on the weight before those on the bias."""
    return [(key, *patch) for key in _keys([name]) for patch in source.patches.get(key, [])]


def _same(first: list, second: list) -> bool:
    """Whether two lists of patches are the same: numbers and names equal, tensors and functions the same objects."""

    def equal(a: object, b: object) -> bool:
        return a is b or (isinstance(a, (str, int, float, tuple)) and _plain(a) and type(a) is type(b) and a == b)

    return len(first) == len(second) and all(
        len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b)) for a, b in zip(first, second)
    )


def _plain(value: object) -> bool:
    """Whether a value can be compared with ==: a tuple that holds tensors cannot."""
    return not isinstance(value, tuple) or all(isinstance(part, (str, int, float)) for part in value)
