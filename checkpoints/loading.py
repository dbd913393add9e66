"""A diffusion transformer in diffusers' format as ComfyUI's ModelPatcher.

Its weights get ComfyUI's keys; then ComfyUI's loader finds out which model they are, and everything after is ComfyUI's.
What is only renamed stays in the file's memory, what is put together is a copy that all processes share (together.py).
"""

import re
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import comfy.sd
import comfy.utils
import torch
from torch import Tensor, nn

from ..files import note_files
from . import together
from .folder import Checkpoint, find
from .headers import keys_of
from .keys import KeyMap, Made, make, plan
from .maps import MAPS, SETTINGS
from .pages import addresses, give_back
from .taking import Taking, owned

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

# As in Load Diffusion Model: the options of comfy.sd.load_diffusion_model for each.
WEIGHT_TYPES: dict[str, dict[str, Any]] = {
    "default": {},
    "fp8_e4m3fn": {"dtype": torch.float8_e4m3fn},
    "fp8_e4m3fn_fast": {"dtype": torch.float8_e4m3fn, "fp8_optimizations": True},
    "fp8_e5m2": {"dtype": torch.float8_e5m2},
}
# What ComfyUI's detection raises about keys that it takes for those of another model.
UNDETECTED = (KeyError, IndexError, AttributeError, TypeError)
MISFIT = "Error(s) in loading state_dict"  # begins what PyTorch raises where shapes are not the model's


def load_diffusers(
    path: str,
    model_options: dict[str, Any] | None = None,
    place: together.Place | None = None,
    disable_dynamic: bool = False,
) -> "ModelPatcher":
    """Load a transformer: as comfy.sd.load_diffusion_model, of a folder, an index or a file in diffusers' format.

    path: see folder.find(). model_options: those of load_diffusion_model. place: where the weights may be that are put
    together, if the model has been loaded before. A class that has no page in checkpoints/maps goes to ComfyUI as it
    is. Raises ValueError with a sentence about the file that is wrong.
    """
    found = find(Path(path))
    keys = _keys(found)
    known = _map_of(found, keys)
    planned = _plan(known, found, keys) if known else {key: Made((key,), None) for key in keys}
    weights, metadata = _read(found)
    own, shared = _made(planned, weights, place)
    with Taking():
        patcher = _load(found, own, metadata, model_options or {}, disable_dynamic)
    if known:
        _require_all(found, patcher, planned)
    _set(found, found.name or (known.classes[0] if known else ""), patcher.model.diffusion_model)
    place = shared.held_by(patcher.model) if shared else None
    patcher.cached_patcher_init = (load_diffusers, (path, model_options or {}, place))
    note_files(patcher, [str(file) for file in found.files])
    return patcher


def _keys(found: Checkpoint) -> list[str]:
    """The keys of all weights, each file's compared with the index."""
    keys: list[str] = []
    for file in found.weights:
        there = keys_of(file)
        absent = {key for key, name in found.index.items() if name == file.name}.difference(there)
        if absent:
            raise ValueError(f"{file} does not have {min(absent)}, which {found.index_file} says; download both again.")
        keys += there
    if not keys:
        raise ValueError(f"{found.weights[0]} has no weights; download it again.")
    return keys


def _map_of(found: Checkpoint, keys: list[str]) -> KeyMap | None:
    """The map of the class that the config names, or that has all the keys; None: ComfyUI may know the model itself."""
    if found.name:
        return next((each for each in MAPS if found.name in each.classes), None)
    for each in MAPS:
        try:
            _own, strange = plan(each, keys)
        except ValueError:
            continue
        if not strange:
            return each
    return None


