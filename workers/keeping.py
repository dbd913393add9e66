"""How many models workers keep: as many as the host's memory allows."""

import math
from dataclasses import dataclass

import comfy.model_management as memory
import psutil
from comfy.cli_args import args
from comfy.model_patcher import ModelPatcher
from safetensors import SafetensorError, safe_open

from ..plan import Plan

NAMES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2"}
FEW = 0.01  # of the bytes of a new model: what buffers take at most


@dataclass(frozen=True)
class Need:
    """What each worker needs for a model that is to be loaded: bytes on the device, and in the host's memory outside of
    the checkpoint's file."""

    device: int
    host: int


def need_of(source: ModelPatcher, recipe: dict, plan: Plan, on_cpu: bool) -> Need:
    """Of the model that ComfyUI's process has loaded by a recipe, sampled under a plan. on_cpu: where workers are."""
    size = memory.module_size(source.model)
    host = int(size * _share_converted(recipe))
    if plan.fp8 is not None:
        size //= source.model.get_dtype().itemsize  # of the twin at most
        host += size if on_cpu else 0
    return Need(size, host)


def lacking(told: dict[int, dict], need: Need) -> bool:
    """Whether the host lacks memory for another model beside those that workers keep. told: Worker.holdings, by rank.

    The rule: the host must have available, for each worker of this machine, what the new model takes there outside of
    the checkpoint's file, and what comes there from the device to make room for the new one, as far as it lies in no
    file either. Weights in the file cost nothing: the system takes their pages back by itself. Workers on the CPU have
    what they keep in the host's memory already, so only the new model counts. While memory is lacking, the model that
    was used least recently goes, of those that take any.
    """
    total = 0
    for answer in told.values():
        moved = max(need.device - answer["free"], 0)
        total += need.host + min(moved, sum(each["device"] for each in answer["models"].values()))
    return total > available()


def takes_memory(told: dict[int, dict], key: int, need: Need) -> bool:
    """Whether a model takes memory outside of its file in any worker, more than a few buffers do."""
    return any(sum(answer["models"].get(key, {}).values()) > FEW * need.device for answer in told.values())


def available() -> int:
    """Bytes of the host's memory that processes can still have."""
    return psutil.virtual_memory().available


def _share_converted(recipe: dict) -> float:
    """How much of a model's files ComfyUI's loader does not leave in them: it converts what is of another type than the
    model, and reads files that are neither safetensors nor GGUF, or all (--disable-mmap), into memory."""
    if getattr(args, "disable_mmap", False):
        return 1.0
    same = total = 0
    for each in recipe["files"]:
        if each["path"].endswith(".gguf"):  # ComfyUI-GGUF maps it, and takes the weights as they are
            return 0.0
        if each["path"].endswith(".json"):  # says how a folder's weights belong together, and has none
            continue
        try:
            with safe_open(each["path"], "pt") as file:
                slices = [file.get_slice(name) for name in file.keys()]  # noqa: SIM118 (it is no mapping)
        except (SafetensorError, OSError):
            return 1.0
        for tensor in slices:
            count = math.prod(tensor.get_shape())
            total += count
            same += count if tensor.get_dtype() == NAMES.get(recipe["dtype"]) else 0
    return 1.0 - same / max(total, 1)
