"""The files of a diffusion transformer in diffusers' format, wherever people have it: in a pipeline's folder, in its
own, in the Hub's cache; whole or in shards with an index.

Paths are never resolved: in the Hub's cache the files are links to others that have no proper names.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SUFFIX = ".safetensors"
INDEX = re.compile(r".*\.safetensors(\..+)?\.index(\..+)?\.json")  # the second and third: a variant, as "fp16"
SHARD = re.compile(r".*-\d{5}-of-\d{5}(\..+)?\.safetensors")
PICKLED = (".bin", ".pt", ".pth", ".ckpt")
CONFIG, PIPELINE, PART = "config.json", "model_index.json", "transformer"
HUB = "models--"  # begins a repository's folder in the Hub's cache


@dataclass(frozen=True)
class Checkpoint:
    """One transformer's files.

    weights: safetensors files. index: which of these has which key, by the index file `index_file`; empty without one.
    config: what config.json says; empty without one. pipeline: the class of the pipeline that the folder is a part of.
    """

    weights: tuple[Path, ...]
    index: Mapping[str, str] = field(default_factory=dict)
    index_file: Path | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    config_file: Path | None = None
    pipeline: str = ""

    @property
    def name(self) -> str:
        """The class that the config names."""
        return str(self.config.get("_class_name", ""))

    @property
    def files(self) -> list[Path]:
        """All of them."""
        return [*self.weights, *(file for file in (self.index_file, self.config_file) if file)]


def find(path: Path) -> Checkpoint:
    """A transformer's files. path: a folder, an index, one file or one shard. Raises ValueError with what is wrong."""
    if not path.exists():
        raise ValueError(f"{path} is not there.")
    weights = _weights_in(_folder_of_weights(path)) if path.is_dir() else path
    folder = weights.parent
    if SHARD.fullmatch(weights.name):
        weights = _index_of(weights)
    index = _read_index(weights) if INDEX.fullmatch(weights.name) else {}
    if not index and weights.suffix != SUFFIX:
        raise ValueError(f"{weights} is not a {SUFFIX} file, an index of such or a folder with one.")
    config = folder / CONFIG if (folder / CONFIG).exists() else None
    pipeline = folder.parent / PIPELINE
    return Checkpoint(
        tuple(folder / name for name in sorted(set(index.values()))) if index else (weights,),
        index,
        weights if index else None,
        _read(config) if config else {},
        config,
        str(_read(pipeline).get("_class_name", "")) if folder.name == PART and pipeline.exists() else "",
    )


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder looks like a transformer's or a pipeline's with one, at a glance and without reading files."""
    if (folder / PIPELINE).exists():
        return (folder / PART).is_dir()
    return (folder / CONFIG).exists() and any(INDEX.fullmatch(each.name) or _is_whole(each) for each in _list(folder))


def _folder_of_weights(folder: Path) -> Path:
    """The folder with the weights: of a repository in the Hub's cache, of a pipeline, or the folder itself."""
    if folder.name.startswith(HUB) and (folder / "snapshots").is_dir():
        main = folder / "refs" / "main"
        snapshots = sorted((folder / "snapshots").iterdir(), key=lambda each: each.stat().st_mtime)
        known = [each for each in snapshots if main.exists() and each.name == main.read_text().strip()]
        if not snapshots:
            raise ValueError(f"{folder / 'snapshots'} is empty; download the model again.")
        folder = (known or snapshots)[-1]
    if (folder / PART).is_dir():
        return folder / PART
    if (folder / PIPELINE).exists():
        raise ValueError(f"{folder} is a pipeline without a folder named {PART}: it has no diffusion transformer.")
    return folder


def _weights_in(folder: Path) -> Path:
    """A folder's index or its one file; without a variant where there is the choice."""
    files = _list(folder)
    for found in (
        [each for each in files if INDEX.fullmatch(each.name)],
        [each for each in files if _is_whole(each) and each.name.startswith("diffusion_pytorch_model")],
    ):
        if found:
            return min(found, key=lambda each: (len(each.name), each.name))
    whole = [each for each in files if _is_whole(each)]
    if len(whole) == 1:
        return whole[0]
    if whole:
        raise ValueError(f"{folder} has several models: {_names(whole)}; choose one of the files.")
    shards = [each for each in files if SHARD.fullmatch(each.name)]
    if shards:
        return _index_of(shards[0])
    pickled = [each for each in files if each.suffix in PICKLED]
    if pickled:
        raise ValueError(
            f"{folder} has its weights as {pickled[0].name}, which can hold code and is not read; download the model's "
            f"{SUFFIX} files instead."
        )
    raise ValueError(f"{folder} has no {SUFFIX} files; choose a folder that has them, or one with a folder {PART}.")


def _index_of(shard: Path) -> Path:
    """The index beside a shard, that names it."""
    for each in _list(shard.parent):
        if INDEX.fullmatch(each.name) and shard.name in _read_index(each, check=False).values():
            return each
    raise ValueError(f"{shard} is one of several parts of a model, and their index (*{SUFFIX}.index.json) is missing.")


def _read_index(file: Path, check: bool = True) -> dict[str, str]:
    """Which file has which key. check: whether the files have to be there."""
    index = _read(file).get("weight_map")
    if not isinstance(index, dict) or not index or not all(isinstance(each, str) for each in index.values()):
        raise ValueError(f"{file} is not an index of {SUFFIX} files: it has no weight_map; download it again.")
    for name in sorted(set(index.values())) if check else []:
        if Path(name).name != name or Path(name).suffix != SUFFIX:
            raise ValueError(f"{file} names {name}, which is not a {SUFFIX} file in its folder; download it again.")
        if not (file.parent / name).exists():
            raise ValueError(f"{file.parent / name} is missing, which {file.name} names; download it.")
    return index


def _read(file: Path) -> dict[str, Any]:
    """A JSON file with an object in it."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise ValueError(f"{file} is not JSON ({error}); download it again.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} is not a JSON object; download it again.")
    return content


def _is_whole(file: Path) -> bool:
    return file.suffix == SUFFIX and not SHARD.fullmatch(file.name)


def _list(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError as error:
        raise ValueError(f"{folder} cannot be read: {error.strerror}.") from error


def _names(files: list[Path]) -> str:
    return ", ".join(each.name for each in files[:4]) + (", ..." if len(files) > 4 else "")
