"""What the node does: decides where and how a latent is decoded, and says so."""

import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import closing, contextmanager
from typing import Any

import comfy.model_management as memory
import torch
from comfy.utils import ProgressBar
from torch import Tensor

from ..attributes import changed
from ..out_of_memory import is_out_of_memory
from ..patchers import room_of
from ..plan import DecodeConfig
from ..report import show
from ..workers.environment import machines
from ..workers.group import running_group
from ..workers.room import shares
from ..workers.wanted import name_of, visible_devices, worker_setting
from . import shared
from .deferred import UsedAgain
from .families import Family, family_of
from .memory import sliced_bytes, whole_bytes
from .strip import Strip
from .tiles import Tiling, tiles_of, tiling_of
from .whole import frames_in_slices, frames_of, quick

logger = logging.getLogger("skein")

RAN_OUT = {  # how it was decoded in the end -> the same, and why
    "whole, in slices": "whole, in slices, because memory ran out when whole,",
    "in tiles": "in tiles, because memory ran out when whole,",
}


def decode(vae: Any, latent: Tensor, config: DecodeConfig) -> Tensor:
    """Frames (B, T, H, W, 3), or images (B, H, W, 3), of a latent. Where the devices cannot share the decode, ComfyUI's
    own process does what VAE Decode does if they are "all"; raises ValueError if they were named."""
    vae.throw_exception_if_invalid()
    if latent.is_nested:
        latent = latent.unbind()[0]
    started = time.perf_counter()
    run, reason = _run(vae, latent, config)
    frames, how = run.decode()
    told = f"{how} on {run.where}, {time.perf_counter() - started:.1f} s{reason}"
    logger.info("Skein VAE: %s", told)
    show(config.node_id, told)
    return frames


def check(vae: Any, config: DecodeConfig) -> None:
    """Raises ValueError on a decode that is refused whatever the latent."""
    vae.throw_exception_if_invalid()
    devices = _devices(vae, config)
    if devices is not None and config.device_names != ["all"]:
        _refuse(vae, config, len(devices))
        worker_setting(devices, (0, 0))


def _run(vae: Any, latent: Tensor, config: DecodeConfig) -> tuple["_Decode", str]:
    """How to decode, and why by ComfyUI's own process where others were to share it."""
    devices = _devices(vae, config)
    if devices is None:
        return _Alone(vae, latent, config), ""
    try:
        return _Shared(vae, latent, config, devices), ""
    except shared.CannotShare as error:
        if config.device_names != ["all"]:
            raise
        return _Alone(vae, latent, config), f" ({error.reason})"


def _refuse(vae: Any, config: DecodeConfig, world: int, latent: Tensor | None = None) -> None:
    """Raises CannotShare if so many devices cannot share a decode, as far as that is known without a latent."""
    if vae.latent_dim == 1 or vae.extra_1d_channel is not None or vae.output_channels == 2:
        raise shared.CannotShare("This VAE decodes sound, not pictures", "use VAE Decode Audio")
    if vae.latent_dim != 3 or (latent is not None and latent.ndim != 5):
        raise shared.CannotShare("This VAE decodes single images, which several devices cannot share")
    shared.refuse(vae)
    family = family_of(vae)
    if family is None and getattr(vae, "handles_tiling", False):
        raise shared.CannotShare("This VAE tiles by itself, which several devices cannot share")
    if config.mode == "whole" and family is None:
        model = type(vae.first_stage_model).__name__
        raise shared.CannotShare(f"The frames of a {model} cannot be cut", "set mode to tiled")
    side = world if latent is None else max(latent.shape[-2:])
    if config.mode == "whole" and side < world:
        raise shared.CannotShare(
            f"The longer side of the frame has {side} latent pixels, too few for {world} devices", "name fewer"
        )


def _devices(vae: Any, config: DecodeConfig) -> tuple[str, ...] | None:
    """The workers' devices; None for ComfyUI's own process. Raises ValueError on what there is not."""
    names = config.device_names
    if names == ["all"]:
        devices = _together()
        return devices if len(devices) > 1 and _fit(vae, devices) else None
    if names == [name_of(vae.device)]:
        return None
    devices = visible_devices(names)
    if not _fit(vae, devices):
        raise ValueError('ComfyUI decodes on the CPU here (--cpu-vae); name "cpu" as device.')
    return devices


