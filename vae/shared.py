"""A VAE in the worker group, seen from ComfyUI's process: strips and tiles go out, pixels come back into one tensor."""

import logging
import weakref
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import comfy.model_management as memory
import torch
from comfy.utils import ProgressBar
from torch import Tensor

from .. import processes
from ..parallel.mesh import split
from ..workers.environment import machines
from ..workers.group import Group, group_for, running_group
from ..workers.room import clear_own, shares
from ..workers.wanted import worker_setting
from .memory import tile_bytes
from .strip import longer_side
from .tiles import Tiling, blended, tiles_of

logger = logging.getLogger("skein")

ALONE = 'set devices of VAE Decode, Parallel to "all", to decode as VAE Decode does'
_other_from_weights: weakref.WeakSet[Any] = weakref.WeakSet()  # models of VAEs that workers could not build


class CannotShare(ValueError):
    """Workers cannot decode this: the reason, and what the user can do about it where the devices were named."""

    def __init__(self, reason: str, advice: str = ALONE):
        super().__init__(f"{reason}; {advice}.")
        self.reason = reason


def refuse(vae: Any) -> None:
    """Raises CannotShare if it is known that workers cannot have this VAE."""
    if machines()[0] > 1:
        raise CannotShare("Workers on several machines do not decode")
    if vae.patcher.patches:
        raise CannotShare("A patched VAE cannot go to the workers")
    if vae.first_stage_model in _other_from_weights:
        raise CannotShare("ComfyUI cannot build this VAE again from its weights alone")


def workers(devices: tuple[str, ...], vae: Any) -> Group:
    """Workers on these devices that have this VAE: those that run, with whatever else they have, or new ones.

    Raises CannotShare if they cannot have it.
    """
    refuse(vae)
    group = running_group(devices)
    if group is None:
        setting = worker_setting(devices, (0, 0))
        group = group_for(setting, memory.throw_exception_if_processing_interrupted)
    if not group.vae.take(vae):
        _other_from_weights.add(vae.first_stage_model)
        refuse(vae)
    return group


def room(group: Group, need: int, own: torch.device) -> int:
    """Bytes free on the fullest of the group's devices; this process leaves its own if that is needed."""

    def least() -> int:
        return min(answer["free"] for answer in group.ask_all("room", {}).values())

    free = least()
    if free < need and shares(group, own):
        clear_own(own)
        free = least()
    return free


def decode_strips(group: Group, vae: Any, latent: Tensor, need: int) -> Tensor:
    """Frames (B, T, H, W, 3) of a latent, each rank decoding a strip."""
    dim, world = longer_side(latent), len(group.setting.devices)
    bar = ProgressBar(latent.shape[0] * vae.upscale_ratio[0](latent.shape[2]))
    question = {"latent": latent, "dim": dim, "parts": split(latent.shape[dim], world), "need": need}
    with _working(group):
        answers = group.ask_all("decode_strip", question, bar.update)
    strips = [answers[rank] for rank in range(world)]
    side = dim - 1  # colours come last
    shape = list(strips[0].shape)
    shape[side] = sum(strip.shape[side] for strip in strips)
    out, first = torch.empty(shape, dtype=strips[0].dtype, device=vae.output_device), 0
    for strip in strips:
        out.narrow(side, first, strip.shape[side]).copy_(strip)
        first += strip.shape[side]
    return out


def decode_tiles(group: Group, vae: Any, latent: Tensor, tiling: Tiling) -> Tensor:
    """Frames (B, T, H, W, 3) of a latent, the tiles of ComfyUI's tiled decoding dealt out to the ranks."""
    tiles = deque(tiles_of(vae, latent, tiling))
    bar, decoded = ProgressBar(len(tiles)), deque[Tensor]()

    def decode(_: Tensor) -> Tensor:
        if not decoded:  # what came before has been blended, so its memory may be used again
            latents = [tiles.popleft() for _ in range(min(len(tiles), len(group.setting.devices)))]
            need = max(tile_bytes(vae, each.shape) for each in latents)
            question = {"latents": latents, "need": need, "last": not tiles}
            answers = group.ask_all("decode_tile", question)
            decoded.extend(answers[rank] for rank in range(len(latents)))
        bar.update(1)
        return decoded.popleft()

    with _working(group):
        return blended(vae, latent, decode, tiling)


@contextmanager
def _working(group: Group) -> Iterator[None]:
    """Within: the workers decode. Afterwards, an interrupt included, they are shown as ready, if they are there."""
    try:
        with group.used():
            yield
    finally:
        if not group.closed:
            processes.stand(processes.READY)
