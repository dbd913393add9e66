"""A proxy: a second model without weights (its tensors have a shape and no memory) in the place of one that is in the
workers. ComfyUI's sampling code finds everything that it asks of a model, loads nothing and moves nothing.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import comfy.model_management as memory
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import CallbacksMP
from torch import Tensor, nn

from ..estimate import Load, room_bytes
from ..models import Network, entry_of, share
from ..patchers import PROXY_KEY, clone_over, unload
from ..plan import PLAN_KEY, Plan
from .conversation import GroupError
from .group import release, running_group
from .room import shares

logger = logging.getLogger("skein")

MORE = 1e29  # bytes: more than ComfyUI asks of a model that it does not unload

_unloaded: "Proxy | None" = None  # the last one; it must not go while ComfyUI is at its books


def proxy_of(source: ModelPatcher) -> "Proxy":
    """The proxy of a model, which stays with it."""
    kept = vars(source.model)
    if PROXY_KEY not in kept:
        kept[PROXY_KEY] = Proxy(source)
    return kept[PROXY_KEY]


class Proxy:
    """The second model, and ComfyUI's books about it: when ComfyUI unloads it, the workers drop the model, or end if it
    is their last; when ComfyUI asks for some of its memory, they give what they have on the devices, and keep it.

    spare: bytes that can be free beside the weights on the fullest of the devices.
    """

    def __init__(self, source: ModelPatcher):
        unload(source)
        self.spare, self.plan, self.world = 0.0, Plan(), 1
        self.model: Any = share(source.model)
        network: Any = self.model.diffusion_model
        _empty(network)
        vars(network)[entry_of(network)] = _without_workers
        vars(self.model)[PROXY_KEY] = self
        vars(self.model)["memory_required"] = self._asked
        self.root = ModelPatcher(self.model, source.load_device, source.offload_device, size=1)
        self._watch(self.root)

    def patcher(self, source: ModelPatcher) -> ModelPatcher:
        """A run's patcher over the proxy, with everything of the source's but what the workers do."""
        patcher = clone_over(source, self.root)
        patcher.patches, patcher.patches_uuid = {}, self.root.patches_uuid
        self._watch(patcher)
        return patcher

    def begins(self, plan: Plan, world: int, told: dict[int, dict]) -> None:
        """A run begins, of which the workers have told their memory (Worker.begin)."""
        self.plan, self.world = plan, world
        self.spare = min(each["spare"] for each in told.values())

    def need(self, latent: Sequence[int]) -> float:
        """Bytes that each worker wants free for a call with a latent of this shape."""
        load = Load.of(Network(self.model.diffusion_model), latent, self.model.get_dtype_inference().itemsize)
        return room_bytes(load, self.plan, self.world)

    def _asked(self, input_shape: Sequence[int], *_args: Any, **_kwargs: Any) -> float:
        """The model's memory_required, which ComfyUI asks while it samples, to put conditionings into one call or not;
        and before that, to make room for it in its own process, which needs none."""
        return 0.0 if self.model.current_patcher is None else self.need(input_shape)

    def _watch(self, patcher: ModelPatcher) -> None:
        patcher.add_callback_with_key(CallbacksMP.ON_DETACH, PLAN_KEY, self._detached)
        vars(patcher)["loaded_size"], vars(patcher)["partially_unload"] = self._held, self._give
        vars(patcher)["get_free_memory"] = lambda device: self.spare

    def _held(self) -> float:
        """Bytes that ComfyUI may ask for without unloading the proxy: all that the workers have on the device.

        In a run of theirs nothing of it is asked, but that of another model they keep: for a proxy ComfyUI needs none.
        """
        group = running_group()
        held = None if group is None else group.models.of(self)
        if group is None or held is None or group.models.running is held:
            return 0
        return MORE if group.in_use else group.models.on_devices

    def _give(self, _device: Any, wanted: float, *_rest: Any, **_options: Any) -> float:
        """ComfyUI needs some of its device's memory: workers give theirs, and load again when they sample.

        ComfyUI unloads what gives too little; so workers on other devices, which have nothing to give, or in a run of
        another model, are said to have given what is wanted.
        """
        group = running_group()
        if group is None:
            return 0
        if group.in_use or not shares(group, self.root.load_device):
            return wanted
        freed = 0
        with _raising_nothing():
            freed = group.give_room()
        return freed

    def _detached(self, _patcher: ModelPatcher, unpatch_all: bool) -> None:
        """ComfyUI has unloaded the model: because somebody asked for it or for memory; or, with --disable-smart-memory,
        because it loads another, and then the workers keep it."""
        global _unloaded
        group = running_group()
        held = None if group is None else group.models.of(self)
        if not unpatch_all or group is None or held is None:
            return
        _unloaded = self
        with _raising_nothing():
            if memory.DISABLE_SMART_MEMORY and group.models.running is not held:
                if group.models.on_devices and not group.in_use:
                    group.give_room()
            elif not group.models.let_go(self):
                release()


@contextmanager
def _raising_nothing() -> Iterator[None]:
    """Within: what workers fail of is logged, and an interrupt put off; ComfyUI is in the middle of its books."""
    try:
        yield
    except memory.InterruptProcessingException:
        memory.interrupt_current_processing(True)  # for the next node
    except (GroupError, torch.OutOfMemoryError) as error:
        logger.warning("Skein workers: %s", error)


def _without_workers(*_args: Any, **_kwargs: Any) -> None:
    """The proxy's own forward: a run puts its caller in this place."""
    raise RuntimeError("Skein: the weights of this model are in the workers; only Context Parallel's runs may call it.")


def _empty(network: Any) -> None:
    """Tensors without memory in the place of all parameters and buffers, which no move touches."""
    for module in network.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(_hollow(parameter), requires_grad=False)
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else _hollow(buffer)
        vars(module)["_apply"] = lambda function, recurse=True, module=module: module


def _hollow(tensor: Tensor) -> Tensor:
    """One value over and over. Not on the meta device: ComfyUI fills what is there with zeros when it loads a model."""
    return torch.empty((), dtype=tensor.dtype).expand(tensor.shape)
