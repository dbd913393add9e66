"""FP8 for one sampling run: the twin is made or brought up to date, and takes the model's place."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from comfy.model_patcher import ModelPatcher

from ..patchers import TWIN_KEY, is_loaded, keep, let_go
from ..plan import FP8Config
from ..report import show
from ..units import bytes_text
from .layers import (
    NONE_FIT,
    OLD_GPU,
    SCALED,
    block_layers,
    refuse_conflicts,
    require_float8,
    require_torchao,
    supported_mode,
)
from .twin import Twin

logger = logging.getLogger("skein")


@contextmanager
def quantized(source: ModelPatcher, config: FP8Config, work: float = 0) -> Iterator[ModelPatcher]:
    """The patcher to sample with: one over the FP8 twin, or the source itself if it is quantized already, or has
    no layer that could be. work: see Twin.

    Raises ValueError with a sentence if another node's work on the model cannot be kept, or torchao is missing.
    """
    require_torchao()
    device = source.load_device
    require_float8(device)
    mode = supported_mode(config.mode, device)
    notes = [OLD_GPU.format(mode)] if mode != config.mode else []
    layers = block_layers(source.model, config, mode)
    if not layers:
        _say(config, [*notes, SCALED if layers is None else NONE_FIT])
        yield source
        return
    refuse_conflicts(source, layers)
    twin, fresh = _twin_of(source, layers, work)
    patcher = twin.patcher(source)
    _say(config, [*notes, describe(twin, mode)], log=fresh)
    try:
        if twin.resident:  # just made, and its weights are on the device: let ComfyUI load the rest and count it all
            twin.resident = False
            patcher.partially_load(device, 1e32)
        yield patcher
    finally:
        if not is_loaded(twin.model):
            patcher.detach()
        let_go(patcher)


def _twin_of(source: ModelPatcher, layers: dict[str, str], work: float) -> tuple[Twin, bool]:
    """The twin with the source's patches in it, and whether any layer was quantized for it."""
    kept = keep(source, TWIN_KEY)
    twin = kept.value
    if twin is not None and list(twin.modes.items()) == list(layers.items()):
        return twin, bool(twin.update(source))
    del twin
    kept.value = None  # before the next one is made: there is no room for two
    twin = kept.value = Twin(source, layers, work)
    return twin, True


def describe(twin: Twin, mode: str) -> str:
    lora = f", LoRA merged into {twin.merged_count}" if twin.merged_count else ""
    return (
        f"FP8: {bytes_text(twin.source_bytes)} -> {bytes_text(twin.bytes)} in {twin.seconds:.1f} s "
        f"({mode.replace('_', ' ')}, {len(twin.modes)} layers{lora})"
    )


def _say(config: FP8Config, notes: list[str], log: bool = True) -> None:
    text = "; ".join(notes)
    if log:
        logger.info("Skein %s", text)
    show(config.node_id, text, "fp8")
