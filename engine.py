"""Carries a plan out: the only code that touches a ModelPatcher.

Nodes call `edit`, which puts a plan on a clone of the model and one OUTER_SAMPLE wrapper beside it. When
sampling starts, the wrapper adds what the plan asks for to the run's own copy of the model options and
puts the old options back when sampling ends, however it ends. Nothing outlives the run, nothing global changes.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import comfy.model_patcher
from comfy.patcher_extension import WrappersMP, add_wrapper_with_key

from .cache import CacheHook, FirstBlockCache
from .models import find_stack
from .plain import plain_clone
from .plan import PLAN_KEY, CacheConfig, FP8Config, Plan
from .quantization import quantized
from .report import Run, Stopwatch, publish

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

OTHER_CACHES = {"easycache": "EasyCache", "lazycache": "LazyCache"}  # wrapper keys of ComfyUI's own caches


def edit(patcher: "ModelPatcher", *, plain: bool = False, **changes: Any) -> "ModelPatcher":
    """A clone of the model whose plan has the given fields replaced, e.g. `edit(model, cache=CacheConfig())`.

    plain: without ComfyUI's dynamic VRAM, which works on layers of its own only.
    """
    clone = plain_clone(patcher) if plain else patcher.clone()
    clone.set_attachments(PLAN_KEY, replace(plan_of(patcher), **changes))
    if not clone.wrappers.get(WrappersMP.OUTER_SAMPLE, {}).get(PLAN_KEY):
        clone.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, PLAN_KEY, _outer_sample)
    return clone


def plan_of(patcher: "ModelPatcher") -> Plan:
    """The plan on a model; an empty one if no Skein node has touched it."""
    return patcher.get_attachment(PLAN_KEY) or Plan()


def _outer_sample(executor, *args, **kwargs):
    """OUTER_SAMPLE wrapper: the plan holds exactly as long as the sampling inside."""
    guider = executor.class_obj
    with applied(plan_of(guider.model_patcher), guider):
        return executor(*args, **kwargs)


@contextmanager
def applied(plan: Plan, guider) -> Iterator[None]:
    """Apply a plan to a guider's run and take it off at the end, also after an exception or an interrupt."""
    options = guider.model_options
    guider.model_options = comfy.model_patcher.create_model_options_clone(options)
    try:
        with ExitStack() as stack:
            if plan.fp8 is not None:
                stack.enter_context(_quantizing(plan.fp8, guider))
            if plan.cache is not None and plan.cache.threshold > 0:
                stack.enter_context(_caching(plan.cache, guider))
            yield
    finally:
        guider.model_options = options


@contextmanager
def _quantizing(config: FP8Config, guider) -> Iterator[None]:
    source = guider.model_patcher
    try:
        with quantized(source, config) as guider.model_patcher:
            yield
    finally:
        guider.model_patcher = source


@contextmanager
def _caching(config: CacheConfig, guider) -> Iterator[None]:
    model = guider.model_patcher.model
    stack = find_stack(model.diffusion_model)
    transformer_options = guider.model_options["transformer_options"]
    _refuse_other_caches(transformer_options)

    run = Run(node_id=config.node_id)
    percent_to_sigma = model.model_sampling.percent_to_sigma
    cache = FirstBlockCache(
        config, float(percent_to_sigma(config.start_percent)), float(percent_to_sigma(config.end_percent))
    )
    hook = CacheHook(cache, run, Stopwatch(guider.model_patcher.load_device))
    add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, PLAN_KEY, hook.around_model, transformer_options)
    keys = stack.keys
    _wrap_block(transformer_options, keys[0], hook.first_block)
    for key in keys[1:-1]:
        _wrap_block(transformer_options, key, hook.middle_block)
    _wrap_block(transformer_options, keys[-1], hook.last_block)

    started = time.perf_counter()
    try:
        yield
        run.finished = True
    finally:
        cache.reset()
        hook.stopwatch.read()
        run.seconds = time.perf_counter() - started
        publish(run)


def _wrap_block(transformer_options: dict, key: tuple[str, int], wrapper: Callable) -> None:
    """Put `wrapper(args, run_block)` around one block, outside of what another pack has put there."""
    replacements = transformer_options.setdefault("patches_replace", {}).setdefault("dit", {})
    inner = replacements.get(key)

    def replacement(args: dict, extra: dict) -> dict:
        original = extra["original_block"]
        return wrapper(args, original if inner is None else lambda inner_args: inner(inner_args, extra))

    replacements[key] = replacement


def _refuse_other_caches(transformer_options: dict) -> None:
    wrappers = transformer_options.get("wrappers", {})
    for kind in wrappers.values():
        for key, name in OTHER_CACHES.items():
            if kind.get(key):
                raise ValueError(f"{name} and Skein's First-Block Cache cannot work on one model; remove one of them.")
