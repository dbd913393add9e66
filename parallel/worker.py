"""A worker: one rank of the group. Loads the model, applies the plan with the same engine, and runs model calls.

Rank 0 talks to ComfyUI's process and hands each message to the others; all then do the same. Whatever fails on any
rank is told to ComfyUI's process, which ends the group.
"""

import contextlib
import gc
import logging
import os
import sys
import time
import traceback
import uuid
from datetime import timedelta
from multiprocessing.connection import Client
from types import SimpleNamespace
from typing import Any

import comfy.model_management as memory
import torch
import torch.distributed as dist
from comfy.patcher_extension import WrapperExecutor, WrappersMP, get_all_wrappers
from torch import Tensor

from .. import engine, report
from ..plan import AttentionConfig, CacheConfig, CompileConfig, FP8Config, ParallelConfig, Plan
from .mesh import Mesh
from .protocol import OPTIONS, decode, size_of
from .recipe import import_patches, load
from .transport import Channel

logger = logging.getLogger("skein")

PATIENCE = timedelta(hours=1)  # for a collective; ComfyUI's process has deadlines of its own, and ends a stuck group
FOREVER = timedelta(days=3650)  # for the next message
KINDS = ("load", "begin", "call", "end")  # of messages, and methods of Worker
CONFIGS = {
    "cache": CacheConfig, "attention": AttentionConfig, "fp8": FP8Config, "compile": CompileConfig,
    "parallel": ParallelConfig,
}  # fmt: skip


class Worker:
    """The model of this rank, and the run in progress."""

    def __init__(self, mesh: Mesh):
        self.mesh = mesh
        self.base: Any = None  # the ModelPatcher as loaded
        self.patched: Any = None  # with the patches of the run
        self.guider: Any = None
        self.run = contextlib.ExitStack()

    def load(self, recipe: dict) -> dict:
        """Load a model in the place of the one before."""
        self.end()
        self.base = self.patched = self.guider = None
        memory.unload_all_models()
        gc.collect()
        memory.soft_empty_cache()
        started = time.perf_counter()
        self.base = self.patched = load(recipe)
        return {"seconds": time.perf_counter() - started}

    def begin(self, plan: dict, patches: dict | None) -> None:
        """Begin a run. patches: those on the weights; None if they are the last run's."""
        self.end()
        if patches is not None:
            self.patched = self.base.clone()
            self.patched.patches = import_patches(patches)
            self.patched.patches_uuid = uuid.uuid4()
        self.guider = SimpleNamespace(model_patcher=self.patched, model_options=self.patched.model_options)
        with contextlib.ExitStack() as run:
            run.enter_context(engine.applied(plan_from(plan), self.guider, self.mesh))
            patcher = self.guider.model_patcher
            memory.load_models_gpu([patcher])
            patcher.pre_run()
            run.callback(patcher.cleanup)
            self.run = run.pop_all()

    def call(self, args: list, kwargs: dict, options: dict) -> Tensor:
        """One call of the diffusion model. OPTIONS among the arguments stands for the transformer_options."""
        options = {**self.guider.model_options["transformer_options"], **options}
        if "context_window" in options:
            options["context_window"] = SimpleNamespace(index_list=options["context_window"])
        own_args = [options if is_options(value) else value for value in args]
        own_kwargs = {name: options if is_options(value) else value for name, value in kwargs.items()}
        model = self.guider.model_patcher.model
        run = WrapperExecutor.new_class_executor(
            lambda: model.diffusion_model(*own_args, **own_kwargs),
            model,
            get_all_wrappers(WrappersMP.APPLY_MODEL, options),  # compiled blocks
        )
        return run.execute()

    def end(self) -> None:
        """End the run, if there is one."""
        run, self.run = self.run, contextlib.ExitStack()
        run.close()


def is_options(value: Any) -> bool:
    return isinstance(value, str) and value == OPTIONS


def plan_from(data: dict) -> Plan:
    """A plan from its dict of dicts."""
    return Plan(**{name: None if config is None else CONFIGS[name](**config) for name, config in data.items()})


def serve(settings: dict) -> None:
    """Join the group and do what ComfyUI's process asks, until it or the launcher is gone."""
    logging.basicConfig(stream=sys.stdout, level=logging.INFO, format=f"[{os.environ['RANK']}] %(message)s")
    channel = connect(settings)
    with ended_by_failure(channel), torch.inference_mode():
        device = memory.get_torch_device()
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
        mesh = Mesh(device, settings["ulysses"], PATIENCE)
        mail: Any = dist.new_group(backend="gloo", timeout=FOREVER)
        worker = Worker(mesh)
        first = mesh.rank == 0
        report.deliver_to(channel.send if first and channel else lambda kind, data: None)
        tell(channel, "ready", {"pid": os.getpid()})
        while True:
            kind, value = decode(*hand_out(channel, mesh, mail))
            assert kind in KINDS
            answer = getattr(worker, kind)(**value)
            if kind != "call":
                dist.barrier(mail)  # done on every rank
            if first:
                tell(channel, "done", answer)


def connect(settings: dict) -> Channel | None:
    """The channel to ComfyUI's process; None on another machine, where the launcher tells of failures."""
    if not settings["address"] or os.environ["GROUP_RANK"] != "0":
        return None
    connection = Client(tuple(settings["address"]), authkey=bytes.fromhex(settings["key"]))
    channel = Channel(connection)
    channel.send("hello", {"rank": int(os.environ["RANK"])})
    return channel


def hand_out(channel: Channel | None, mesh: Mesh, mail: Any) -> tuple[bytes, Tensor]:
    """The next message on every rank, its tensors' bytes on this rank's device."""
    message, blob = channel.receive_raw() if mesh.rank == 0 and channel else (b"", torch.empty(0, dtype=torch.uint8))
    if mesh.world > 1:
        length = torch.tensor([len(message)])
        dist.broadcast(length, 0, group=mail)
        text = (
            torch.frombuffer(bytearray(message), dtype=torch.uint8)
            if message
            else torch.empty(int(length), dtype=torch.uint8)
        )
        dist.broadcast(text, 0, group=mail)
        message = text.numpy().tobytes()
    size = size_of(message)
    blob = blob.to(mesh.device) if mesh.rank == 0 else torch.empty(size, dtype=torch.uint8, device=mesh.device)
    if mesh.world > 1 and size:
        dist.broadcast(blob, 0)
    return message, blob


@contextlib.contextmanager
def ended_by_failure(channel: Channel | None):
    """Within: an exception is told to ComfyUI's process, which then ends this one. The end of ComfyUI ends it too."""
    try:
        yield
    except EOFError:
        os._exit(0)
    except BaseException as error:
        traceback.print_exc(file=sys.stdout)
        sys.stdout.flush()
        kind = "full" if isinstance(error, memory.OOM_EXCEPTION) else "error"
        told = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        with contextlib.suppress(OSError, EOFError):
            tell(channel, kind, {"text": told})
            time.sleep(
                30
            )  # to be ended: leaving now would let the other ranks fail for lack of this one, and tell of that
        os._exit(1)


def tell(channel: Channel | None, kind: str, value: Any) -> None:
    if channel is not None:
        channel.send(kind, value)
