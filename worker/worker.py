"""What a worker does when asked: loads the model, applies the plan by the same engine, runs model calls."""

import contextlib
import gc
from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

import comfy.model_management as memory
import torch
from comfy.patcher_extension import WrapperExecutor, WrappersMP, get_all_wrappers
from torch import Tensor

from .. import devices, engine
from ..estimate import Load, room_bytes
from ..models import OPTIONS, Network, entry_of, first_tensor
from ..offloaded import ahead_bytes
from ..parallel.mesh import Mesh
from ..patchers import loaded_entries, room_of, take_off_unless_beside
from ..plan import Plan
from .decoder import Decoder
from .model import Model


class Worker:
    """The models of this rank, and the run in progress. Its methods answer the questions of questions.py."""

    def __init__(self, mesh: Mesh):
        self.mesh = mesh
        self.models: dict[int, Model] = {}  # by the keys that ComfyUI's process has given them
        self.model: Model | None = None  # of the run in progress, or of the last one
        self.guider: Any = None
        self.plan = Plan()
        self.reserved: float | None = None  # bytes left free for calls; None: the model has not been loaded in this run
        self.run = contextlib.ExitStack()
        self.open = False  # whether a run has begun that has not ended
        self.decoder = Decoder(mesh, lambda: self.open and self.end())
        self.take_vae, self.decode_tile = self.decoder.take_vae, self.decoder.decode_tile
        self.decode_strip = self.decoder.decode_strip

    def load(self, model: int, recipe: dict) -> None:
        """Load a model beside those there are. Raises ValueError if its file is another than the one that ComfyUI's
        process has loaded."""
        self.end()
        self.models[model] = Model(recipe)

    def forget(self, model: int) -> None:
        """Drop a model, if it is there; a run of another one goes on."""
        found = self.models.pop(model, None)
        if found is None:
            return
        if found is self.model:
            self.end()
            self.model = self.guider = None
        found.leave()

    def holdings(self) -> dict:
        """What each model takes outside of the files (weights.Held), by key; and bytes free on this rank's device."""
        held = {key: asdict(model.outside_of_files()) for key, model in self.models.items()}
        return {"models": held, "free": memory.get_free_memory(self.mesh.device)}

    def begin(self, model: int, plan: dict, patches: dict | None, dtype: torch.dtype, kept: list[str]) -> dict:
        """Begin a run of a model. patches: those on the weights; None if they are its last run's. dtype: to compute in.
        kept: keys of what techniques have Kept in ComfyUI's process, to be Kept here.

        Tells the bytes of the weights, and those that this rank's device could have free beside them; or, if the
        weights are not what they were, the files that they lie in and that have been written to.
        """
        self.end()
        self.model = self.models[model]
        overwritten = self.model.overwritten()
        if overwritten:
            return {"overwritten": overwritten}
        self.model.prepare(patches, dtype, kept)
        patched = self.model.patched
        self.guider = SimpleNamespace(model_patcher=patched, model_options=patched.model_options)
        self.plan, self.reserved = Plan.of(plan), None
        with contextlib.ExitStack() as run:
            run.enter_context(engine.applied(self.plan, self.guider, self.mesh))
            self.run, self.open = run.pop_all(), True
        weights = self.guider.model_patcher.model_size()
        return {"overwritten": [], "weights": weights, "spare": room_of(self.mesh.device) - weights}

    def bring(self, latent: Tensor) -> None:
        """Have the model on the device, or as much of it as a call with this latent leaves room for."""
        patcher = self.guider.model_patcher
        network = Network(patcher.model.diffusion_model)
        load = Load.of(network, latent.shape, latent.element_size())
        need = room_bytes(load, self.plan, self.mesh.world) + (ahead_bytes(network) if self.plan.loads_plainly else 0)
        if self.reserved is not None and need <= self.reserved:
            return
        take_off_unless_beside(patcher, need)
        memory.load_models_gpu([patcher], memory_required=need)
        if self.reserved is None:
            patcher.pre_run()
            self.run.callback(patcher.cleanup)
        self.reserved = need

    def call(self, arguments: dict, options: dict) -> Tensor:
        """One call of the diffusion model. arguments: by name, without the transformer_options."""
        self.bring(first_tensor(arguments.values()))
        options = {**self.guider.model_options[OPTIONS], **options}
        if "context_window" in options:
            options["context_window"] = SimpleNamespace(index_list=options["context_window"])
        model = self.guider.model_patcher.model
        network = model.diffusion_model
        run = WrapperExecutor.new_class_executor(
            lambda: getattr(network, entry_of(network))(**arguments, **{OPTIONS: options}),
            model,
            get_all_wrappers(WrappersMP.APPLY_MODEL, options),  # the run's techniques
        )
        return run.execute()

    def end(self) -> dict:
        """End the run, if there is one, and give back what only its calls took: ComfyUI's process could not ask for it.

        Tells what exchanges between ranks took, what this rank had of the device's memory since the last end, what its
        models have there now, and which of the files that the weights lie in have been written to.
        """
        run, self.run, self.open = self.run, contextlib.ExitStack(), False
        run.close()
        told = {
            "exchange_s": self.mesh.exchange_seconds(),
            **devices.peaks_of(self.mesh.device),
            "loaded": sum(each.model_loaded_memory() for each in loaded_entries()),
            "overwritten": [] if self.model is None else self.model.overwritten(),
        }
        memory.soft_empty_cache()
        return told

    def room(self) -> dict:
        """Bytes on this rank's device that are free, or could be without the sampling model; and the peak so far."""
        return {"peak_bytes": self.end()["peak_bytes"], "free": room_of(self.mesh.device)}

    def make_room(self) -> dict:
        """Take all models off the device, to have them back when they are needed; bytes that this has freed."""
        self.end()
        before = memory.get_free_memory(self.mesh.device)
        memory.unload_all_models()
        gc.collect()
        memory.soft_empty_cache(force=True)
        return {"freed": max(memory.get_free_memory(self.mesh.device) - before, 0)}
