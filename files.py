"""The files that a model was loaded from, and whether they are still what they were.

ComfyUI keeps a loaded model however its file changes, and does not note what the file was. So it is noted on the model
when one of Skein's nodes first sees it, which is right after the loader in the same prompt. Whoever would have to read
the file again (a worker, a second model without dynamic VRAM) asks here first.
"""

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

MAPS = Path("/proc/self/maps")
FILES_KEY = "_skein_files"  # on a model: the identities of its files
Identity = dict[str, Any]  # of a file, as plain data; of one that is not there, its path alone
CONTENTS = ("size", "digest")  # of an identity, what is the same on another machine
BLOCKS, BLOCK_BYTES = 64, 4096  # of a file's contents that are read to know it again
HEADER_BYTES = 100 << 20  # the most that safetensors allows
LOAD_AGAIN = 'To load it again, use "Unload Models and Execution Cache" in ComfyUI\'s Edit menu, or restart ComfyUI.'


def files_of(patcher: "ModelPatcher") -> list[Identity]:
    """What the files of a model were when Skein first saw it: now, if it has not yet."""
    if FILES_KEY not in vars(patcher.model):
        recipe = patcher.cached_patcher_init
        note_files(patcher, _named(recipe[1]) if recipe else [])
    return vars(patcher.model)[FILES_KEY]


def note_files(patcher: "ModelPatcher", paths: Iterable[str]) -> None:
    """Note what a model's files are now: by who knows them, in the place of what files_of finds."""
    vars(patcher.model)[FILES_KEY] = [identity(path) for path in paths]


def _named(arguments: Iterable[Any]) -> list[str]:
    """The files that a loader's arguments name: each a path, or several. The first is one, also if it is not there."""
    first, *others = [[each] if isinstance(each, str) else each for each in arguments] or [[]]
    own = [path for path in first if isinstance(path, str)] if isinstance(first, (list, tuple)) else []
    more = [path for each in others if isinstance(each, (list, tuple)) for path in each]
    more = [path for path in more if isinstance(path, str) and os.path.isfile(path)]
    return own + more


def identity(path: str) -> Identity:
    """What a file is now: when it was written, its size, and a hash of its header and of parts of the rest.

    Not its inode and device: some network file systems give a file others when they look at it again.
    """
    try:
        with open(path, "rb") as file:
            stat = os.fstat(file.fileno())
            written = {"path": path, "mtime_ns": stat.st_mtime_ns}
            return {**written, "size": stat.st_size, "digest": _digest(file, stat.st_size)}
    except OSError:
        return {"path": path}


def changes(files: Iterable[Identity], same: tuple[str, ...] = ("mtime_ns", *CONTENTS)) -> str:
    """What has happened to files since their identities were noted, as the beginning of a sentence; empty: nothing.

    same: what must still be equal.
    """
    for known in files:
        now = identity(known["path"])
        if len(now) == 1:
            return f"{known['path']} is no longer there"
        if any(now[name] != known.get(name) for name in same):
            return f"{known['path']} has changed on disk"
    return ""


def require_unchanged(patcher: "ModelPatcher", reader: str) -> None:
    """Raises ValueError if a model's files are not what ComfyUI loaded. reader: who would read them again."""
    what = changes(files_of(patcher))
    if what:
        raise ValueError(f"{what} since ComfyUI loaded it, and {reader} would have to read it. {LOAD_AGAIN}")


class Mapped(NamedTuple):
    """A part of a file in this process's memory. offset: where in the file it begins."""

    addresses: range
    path: str
    offset: int


def memory_of_files() -> list[Mapped]:
    """What this process has of files in its memory; nothing where the system does not tell."""
    found = []
    for line in MAPS.read_text().splitlines() if MAPS.exists() else []:
        addresses, _access, offset, _device, inode, *path = line.split(maxsplit=5)
        if inode != "0":
            bounds = (int(each, 16) for each in addresses.split("-"))
            found.append(Mapped(range(*bounds), "".join(path), int(offset, 16)))
    return found


class Watched:
    """A file that is held open: what is written into it is noticed, also when it has no name any more or another has
    taken its place."""

    def __init__(self, path: str):
        self.path = path
        self._file = open(path, "rb")  # noqa: SIM115 (closed with this object)
        self._noted = self._stat()

    def is_overwritten(self) -> bool:
        return self._stat() != self._noted

    def _stat(self) -> tuple[int, int]:
        stat = os.fstat(self._file.fileno())
        return stat.st_size, stat.st_mtime_ns


def _digest(file: BinaryIO, size: int) -> str:
    """A hash of a safetensors file's header, and of blocks from all over a file of any kind."""
    digest = hashlib.sha256()
    header = 8 + int.from_bytes(file.read(8), "little")
    if header <= min(size, HEADER_BYTES):
        file.seek(0)
        digest.update(file.read(header))
    for i in range(BLOCKS):
        file.seek(i * max(size - BLOCK_BYTES, 0) // (BLOCKS - 1))
        digest.update(file.read(BLOCK_BYTES))
    return digest.hexdigest()
