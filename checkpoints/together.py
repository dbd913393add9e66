"""Weights that are put together of several, in a file that has no name and lies in memory.

Whoever loads the model on this machine maps the same memory: ComfyUI's process, its second model without dynamic VRAM,
all workers. So the host has these weights once, as it has those that stay in the checkpoint's own files. A weight that
is written to gets pages of its own from the operating system. The file goes with the last model over it. It is a
safetensors file; where there is no such memory (it is Linux's), each process has the weights for itself.
"""

import json
import logging
import os
import uuid
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from comfy.cli_args import args
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from .keys import Made, make

logger = logging.getLogger("skein")

TYPES = {  # as safetensors calls them
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}
MARK = "skein"  # in the metadata: which file it is, as the path of one that is gone may be another's
FILE_KEY = "_skein_together"  # on a model: what has to be held of its file
ALIGNMENT = 8  # of the weights, in bytes
Place = dict[str, str]  # where such a file is, as plain data: path, mark


@dataclass(frozen=True)
class Shared:
    """Weights in such a file. file: what has to be held for as long as others are to find it at its place; None where
    another model holds it."""

    place: Place
    weights: dict[str, Tensor]
    file: Any

    def held_by(self, model: nn.Module) -> Place | None:
        """Have the file last as long as a model over it. Returns its place; None if no weight of the model lies in it,
        for all have been converted, which made copies of them."""
        places = {weight.data_ptr() for weight in self.weights.values()}
        if not any(parameter.data_ptr() in places for parameter in model.parameters()):
            return None
        vars(model)[FILE_KEY] = self.file
        return self.place


def shared(planned: Mapping[str, Made], weights: Mapping[str, Tensor], place: Place | None) -> Shared | None:
    """Weights that are put together, in the file at a place or else in a new one; None if that cannot be done here.

    planned: name -> what it is made of.
    """
    if not planned or not hasattr(os, "memfd_create") or args.disable_mmap:
        return None
    found = _read(place) if place else {}
    if place and found.keys() == planned.keys():
        return Shared(place, found, None)
    shapes = {name: make(made, _Shapes(weights)) for name, made in planned.items()}
    if any(shape.dtype not in TYPES for shape in shapes.values()):
        return None
    file = _File()
    try:
        file.fill(planned, weights, shapes)
    except OSError as error:  # the system's limit of such memory
        logger.info("Skein: weights are put together in each process for itself (%s)", error)
        return None
    return Shared(file.place, _read(file.place), file)


def _read(place: Place) -> dict[str, Tensor]:
    """The weights of a file, in its memory; empty if it is not there any more, or is on another machine."""
    try:
        with safe_open(place["path"], framework="pt") as file:
            if (file.metadata() or {}).get(MARK) != place["mark"]:
                return {}
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (OSError, SafetensorError):
        return {}


class _File:
    """The memory, for as long as this object lives and as others have it mapped."""

    def __init__(self) -> None:
        self._descriptor = os.memfd_create("skein-weights")
        weakref.finalize(self, os.close, self._descriptor)
        # Not /proc/self: other processes are to find it there too.
        self.place: Place = {"path": f"/proc/{os.getpid()}/fd/{self._descriptor}", "mark": uuid.uuid4().hex}

    def fill(self, planned: Mapping[str, Made], weights: Mapping[str, Tensor], shapes: Mapping[str, Tensor]) -> None:
        """Write all weights, one after another, so that no more than one is in memory twice. shapes: on the meta
        device, by name."""
        header, end = self._header(shapes)
        os.truncate(self._descriptor, len(header) + end)
        os.pwrite(self._descriptor, header, 0)
        memory = torch.UntypedStorage.from_file(self.place["path"], shared=True, nbytes=len(header) + end)
        begin = len(header)
        for name in _ordered(shapes):
            shape = shapes[name]
            there = torch.empty(0, dtype=shape.dtype).set_(memory, begin // shape.itemsize, shape.shape)  # type: ignore[call-overload]
            there.copy_(make(planned[name], weights))
            begin += shape.nbytes

    def _header(self, shapes: Mapping[str, Tensor]) -> tuple[bytes, int]:
        """The file's beginning, and how many bytes follow it."""
        entries: dict[str, Any] = {"__metadata__": {MARK: self.place["mark"]}}
        end = 0
        for name in _ordered(shapes):
            shape = shapes[name]
            offsets = [end, end := end + shape.nbytes]
            entries[name] = {"dtype": TYPES[shape.dtype], "shape": list(shape.shape), "data_offsets": offsets}
        text = json.dumps(entries).encode()
        text += b" " * (-len(text) % ALIGNMENT)
        return len(text).to_bytes(8, "little") + text, end


class _Shapes(Mapping[str, Tensor]):
    """Weights as tensors without memory."""

    def __init__(self, weights: Mapping[str, Tensor]):
        self._weights = weights

    def __getitem__(self, name: str) -> Tensor:
        return torch.empty_like(self._weights[name], device="meta")

    def __iter__(self):
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)


def _ordered(shapes: Mapping[str, Tensor]) -> list[str]:
    """Names in the file's order: the widest types first, so that each weight begins at a multiple of its size."""
    return sorted(shapes, key=lambda name: -shapes[name].itemsize)
