"""The bytes that a run needs on each of its devices: the model's weights, and what sampling takes (estimate.py)."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import comfy.model_management as memory
import torch
from torch import nn

from .estimate import Load, room_bytes, slices_for, work_bytes
from .models import Network
from .offloaded import ahead_bytes
from .patchers import own_network
from .plan import Plan, SlicesConfig
from .quantization import saved_bytes
from .slices import can_be_sliced
from .workers import visible_devices
from .workers.environment import machines

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

CONTEXT = 0.7e9  # bytes that CUDA takes of a GPU for a process: its context, and libraries


def world_of(plan: Plan) -> int:
    """How many devices a plan samples on."""
    return 1 if plan.parallel is None else len(visible_devices(plan.parallel.device_names)) * machines()[0]


def usable_bytes(device: torch.device) -> float:
    """Bytes that a run can have of a device: a GPU's, without what CUDA takes for a process and what ComfyUI leaves to
    other programs."""
    total = memory.get_total_memory(device)
    return total if device.type == "cpu" else total - CONTEXT - memory.extra_reserved_memory()


def load_of(patcher: "ModelPatcher", latent: Sequence[int]) -> Load | None:
    """The size of a model's call on a latent (B, C, ...). None where the latent is several packed into one, whose shape
    says nothing."""
    if len(latent) < 4:
        return None
    return Load.of(Network(own_network(patcher)), latent, patcher.model.get_dtype_inference().itemsize)


def weight_bytes(model: nn.Module, plan: Plan) -> float:
    """Bytes of a model's weights under a plan, wherever they are."""
    return memory.module_size(model) - (saved_bytes(model, plan.fp8) if plan.fp8 is not None else 0)


def coming_bytes(model: nn.Module, network: Network, plan: Plan) -> float:
    """Bytes of blocks' weights that are on a device at once where all of them come from the host's memory."""
    if not plan.loads_plainly:
        return 0
    return ahead_bytes(network) * weight_bytes(model, plan) / memory.module_size(model)


def with_slices(plan: Plan, patcher: "ModelPatcher", latent: Sequence[int], usable: float | None = None) -> Plan:
    """The plan with the model's blocks in slices of tokens where a device has no room for whole ones, be the weights
    wherever they are, and as it is where somebody has decided that already. usable: bytes that there are for weights
    on their way and work; None: what the device has."""
    load = load_of(patcher, latent) if plan.slices is None else None
    network = Network(own_network(patcher))
    if load is None or not all(can_be_sliced(network.architecture, stack) for stack in network.architecture.stacks):
        return plan
    if usable is None:
        usable = usable_bytes(patcher.load_device) - coming_bytes(patcher.model, network, plan)
    return replace(plan, slices=SlicesConfig(slices_for(load, plan, usable, world_of(plan))))


def needed_bytes(plan: Plan, patcher: "ModelPatcher", latent: Sequence[int]) -> float:
    """Bytes that must be free on each device before a run's calls, beside the weights that stay there; 0 where that is
    not known."""
    load = load_of(patcher, latent)
    if load is None:
        return 0
    coming = coming_bytes(patcher.model, Network(own_network(patcher)), plan)
    return room_bytes(load, plan, world_of(plan)) + coming


def expected_bytes(plan: Plan, patcher: "ModelPatcher", latent: Sequence[int]) -> float | None:
    """Bytes that a run needs on each device; None where they are not known."""
    load = load_of(patcher, latent)
    return None if load is None else weight_bytes(patcher.model, plan) + work_bytes(load, plan, world_of(plan))


def taken_bytes(plan: Plan, patcher: "ModelPatcher", latent: Sequence[int]) -> float | None:
    """Bytes of each device that a run takes, as is expected: what it needs, or all that it can have, where that is less
    and weights stay in the computer's memory. None where they are not known."""
    needed = expected_bytes(plan, patcher, latent)
    return None if needed is None else min(needed, usable_bytes(patcher.load_device))
