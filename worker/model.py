"""A model that a worker has: as loaded, with the patches of its last run, and what techniques keep of it."""

import gc
import uuid
from typing import Any

import comfy.model_management as memory
import torch

from ..files import CONTENTS, Watched, changes
from ..patchers import Kept, keep, unload
from ..workers.recipe import Patches, import_patches, inference_type
from .weights import Held, held_outside_of_files, load_from_file


class Model:
    """One that this rank has loaded. patched: the ModelPatcher of the last run, over the weights as loaded."""

    def __init__(self, recipe: dict):
        """Raises ValueError if its file is another than the one that ComfyUI's process has loaded."""
        _require_contents(recipe)
        self._files = [Watched(file["path"]) for file in recipe["files"]]
        self._base: Any = load_from_file(recipe)
        _require_contents(recipe)  # another may have taken its place meanwhile
        self.patched: Any = self._base
        self._kept: list[Kept] = []

    def prepare(self, patches: Patches | None, dtype: torch.dtype, kept: list[str]) -> None:
        """Put patches on the weights, unless they are the last run's (None), and keep what these keys name."""
        if patches is not None:
            self.patched = self._base.clone()
            self.patched.patches = import_patches(patches)
            self.patched.patches_uuid = uuid.uuid4()
            if dtype != inference_type(self._base):
                self.patched.set_model_compute_dtype(dtype)
        self.patched.attachments = {}
        self._kept = [keep(self.patched, key) for key in kept]  # the same as before, where it was kept then

    def overwritten(self) -> list[str]:
        """Which of the files that its weights lie in have been written to."""
        return [file.path for file in self._files if file.is_overwritten()]

    def outside_of_files(self) -> Held:
        return held_outside_of_files(self._patchers())

    def leave(self) -> None:
        """Take the model off the device, to be dropped."""
        for patcher in self._patchers():
            unload(patcher)
        self._kept, self.patched, self._base = [], None, None
        gc.collect()
        memory.soft_empty_cache()

    def _patchers(self) -> list[Any]:
        """Over the model itself, and over the second ones that techniques keep of it."""
        second = [each.value for each in self._kept if each.value is not None]
        return [self._base, *(getattr(value, "root", value) for value in second)]


def _require_contents(recipe: dict) -> None:
    """Raises ValueError if a model's files are not those of ComfyUI's process, which may be on another machine."""
    what = changes(recipe["files"], CONTENTS)
    if what:
        raise ValueError(f"{what} since ComfyUI loaded it, or is another file on this machine.")