def _together() -> tuple[str, ...]:
    """The devices of the workers that run, whom others would end; else all GPUs, where they can work together."""
    if machines()[0] > 1:
        return ()
    if (group := running_group()) is not None:
        return group.setting.devices
    found = torch.cuda.is_available() and torch.distributed.is_available() and torch.distributed.is_nccl_available()
    return visible_devices(["all"]) if found else ()


def _fit(vae: Any, devices: tuple[str, ...]) -> bool:
    """Whether workers on these devices would have the VAE on them: not where ComfyUI has it on the CPU (--cpu-vae)."""
    return vae.device.type != "cpu" or "cpu" in devices


class _Decode(ABC):
    """How to decode: whole where it is asked for, or where it may fit, in slices if that takes too much; else, or if
    memory ran out, in tiles.

    where: the devices, as the user names them. world: how many share a whole decode.
    """

    def __init__(self, vae: Any, latent: Tensor, config: DecodeConfig, where: str, world: int):
        self.vae, self.latent, self.config, self.where, self.world = vae, latent, config, where, world
        self.family: Family | None = family_of(vae) if latent.ndim == 5 else None

    def decode(self) -> tuple[Tensor, str]:
        """The frames, and how they were decoded."""
        ran_out = False
        for how, run in self.ways():
            try:
                return run(), RAN_OUT[how] if ran_out else how
            except UsedAgain as error:
                logger.warning("Skein VAE: this decoder cannot decode %s: %s.", how, error)
            except Exception as error:
                if run == self.tiled or not is_out_of_memory(error):
                    raise
                ran_out = True
                logger.warning("Skein VAE: there is not enough memory on %s to decode %s.", self.where, how)
            memory.soft_empty_cache()
        raise AssertionError

    @abstractmethod
    def ways(self) -> list[tuple[str, Callable[[], Tensor]]]:
        """How it may be decoded, in words, and what does it: one after the other, as memory runs out."""

    @property
    def work(self) -> int:
        """Bytes that a whole decode takes on each device, beside the VAE's weights."""
        assert self.family is not None
        return whole_bytes(self.vae, self.family, self.latent.shape, self.world)

    @abstractmethod
    def tiled(self) -> Tensor:
        """Tile after tile."""


class _Alone(_Decode):
    """In ComfyUI's own process."""

    def __init__(self, vae: Any, latent: Tensor, config: DecodeConfig):
        super().__init__(vae, latent, config, str(vae.device), 1)

    def ways(self) -> list[tuple[str, Callable[[], Tensor]]]:
        tiled = ("in tiles", self.tiled)
        if self.config.mode == "tiled":
            return [tiled]
        if self.family is None:
            return [("whole", lambda: self.vae.decode(self.latent)), tiled]
        forced = self.config.mode == "whole"
        sliced = self.family.sliced_share is not None and not getattr(self.vae, "not_video", False)
        ways: list[tuple[str, Callable[[], Tensor]]] = []
        if self._fits(self.work) or (forced and not sliced):
            ways.append(("whole", self.whole))
        if sliced and (forced or self._fits(self.sliced_work[0])):
            ways.append(("whole, in slices", self.in_slices))
        return [*ways, tiled]

    def _fits(self, work: int) -> bool:
        need = work + self.vae.model_size()
        if room_of(self.vae.device) < need:
            _take_room(self.vae.device)
        return room_of(self.vae.device) >= need

    @property
    def sliced_work(self) -> tuple[int, int]:
        """Bytes that a decode in slices takes, beside the VAE's weights; of carried frames besides."""
        assert self.family is not None
        return sliced_bytes(self.vae, self.family, self.latent.shape)

    def whole(self) -> Tensor:
        """All layers whole."""
        vae, latent = self.vae, self.latent
        strip, out = Strip(-1, (latent.shape[-1],)), None
        with closing(frames_of(vae, latent, strip, *self._started(self.work))) as videos:
            for i, frames in enumerate(videos):
                if out is None:
                    out = torch.empty((len(latent), *frames.shape), dtype=frames.dtype, device=vae.output_device)
                out[i].copy_(frames)
        assert out is not None
        return out

    def in_slices(self) -> Tensor:
        """The same pixels, each layer a few rows at a time. Carried frames that do not fit wait on the host."""
        least, carried = self.sliced_work
        carried = min(carried, max(0, room_of(self.vae.device) - self.vae.model_size() - least))
        try:
            return frames_in_slices(self.vae, self.latent, *self._started(least + carried), carried)
        finally:
            _empty_host_cache(self.vae.device)

    def _started(self, work: int) -> tuple[Callable[[], None], Callable[[int], None]]:
        """The VAE loaded, with room for the work: what to call before each layer, and with the frames decoded."""
        vae, latent = self.vae, self.latent
        memory.load_models_gpu([vae.patcher], memory_required=work, force_full_load=vae.disable_offload)
        bar = ProgressBar(latent.shape[0] * vae.upscale_ratio[0](latent.shape[2]))
        return memory.throw_exception_if_processing_interrupted, bar.update

    def tiled(self) -> Tensor:
        """ComfyUI's own tiled decoding, with a progress bar."""
        vae, latent = self.vae, self.latent
        tiling = tiling_of(vae, self.config)
        frames, tile, _ = tiling.tile
        sizes = {"tile_x": tile, "tile_y": tile, "overlap": tiling.overlap[1]}
        if latent.ndim == 5:
            sizes |= {"tile_t": frames, "overlap_t": tiling.overlap[0]}
        with _counting_tiles(vae, latent, tiling):
            return vae.decode_tiled(latent, **sizes)


