"""The folders in diffusers' format that ComfyUI's model folders hold, by names relative to these, as in its lists."""

import os
from collections.abc import Iterator
from pathlib import Path

import folder_paths

from .folder import HUB, PART, PIPELINE, is_checkpoint

KINDS = ("diffusers", "diffusion_models")  # of ComfyUI's folders, in which such models are looked for


def names() -> list[str]:
    """What can be loaded."""
    return sorted({os.path.relpath(path, root) for root in _roots() for path in _checkpoints(root)})


def path_of(name: str) -> Path:
    """The folder with a name of the list. Raises ValueError if it is not there any more."""
    for root in _roots():
        path = root / name
        if path in _checkpoints(root):
            return path
    folders = ", ".join(str(root) for root in _roots())
    raise ValueError(f'There is no model "{name}" in diffusers\' format in {folders}; choose another from the list.')


def _roots() -> list[Path]:
    return [Path(folder) for kind in KINDS for folder in folder_paths.get_folder_paths(kind)]


def _checkpoints(root: Path) -> Iterator[Path]:
    for folder, inside, _files in os.walk(root, followlinks=True):
        path = Path(folder)
        inside[:] = sorted(each for each in inside if not each.startswith("."))
        if path == root:
            continue
        if path.name.startswith(HUB) and (path / "snapshots").is_dir():
            inside.clear()
            if any(is_checkpoint(each) for each in (path / "snapshots").iterdir()):
                yield path
        elif is_checkpoint(path):
            # Of a pipeline's parts the first transformer is the pipeline's own; Wan 2.2 has another.
            pipeline = (path / PIPELINE).exists()
            inside[:] = [each for each in inside if pipeline and each.startswith(f"{PART}_")]
            yield path
