"""What the workers hold for ComfyUI's process: a model, and a VAE. What is known of it here, and asked about it."""

import weakref
from typing import TYPE_CHECKING, Any

from .. import live
from ..files import LOAD_AGAIN

if TYPE_CHECKING:
    from .group import Group
    from .proxy import Proxy
    from .recipe import Patches


class HeldModel:
    """The model that the workers have.

    recipe: how they have loaded it; None if they have none. proxy: what stands for it in ComfyUI's books. resident:
    whether it is on the devices, as far as this process has asked for it.
    """

    def __init__(self, group: "Group"):
        self.recipe: dict | None = None
        self.proxy: Proxy | None = None
        self.resident = False
        self._group = group
        self._patches: Any = None  # the uuid of those on it; None: not known

    def load(self, recipe: dict | None) -> None:
        """Have the workers load a model, in the place of the one before; None: no other."""
        self.recipe = self._patches = None
        self._group.ask("load", {"recipe": recipe})

    def begin(self, plan: dict, patches: "Patches", patches_uuid: Any, **how: Any) -> dict[int, dict]:
        """Have the workers begin a run (Worker.begin), with these patches on the weights; what each tells.

        Raises ValueError if the model's file has been written to.
        """
        changed = self._patches != patches_uuid
        self._patches = None
        question = {"plan": plan, "patches": patches if changed else None, **how}
        told = self._refuse_overwritten(self._group.ask_all("begin", question))
        self._patches, self.resident = patches_uuid, True
        return told

    def end(self) -> dict[int, dict]:
        """Have the workers end the run; what each tells. Raises ValueError if the model's file has been written to."""
        return self._refuse_overwritten(self._group.ask_all("end", {}))

    def _refuse_overwritten(self, told: dict[int, dict]) -> dict[int, dict]:
        """Raises ValueError if a file that the workers have mapped has been written to: its model goes."""
        paths = sorted({path for each in told.values() for path in each["overwritten"]})
        if not paths:
            return told
        self.load(None)
        live.workers_stand(live.READY)
        raise ValueError(
            f"{', '.join(paths)} was written to while Context Parallel's workers had the model's weights in it, which "
            f"are no longer what ComfyUI loaded. {LOAD_AGAIN}"
        )


class HeldVAE:
    """The VAE that the workers have, if any."""

    def __init__(self, group: "Group"):
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
