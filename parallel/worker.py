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
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial
from multiprocessing.connection import Client
from types import SimpleNamespace
from typing import Any

import comfy.model_management as memory
import torch
import torch.distributed as dist
from comfy.patcher_extension import WrapperExecutor, WrappersMP, get_all_wrappers
from torch import Tensor

from .. import devices, engine, report
from ..estimate import Load, work_bytes
from ..models import find_stack
from ..plan import AttentionConfig, CacheConfig, CompileConfig, FP8Config, ParallelConfig, Plan
from ..vae.estimate import room
from . import machines
from .decoder import Decoder
from .mesh import Mesh
from .protocol import EVERYBODY, OPTIONS, decode, size_of
from .recipe import import_patches, load
from .transport import Channel

logger = logging.getLogger("skein")

PATIENCE = timedelta(hours=1)  # for a collective; ComfyUI's process has deadlines of its own, and ends a stuck group
FOREVER = timedelta(days=3650)  # for the next message
LAST_SECONDS = 30  # what a worker that has failed waits for its end
# Kinds of messages, and methods of Worker.
KINDS = ("load", "begin", "call", "end", "take_vae", "decode_strip", "decode_tile", "room", "make_room")
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
        self.plan = Plan()
        self.reserved: float | None = None  # bytes left free for calls; None: the model has not been loaded in this run
        self.run = contextlib.ExitStack()
        self.decoder = Decoder(mesh)
        self.take_vae, self.decode_tile = self.decoder.take_vae, self.decoder.decode_tile
        self.decode_strip = self.decoder.decode_strip

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
        self.plan, self.reserved = plan_from(plan), None
        with contextlib.ExitStack() as run:
            run.enter_context(engine.applied(self.plan, self.guider, self.mesh))
            self.run = run.pop_all()

    def bring(self, latent: Tensor) -> None:
        """Have the model on the device, or as much of it as a call with this latent leaves room for."""
        patcher = self.guider.model_patcher
        stack = find_stack(patcher.model.diffusion_model)
        size = Load(stack.tokens(latent.shape), engine.TEXT_TOKENS, stack.width, latent.shape[0], latent.element_size())
        need = work_bytes(size, self.plan, self.mesh.world)
        if self.reserved is not None and need <= self.reserved:
            return
        memory.load_models_gpu([patcher], memory_required=need)
        if self.reserved is None:
            patcher.pre_run()
            self.run.callback(patcher.cleanup)
        self.reserved = need

    def call(self, args: list, kwargs: dict, options: dict) -> Tensor:
        """One call of the diffusion model. OPTIONS among the arguments stands for the transformer_options."""
        self.bring(next(value for value in args if isinstance(value, Tensor)))
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

    def end(self) -> dict:
        """End the run, if there is one. Tells what it spent on exchanges between ranks."""
        run, self.run = self.run, contextlib.ExitStack()
        run.close()
        return {"exchange_s": self.mesh.exchange_seconds()}

    def room(self) -> dict:
        """Bytes on this rank's device that are free, or could be without the sampling model."""
        self.end()
        return {"free": room(self.mesh.device)}

    def make_room(self) -> dict:
        """Take all models off the device, to have them back when they are needed; bytes that this has freed."""
        self.end()
        before = memory.get_free_memory(self.mesh.device)
        memory.unload_all_models()
        gc.collect()
        memory.soft_empty_cache(force=True)
        return {"freed": max(memory.get_free_memory(self.mesh.device) - before, 0)}


def is_options(value: Any) -> bool:
    return isinstance(value, str) and value == OPTIONS


def plan_from(data: dict) -> Plan:
    """A plan from its dict of dicts."""
    return Plan(**{name: None if config is None else CONFIGS[name](**config) for name, config in data.items()})


def serve(settings: dict) -> None:
    """Join the group and do what ComfyUI's process asks, until it or the launcher is gone."""
    rank, here = int(os.environ["RANK"]), not machines.is_away()
    logging.basicConfig(stream=sys.stdout, level=logging.INFO, format=f"[{rank}] %(message)s", force=True)
    channel = connect(settings, rank) if here else None
    with ended_by_failure(channel.send if channel else partial(machines.last_words, rank)), torch.inference_mode():
        if machines.across() and channel is None:
            machines.keep_saying_alive(rank)
        elif machines.across() and rank == 0 and channel:
            machines.watch(range(int(os.environ["LOCAL_WORLD_SIZE"]), int(os.environ["WORLD_SIZE"])), channel.send)
        device = memory.get_torch_device()
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
        mesh = Mesh(device, tuple(settings["degrees"]), PATIENCE)
        mail: Any = dist.new_group(backend="gloo", timeout=FOREVER)
        if channel:
            channel.send("ready", {"pid": os.getpid()})
        answer_questions(Worker(mesh), channel, mail)


def answer_questions(worker: Worker, channel: Channel | None, mail: Any) -> None:
    """Do what the messages say, on every rank alike. mail: a group for what is not on the device."""
    first = channel if worker.mesh.rank == 0 else None
    report.deliver_to(first.send if first else lambda kind, data: None)
    while True:
        kind, value = decode(*hand_out(first, worker.mesh, mail))
        assert kind in KINDS
        answer = getattr(worker, kind)(**value)
        if kind != "call":
            tell_memory(worker.mesh, mail)  # and so done on every rank
        if channel and (first or kind in EVERYBODY):
            channel.send("done", answer)


def connect(settings: dict, rank: int) -> Channel:
    """The channel to ComfyUI's process."""
    connection = Client(tuple(settings["address"]), authkey=bytes.fromhex(settings["key"]))
    channel = Channel(connection)
    channel.send("hello", {"rank": rank})
    return channel


def hand_out(channel: Channel | None, mesh: Mesh, mail: Any) -> tuple[bytes, Tensor]:
    """The next message on every rank, its tensors' bytes on this rank's device. channel: on the first rank."""
    message, blob = channel.receive_raw() if channel else (b"", torch.empty(0, dtype=torch.uint8))
    if mesh.world > 1:
        length = torch.tensor([len(message)])
        dist.broadcast(length, 0, group=mail)
        text = torch.frombuffer(bytearray(message or bytes(int(length))), dtype=torch.uint8)
        dist.broadcast(text, 0, group=mail)
        message = text.numpy().tobytes()
    size = size_of(message)
    blob = blob.to(mesh.device) if channel else torch.empty(size, dtype=torch.uint8, device=mesh.device)
    if mesh.world > 1 and size:
        dist.broadcast(blob, 0)
    return message, blob


@contextlib.contextmanager
def ended_by_failure(tell: Callable[[str, Any], None]) -> Iterator[None]:
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
        with contextlib.suppress(OSError, EOFError, RuntimeError):
            tell(kind, {"text": told})
            # To be ended: leaving now would let the other ranks fail for lack of this one, and tell of that.
            time.sleep(LAST_SECONDS)
        os._exit(1)


def tell_memory(mesh: Mesh, mail: Any) -> None:
    """Report how full the devices of all ranks are. Waits for all of them."""
    own = torch.tensor(devices.memory_of(mesh.device) or (-1, -1))
    readings = [torch.empty_like(own) for _ in range(mesh.world)]
    dist.all_gather(readings, own, group=mail)
    known = [(rank, *(None if value < 0 else value for value in each.tolist())) for rank, each in enumerate(readings)]
    report.memory([{"rank": rank, "used": used, "total": total} for rank, used, total in known])
