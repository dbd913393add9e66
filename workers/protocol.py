"""Messages between ComfyUI's process and its workers: plain data as JSON, tensors beside it in shared memory.

Nothing is ever unpickled. What is not plain data is refused, with the place where it was found.
"""

import json
import uuid
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

VERSION = 1
ALIGNMENT = 64  # bytes: where tensors start

Spec = tuple[int, tuple[int, ...], str]  # of a tensor: first byte, shape, type


class NotPlain(ValueError):
    """A value that no message can carry; the message says where it was."""


def pack(value: Any, tensors: list[Tensor], where: str = "") -> Any:
    """A value as JSON-ready data; its tensors are appended to `tensors`. Raises NotPlain."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Tensor):
        tensors.append(value)
        return {"tensor": len(tensors) - 1}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, uuid.UUID):
        return {"uuid": value.hex}
    if type(value) in (list, tuple):
        items = [pack(item, tensors, f"{where}[{i}]") for i, item in enumerate(value)]
        return items if type(value) is list else {"tuple": items}
    if isinstance(value, dict):
        return {
            "dict": [[pack(key, tensors, where), pack(item, tensors, f"{where}.{key}")] for key, item in value.items()]
        }
    raise NotPlain(f"{where.lstrip('.') or 'a value'} is a {type(value).__module__}.{type(value).__qualname__}")


def unpack(data: Any, tensors: Sequence[Tensor]) -> Any:
    """The value that pack() was given."""
    if isinstance(data, list):
        return [unpack(item, tensors) for item in data]
    if not isinstance(data, dict):
        return data
    ((kind, content),) = data.items()
    readers: dict[str, Callable[[], Any]] = {
        "tensor": lambda: tensors[content],
        "dtype": lambda: getattr(torch, content),
        "uuid": lambda: uuid.UUID(content),
        "tuple": lambda: tuple(unpack(item, tensors) for item in content),
        "dict": lambda: {unpack(key, tensors): unpack(item, tensors) for key, item in content},
    }
    return readers[kind]()


def layout(tensors: Sequence[Tensor]) -> tuple[list[Spec], int]:
    """Where each tensor goes in a stretch of bytes, and how many there are in all."""
    specs: list[Spec] = []
    place = 0
    for tensor in tensors:
        specs.append((place, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")))
        place += -(-tensor.numel() * tensor.element_size() // ALIGNMENT) * ALIGNMENT
    return specs, place


def write(blob: Tensor, tensors: Sequence[Tensor], specs: Sequence[Spec]) -> None:
    """Copy tensors of any device into a blob of bytes (uint8), as laid out."""
    for tensor, place in zip(tensors, read(blob, specs)):
        place.copy_(tensor)


def read(blob: Tensor, specs: Sequence[Spec]) -> list[Tensor]:
    """The tensors in a blob of bytes (uint8), as views of it."""
    out = []
    for place, shape, name in specs:
        dtype = getattr(torch, name)
        count = torch.Size(shape).numel()
        out.append(blob[place : place + count * dtype.itemsize].view(dtype).view(shape))
    return out


def encode(kind: str, data: Any, specs: Sequence[Spec] = (), size: int = 0) -> bytes:
    """A message: its kind, packed data, where its tensors lie and in how many bytes."""
    return json.dumps({"version": VERSION, "kind": kind, "data": data, "tensors": specs, "bytes": size}).encode()


def size_of(message: bytes) -> int:
    """Bytes of a message's tensors."""
    return json.loads(message)["bytes"]


def decode(message: bytes, blob: Tensor) -> tuple[str, Any]:
    """The kind of a message and its value; tensors are views of the blob. Raises ValueError on another version."""
    content = json.loads(message)
    if content["version"] != VERSION:
        raise ValueError(f"A worker speaks version {content['version']}, this is {VERSION}; restart ComfyUI.")
    specs = [(place, tuple(shape), name) for place, shape, name in content["tensors"]]
    return content["kind"], unpack(content["data"], read(blob, specs))
