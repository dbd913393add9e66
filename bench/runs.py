"""One run of the 13 B model and its decode, step by step: seconds and peaks, also by a slower link to the host."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

import comfy.model_management as memory
import comfy.sd
import torch
from skein import offloaded
from skein.attributes import changed
from skein.bench import random_model as models
from skein.bench.other_card.sitecustomize import CONTEXT
from skein.bench.scaling import host_gib
from skein.demo.sampling import sample
from skein.estimate import work_bytes
from skein.footprint import coming_bytes, load_of, weight_bytes, with_slices
from skein.models import Network
from skein.patchers import room_of
from skein.plan import AttentionConfig, CompileConfig, DecodeConfig, FP8Config, Plan
from skein.vae.decode import decode

TEXT = 60
COPIED = 1 << 30  # bytes, to measure the link by
FAST = Plan(attention=AttentionConfig(), fp8=FP8Config(), compile=CompileConfig())


def stepped(model, arguments: dict) -> tuple[torch.Tensor, dict]:
    """A run's result, and what it took. The first step counts in `run_s` alone: it compiles."""
    ended: list[float] = []
    pinned: list[int] = []

    def step_ended(*_args) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        ended.append(time.perf_counter())
        pinned.append(memory.TOTAL_PINNED_MEMORY)
        if len(ended) == 1:
            reset_peaks()

    started = time.perf_counter()
    out = sample(model, models.conditioning(TEXT), callback=step_ended, **arguments)
    step_s = (ended[-1] - ended[0]) / (len(ended) - 1)
    return out, {"step_s": step_s, "run_s": time.perf_counter() - started, "pinned_gb": max(pinned) / 1e9}


def decoded(vae: comfy.sd.VAE, latent: torch.Tensor, config: DecodeConfig | None) -> dict:
    """What a decode by Skein took, or by ComfyUI alone: as after a run, the model is where that has left it."""
    reset_peaks()
    room, started = room_of(vae.device), time.perf_counter()
    vae.decode(latent) if config is None else decode(vae, latent, config)
    took = {"s": time.perf_counter() - started, "room_gb": room / 1e9, **peaks(), **host_gib([os.getpid()])}
    return {f"decode_{name}": value for name, value in took.items()}


def reset_peaks() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def peaks() -> dict[str, float]:
    """GB of this process's tensors at most and now (after a run: weights), and of what its allocator kept with a CUDA
    context."""
    if not torch.cuda.is_available():
        return {}
    return {
        "tensors_gb": torch.cuda.max_memory_allocated() / 1e9,
        "weights_on_card_gb": torch.cuda.memory_allocated() / 1e9,
        "peak_gb": (torch.cuda.max_memory_reserved() + CONTEXT) / 1e9,
    }


def estimated_gb(plan: Plan, patcher, latent: torch.Tensor) -> float:
    """GB of tensors that Skein expects a run to have on the GPU at most, beside the weights that are there after it."""
    plan = with_slices(plan, patcher, latent.shape)
    load = load_of(patcher, latent.shape)
    assert load is not None
    work, there = work_bytes(load, plan), torch.cuda.memory_allocated()
    away = weight_bytes(patcher.model, plan) - there > memory.get_free_memory(patcher.load_device) - work
    coming = coming_bytes(patcher.model, Network(patcher.model.diffusion_model), plan) if away else 0
    return (there + work + coming) / 1e9


@contextmanager
def link_of(gb_s: float, there: dict) -> Iterator[None]:
    """Within: blocks' weights come at so many GB a second; 0: as they do. there: the link that there is."""
    if not gb_s:
        yield
        return
    once = offloaded.copy

    def slowly(target: torch.Tensor, source: torch.Tensor) -> None:
        times = there["pinned" if source.is_pinned() else "pageable"] / gb_s
        for _ in range(max(int(times), 1)):
            once(target, source)
        again = int((times % 1) * len(target)) if times > 1 and target.ndim else 0
        if again:
            once(target[:again], source[:again])

    with changed([(offloaded, "copy", slowly)]):
        yield


def link() -> dict:
    """GB a second from the host's memory to the GPU, pinned and not."""
    rates = {}
    for name, pinned in (("pinned", True), ("pageable", False)):
        source, target = (
            torch.empty(COPIED, dtype=torch.uint8, pin_memory=pinned),
            torch.empty(COPIED, dtype=torch.uint8),
        )
        source.random_(0, 255)
        target = target.cuda()
        for _ in range(3):
            torch.cuda.synchronize()
            started = time.perf_counter()
            target.copy_(source, non_blocking=True)
            torch.cuda.synchronize()
            rates[name] = COPIED / (time.perf_counter() - started) / 1e9
    return rates
