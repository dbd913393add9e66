"""Memory of devices that ComfyUI's process and workers have together."""

import comfy.model_management as memory
import torch

from ..patchers import is_proxy, loaded_entries
from .group import Group
from .wanted import name_of


def shares(group: Group, device: torch.device) -> bool:
    """Whether a device of this process is a worker's too."""
    return name_of(device) in group.setting.devices


def clear_own(device: torch.device, need: float = 1e30) -> None:
    """Unload what this process has on a device, all or until so many bytes are free, so that workers have room."""
    memory.soft_empty_cache()  # what ComfyUI counts as free there, but no other process can have
    proxies = [entry for entry in loaded_entries() if is_proxy(entry.model.model)]  # their unloading ends workers
    memory.free_memory(need, device, keep_loaded=proxies)
