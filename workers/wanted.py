"""Which workers are wanted: the devices that a plan names, and the options of ComfyUI's own process."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

import comfy
import comfy.cli_args
import torch
from comfy.model_patcher import ModelPatcher

from ..models import Network
from ..patchers import own_network
from ..plan import Plan
from .environment import machines
from .setting import Setting


def name_of(device: torch.device) -> str:
    """A device of this process as plans name it: "0", "cpu"."""
    return str(device.index or 0) if device.type == "cuda" else device.type


def visible_devices(names: Sequence[str]) -> tuple[str, ...]:
    """The devices that a plan names, "all" written out. Raises ValueError on one that is not there."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if list(names) == ["all"]:
        if not count:
            raise ValueError('ComfyUI found no GPU; name "cpu,cpu" as devices to try it on the CPU.')
        return tuple(str(i) for i in range(count))
    missing = [name for name in names if name != "cpu" and int(name) >= count]
    if missing:
        there = f"0 to {count - 1}" if count > 1 else "0 only" if count else "none"
        raise ValueError(f"There is no GPU {', '.join(missing)} here ({there}).")
    return tuple(names)


def setting_of(plan: Plan, source: ModelPatcher) -> Setting:
    """Which workers this plan wants. Raises ValueError where there can be none."""
    assert plan.parallel is not None
    devices, heads = visible_devices(plan.parallel.device_names), Network(own_network(source)).heads
    nodes, endpoint = machines()
    chosen = plan.parallel
    degrees = chosen.degrees(len(devices), heads) if nodes == 1 else (chosen.ulysses_degree, chosen.ring_degree)
    return worker_setting(devices, degrees, nodes, endpoint)


def worker_setting(devices: tuple[str, ...], degrees: tuple[int, int], nodes: int = 1, endpoint: str = "") -> Setting:
    """Workers with the options of ComfyUI's own process. Raises ValueError where there can be none."""
    if os.name != "posix":
        raise ValueError(
            'Worker processes need Linux; remove Context Parallel, or set devices of VAE Decode, Parallel to "all".'
        )
    together = torch.distributed.is_available() and torch.distributed.is_nccl_available()
    if "cpu" not in devices and not together:
        raise ValueError(
            "Workers on GPUs need NCCL, which PyTorch has on Linux; remove Context Parallel, or set devices of "
            'VAE Decode, Parallel to "all".'
        )
    options = {name: value for name, value in vars(comfy.cli_args.args).items() if _is_json(value)}
    options["fast"] = sorted(feature.value for feature in getattr(comfy.cli_args.args, "fast", None) or ())
    if "cpu" in devices:
        options["cpu"] = True
    folder = str(Path(next(iter(comfy.__path__))).parent)
    return Setting(folder, devices, degrees, json.dumps(options, sort_keys=True), nodes, endpoint)


def _is_json(value: object) -> bool:
    return value is None or isinstance(value, (bool, int, float, str))