def _plan(known: KeyMap, found: Checkpoint, keys: list[str]) -> dict[str, Made]:
    """What is made of the weights; checked against the config."""
    where = found.config_file or found.weights[0]
    try:
        planned, strange = plan(known, keys)
    except ValueError as error:
        raise ValueError(
            f"{found.index_file or where}: {error}; weights are missing, download the model again."
        ) from error
    if strange:
        raise ValueError(
            f"{where} says {known.classes[0]}, which has no {strange[0]} as {found.weights[0].name} does: "
            "the weights are another model's, or not in diffusers' format."
        )
    for entry, blocks in known.blocks.items():
        pattern = re.compile(re.escape(blocks).replace(r"\*", r"(\d+)") + r"\..*")
        count = len({match[1] for key in keys if (match := pattern.fullmatch(key))})
        if found.config.get(entry, count) != count:
            raise ValueError(
                f"{where} says {found.config[entry]} {entry}, and the weights beside it have {count}: "
                "download the model again."
            )
    return planned


def _read(found: Checkpoint) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All weights, by ComfyUI's reader: in the files' memory, unless ComfyUI was told otherwise."""
    weights: dict[str, Tensor] = {}
    metadata: dict[str, str] = {}
    for file in found.weights:
        loaded, said = comfy.utils.load_torch_file(str(file), return_metadata=True)
        weights |= loaded
        metadata |= said or {}
    return weights, metadata


def _made(
    planned: dict[str, Made], weights: dict[str, Tensor], place: together.Place | None
) -> tuple[dict[str, Tensor], together.Shared | None]:
    """ComfyUI's weights, and those of them that all processes share. What is put together is in the files' memory no
    more."""
    own = {name: weights[made.of[0]] for name, made in planned.items() if made.is_renamed}
    others = {name: made for name, made in planned.items() if not made.is_renamed}
    read = {key for made in others.values() for key in made.of} - {planned[name].of[0] for name in own}
    parts = [addresses(weights[key]) for key in read]
    shared = together.shared(others, weights, place)
    own |= shared.weights if shared else _made_here(others, weights)
    give_back(parts)
    return own, shared


def _made_here(planned: dict[str, Made], weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights that are put together, in this process's memory. Those that they are made of leave `weights` when the
    last one has been made of them: ComfyUI may have read them into memory (--disable-mmap)."""
    waiting = Counter(key for made in planned.values() for key in made.of)
    own = {}
    for name, made in planned.items():
        own[name] = owned(make(made, weights))
        waiting.subtract(made.of)
        for key in made.of:
            if not waiting[key]:
                del weights[key]
    return own


def _load(
    found: Checkpoint, weights: dict[str, Tensor], metadata: dict[str, str], options: dict[str, Any], disable: bool
) -> "ModelPatcher":
    what = f"{found.weights[0].parent} ({found.name or 'no config.json that names a class'})"
    patcher = None
    try:
        patcher = comfy.sd.load_diffusion_model_state_dict(
            weights, model_options=options, metadata=metadata, disable_dynamic=disable
        )
    except UNDETECTED as error:
        raise ValueError(f"ComfyUI does not know the model in {what}: {type(error).__name__}: {error}.") from error
    except RuntimeError as error:
        if not str(error).startswith(MISFIT):
            raise
        raise ValueError(f"ComfyUI takes {what} for another model: {' '.join(str(error).split())[:300]}") from error
    if patcher is None:
        names = ", ".join(known.classes[0] for known in MAPS)
        raise ValueError(
            f"ComfyUI does not know the model in {what}, and Skein has no map of its keys; it has those of {names}."
        )
    return patcher


def _require_all(found: Checkpoint, patcher: "ModelPatcher", planned: dict[str, Made]) -> None:
    """Raises ValueError if the model has weights that the files do not have: they would be random."""
    network = patcher.model.diffusion_model
    missing = [name for name, _parameter in network.named_parameters() if name not in planned]
    if missing:
        raise ValueError(
            f"{found.weights[0].parent} lacks {len(missing)} of {type(network).__name__}'s weights, {missing[0]} for "
            "one; it is incomplete or of another model: download it again."
        )


def _set(found: Checkpoint, name: str, network: nn.Module) -> None:
    """What the configs say and ComfyUI does not find out from the weights."""
    settings = SETTINGS[name](found.config, found.pipeline) if name in SETTINGS else {}
    for path, value in settings.items():
        owner, _, attribute = path.rpartition(".")
        setattr(network.get_submodule(owner), attribute, value)
