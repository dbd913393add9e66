"""What a worker does when asked: loads the model, applies the plan by the same engine, runs model calls."""

import contextlib
import gc
import uuid
from types import SimpleNamespace
from typing import Any

import comfy.model_management as memory
import torch
from comfy.patcher_extension import WrapperExecutor, WrappersMP, get_all_wrappers
from torch import Tensor

from ... import devices, engine
from ...estimate import Load, room_bytes
from ...files import CONTENTS, Watched, changes
from ...models import OPTIONS, Network, entry_of, first_tensor
from ...parallel.mesh import Mesh
from ...patchers import Kept, keep
from ...plan import AttentionConfig, CacheConfig, CompileConfig, FP8Config, ParallelConfig, Plan
from ...vae.memory import room
from ..recipe import import_patches, inference_type
from .decoder import Decoder
from .weights import load_from_file

CONFIGS = {
    "cache": CacheConfig, "attention": AttentionConfig, "fp8": FP8Config, "compile": CompileConfig,
    "parallel": ParallelConfig,
}  # fmt: skip


class Worker:
    """The model of this rank, and the run in progress. Its methods answer the questions of questions.py."""

    def __init__(self, mesh: Mesh):
        self.mesh = mesh
        self.base: Any = None  # the ModelPatcher as loaded
        self.patched: Any = None  # with the patches of the run
        self.files: list[Watched] = []  # that its weights lie in
        self.kept: list[Kept] = []
        self.guider: Any = None
        self.plan = Plan()
        self.reserved: float | None = None  # bytes left free for calls; None: the model has not been loaded in this run
        self.run = contextlib.ExitStack()
        self.open = False  # whether a run has begun that has not ended
        self.decoder = Decoder(mesh, lambda: self.open and self.end())
        self.take_vae, self.decode_tile = self.decoder.take_vae, self.decoder.decode_tile
        self.decode_strip = self.decoder.decode_strip

    def load(self, recipe: dict | None) -> None:
        """Load a model in the place of the one before; None: no other. Raises ValueError if its file is another than
        the one that ComfyUI's process has loaded."""
        self.end()
        self.base = self.patched = self.guider = None
        self.files, self.kept = [], []
        memory.unload_all_models()
        gc.collect()
        memory.soft_empty_cache()
        if recipe is None:
            return
        require_contents(recipe)
        files = [Watched(file["path"]) for file in recipe["files"]]
        base = load_from_file(recipe)
        require_contents(recipe)  # another may have taken its place meanwhile
        self.base = self.patched = base
        self.files = files

    def begin(self, plan: dict, patches: dict | None, dtype: torch.dtype, kept: list[str]) -> dict:
        """Begin a run. patches: those on the weights; None if they are the last run's. dtype: to compute in. kept: keys
        of what techniques have Kept in ComfyUI's process, to be Kept here.

        Tells the bytes of the weights, and those that this rank's device could have free beside them; or, if the
        weights are not what they were, the files that they lie in and that have been written to.
        """
        overwritten = self.end()["overwritten"]
        if overwritten:
            return {"overwritten": overwritten}
        if patches is not None:
            self.patched = self.base.clone()
            self.patched.patches = import_patches(patches)
            self.patched.patches_uuid = uuid.uuid4()
            if dtype != inference_type(self.base):
                self.patched.set_model_compute_dtype(dtype)
        self.patched.attachments = {}
        self.kept = [keep(self.patched, key) for key in kept]  # the same as before, where it was kept then
        self.guider = SimpleNamespace(model_patcher=self.patched, model_options=self.patched.model_options)
        self.plan, self.reserved = plan_from(plan), None
        with contextlib.ExitStack() as run:
            run.enter_context(engine.applied(self.plan, self.guider, self.mesh))
            self.run, self.open = run.pop_all(), True
        weights = self.guider.model_patcher.model_size()
        return {"overwritten": [], "weights": weights, "spare": room(self.mesh.device) - weights}

    def bring(self, latent: Tensor) -> None:
        """Have the model on the device, or as much of it as a call with this latent leaves room for."""
        patcher = self.guider.model_patcher
        load = Load.of(Network(patcher.model.diffusion_model), latent.shape, latent.element_size())
        need = room_bytes(load, self.plan, self.mesh.world)
        if self.reserved is not None and need <= self.reserved:
            return
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

        Tells what exchanges between ranks took, what this rank had of the device's memory since the last end, and which
        of the files that the weights lie in have been written to.
        """
        run, self.run, self.open = self.run, contextlib.ExitStack(), False
        run.close()
        told = {
            "exchange_s": self.mesh.exchange_seconds(),
            **devices.peaks_of(self.mesh.device),
            "overwritten": [file.path for file in self.files if file.is_overwritten()],
        }
        memory.soft_empty_cache()
        return told

    def room(self) -> dict:
        """Bytes on this rank's device that are free, or could be without the sampling model; and the peak so far."""
        return {"peak_bytes": self.end()["peak_bytes"], "free": room(self.mesh.device)}

    def make_room(self) -> dict:
        """Take all models off the device, to have them back when they are needed; bytes that this has freed."""
        self.end()
        before = memory.get_free_memory(self.mesh.device)
        memory.unload_all_models()
        gc.collect()
        memory.soft_empty_cache(force=True)
        return {"freed": max(memory.get_free_memory(self.mesh.device) - before, 0)}


def require_contents(recipe: dict) -> None:
    """Raises ValueError if a model's files are not those of ComfyUI's process, which may be on another machine."""
    what = changes(recipe["files"], CONTENTS)
    if what:
        raise ValueError(f"{what} since ComfyUI loaded it, or is another file on this machine.")


def plan_from(data: dict) -> Plan:
    """A plan from its dict of dicts."""
    return Plan(**{name: None if config is None else CONFIGS[name](**config) for name, config in data.items()})