@contextmanager
def _counting_tiles(vae: Any, latent: Tensor, tiling: Tiling):
    """Within: each tile that ComfyUI decodes moves a progress bar, and an interrupt is seen between two."""
    if latent.ndim != 5 or getattr(vae, "handles_tiling", False):
        yield
        return
    bar, decode = ProgressBar(len(tiles_of(vae, latent, tiling))), vae.first_stage_model.decode

    def decode_one(*args: Any, **kwargs: Any) -> Tensor:
        memory.throw_exception_if_processing_interrupted()
        out = decode(*args, **kwargs)
        bar.update(1)
        return out

    with quick(vae), changed([(vae.first_stage_model, "decode", decode_one)]):
        yield


def _empty_host_cache(device: torch.device) -> None:
    """Give pinned memory that nobody has any more back to the system, where PyTorch can."""
    empty = getattr(getattr(torch, "accelerator", None), "empty_host_cache", None)
    if device.type == "cuda" and empty is not None:
        empty()


def _take_room(device: torch.device) -> None:
    """Have the workers on this device give its memory back; they stay, and load again when they sample."""
    group = running_group()
    if group is not None and device.type == "cuda" and shares(group, device):
        group.give_room()


class _Shared(_Decode):
    """In the worker group."""

    def __init__(self, vae: Any, latent: Tensor, config: DecodeConfig, devices: tuple[str, ...]):
        super().__init__(vae, latent, config, ", ".join(devices), len(devices))
        self.devices = devices
        _refuse(vae, config, len(devices), latent)
        shared.workers(devices, vae)  # who may be unable to build the VAE

    @property
    def _wide_enough(self) -> bool:
        return max(self.latent.shape[-2:]) >= self.world

    def ways(self) -> list[tuple[str, Callable[[], Tensor]]]:
        tiled = ("in tiles", self.tiled)
        return [("whole", self.whole), tiled] if self._fits() else [tiled]

    def _fits(self) -> bool:
        if self.config.mode != "auto" or self.family is None or not self._wide_enough:
            return self.config.mode == "whole"
        need = self.work + self.vae.model_size()
        return shared.room(shared.workers(self.devices, self.vae), need, self.vae.device) >= need

    def whole(self) -> Tensor:
        return shared.decode_strips(shared.workers(self.devices, self.vae), self.vae, self.latent, self.work)

    def tiled(self) -> Tensor:
        group, tiling = shared.workers(self.devices, self.vae), tiling_of(self.vae, self.config)
        return shared.decode_tiles(group, self.vae, self.latent, tiling)
