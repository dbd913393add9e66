"""What the workers hold for ComfyUI's process: models, and a VAE. What is known of it here, and asked about it."""

import itertools
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from .. import processes
from ..files import LOAD_AGAIN
from ..patchers import is_loaded
from .keeping import Need, lacking, takes_memory
from .recipe import Patches


class Asked(Protocol):
    """Whom questions go to: a Group."""

    def ask(self, kind: str, value: dict) -> Any: ...

    def ask_all(self, kind: str, value: dict) -> dict[int, Any]: ...


class Standing(Protocol):
    """What stands for a model in ComfyUI's books: a Proxy, by its model there."""

    model: Any


class HeldModel:
    """A model that the workers have.

    key: its name in questions. recipe: how they have loaded it, all of them if `loaded`. proxies: what stands for it in
    ComfyUI's books: one for each model there that was loaded by this recipe. proxy: that of its last run, which lives
    as long as this. patches: the uuid of those on the weights; None: not known.
    """

    def __init__(self, key: int, recipe: dict):
        self.key, self.recipe, self.loaded = key, recipe, False
        self.proxies: weakref.WeakSet[Standing] = weakref.WeakSet()
        self.proxy: Standing | None = None
        self.patches: Any = None


class HeldModels:
    """All of them. running: the one whose run is in progress. on_devices: bytes that the workers have of models on each
    device, as far as this process has asked for it."""

    def __init__(self, group: Asked):
        self.running: HeldModel | None = None
        self.on_devices = 0.0
        self._group = group
        self._keys = itertools.count()
        self._models: list[HeldModel] = []  # the least recently used one first

    def find(self, recipe: dict) -> HeldModel | None:
        """The one that was loaded by a recipe."""
        return next((each for each in self._models if each.loaded and each.recipe == recipe), None)

    def of(self, proxy: Standing) -> HeldModel | None:
        """The one that a proxy stands for."""
        return next((each for each in self._models if proxy in each.proxies), None)

    @property
    def last(self) -> HeldModel | None:
        """The one that was used last."""
        return self._models[-1] if self._models else None

    def load(self, recipe: dict, need: Need) -> HeldModel:
        """Have the workers load a model beside those that they have, as far as memory allows (keeping.lacking)."""
        for held in [each for each in self._models if not each.loaded or not each.proxies]:
            self.forget(held)  # interrupted while it was loaded, or of no model that ComfyUI still has
        while self._models and lacking(told := self._group.ask_all("holdings", {}), need):
            gains = [each for each in self._models if takes_memory(told, each.key, need)]
            if not gains:
                break
            self.forget(gains[0])
        held = HeldModel(next(self._keys), recipe)
        self._models.append(held)
        self._group.ask("load", {"model": held.key, "recipe": recipe})
        held.loaded = True
        return held

    def forget(self, held: HeldModel) -> None:
        """Have the workers drop a model."""
        self._models.remove(held)
        self._group.ask("forget", {"model": held.key})

    def let_go(self, proxy: Standing) -> bool:
        """ComfyUI has unloaded a proxy: the workers drop its model, if no other stands for it. False: they are to be
        ended, because ComfyUI has none of the others, or they are in a run of it."""
        held = self.of(proxy)
        if held is None:
            return True
        held.proxies.discard(proxy)
        if held.proxy is proxy:
            held.proxy = None
        if held.proxies:
            return True
        others = [proxy for each in self._models if each is not held for proxy in each.proxies]
        if held is self.running or not any(is_loaded(other.model) for other in others):
            return False
        self.forget(held)
        return True

    @contextmanager
    def run(self, held: HeldModel, proxy: Standing) -> Iterator[HeldModel]:
        """Within: a run of a model is in progress, in whose place ComfyUI has this proxy."""
        self._models.remove(held)
        self._models.append(held)
        held.proxies.add(proxy)
        held.proxy, self.running = proxy, held
        try:
            yield held
        finally:
            self.running = None

    def begin(self, held: HeldModel, plan: dict, patches: Patches, uuid: Any, **how: Any) -> dict[int, dict]:
        """Have the workers begin a run (Worker.begin), with these patches on the weights; what each tells.

        Raises ValueError if the model's file has been written to.
        """
        changed = held.patches != uuid
        held.patches = None
        question = {"model": held.key, "plan": plan, "patches": patches if changed else None, **how}
        told = self._refuse_overwritten(held, self._group.ask_all("begin", question))
        held.patches = uuid
        self.on_devices = max(each["weights"] for each in told.values())
        return told

    def end(self, held: HeldModel) -> dict[int, dict]:
        """Have the workers end the run; what each tells. Raises ValueError if the model's file has been written to."""
        told = self._refuse_overwritten(held, self._group.ask_all("end", {}))
        self.on_devices = min(each["loaded"] for each in told.values())
        return told

    def _refuse_overwritten(self, held: HeldModel, told: dict[int, dict]) -> dict[int, dict]:
        """Raises ValueError if a file that the workers have mapped has been written to: its model goes."""
        paths = sorted({path for each in told.values() for path in each["overwritten"]})
        if not paths:
            return told
        self.forget(held)
        processes.stand(processes.READY)
        raise ValueError(
            f"{', '.join(paths)} was written to while Context Parallel's workers had the model's weights in it, which "
            f"are no longer what ComfyUI loaded. {LOAD_AGAIN}"
        )


class HeldVAE:
    """The VAE that the workers have, if any."""

    def __init__(self, group: Asked):
        self._group = group
        self._model: weakref.ref[Any] | None = None  # of ComfyUI's VAE that they have

    def take(self, vae: Any) -> bool:
        """Have the workers take this VAE if they have another; whether they could build it."""
        if self._model is not None and self._model() is vae.first_stage_model:
            return True
        self._model = None
        if not self._group.ask("take_vae", {"state": vae.get_sd(), "dtype": vae.vae_dtype}):
            return False
        self._model = weakref.ref(vae.first_stage_model)
        return True
