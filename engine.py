"""Carries a plan out: puts its techniques on a sampling run, and takes them off again.

Nodes call `edit`, which puts a plan on a clone of the model and one OUTER_SAMPLE wrapper beside it. When
sampling starts, the wrapper adds what the plan asks for to the run's own copy of the model options and
puts the old options back when sampling ends, however it ends. Nothing outlives the run, nothing global changes.
"""

import logging
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import comfy.model_management as memory
import comfy.model_patcher
from comfy.ldm.modules.attention import optimized_attention
from comfy.patcher_extension import WrappersMP, add_wrapper_with_key
from comfy_api.torch_helpers import set_torch_compile_wrapper
from torch import nn

from . import conflicts, live
from .attention import AttentionHook, Selection, stock
from .cache import CacheHook, Evaluations, FirstBlockCache
from .compilation import CompiledBlocks, compile_settings, require_own_folder
from .estimate import Load, advice
from .files import files_of
from .latents import some_values
from .models import BlockKey, BlockStack, find_stack
from .parallel import Mesh, Sharding, delegated, setting_of, visible_devices
from .parallel.machines import machines
from .patchers import PLAIN_KEY, TWIN_KEY, keep, only_for, own_network, plain, unload
from .plan import PLAN_KEY, AttentionConfig, CacheConfig, CompileConfig, FP8Config, Plan
from .quantization import is_quantized, quantized, require_float8, require_torchao
from .report import begin, note, publish, show
from .runs import Run
from .stopwatch import Stopwatch

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

logger = logging.getLogger("skein")

ATTENTION_PATCHES = ("attn1_patch", "attn1_output_patch")  # told the index of their block: a graph for each block


def edit(patcher: "ModelPatcher", **changes: Any) -> "ModelPatcher":
    """A clone of the model whose plan has the given fields replaced, e.g. `edit(model, cache=CacheConfig())`.

    Raises ValueError where it is already known that sampling under these fields would be refused.
    """
    plan = replace(plan_of(patcher), **changes)
    _require(plan, changes.keys() & set(plan.techniques), patcher)
    files_of(patcher)  # noted while they are what ComfyUI has just loaded
    clone = patcher.clone()
    clone.set_attachments(PLAN_KEY, plan)
    for key, wanted in ((TWIN_KEY, plan.fp8), (PLAIN_KEY, plan.fp8 or plan.compile)):
        if wanted is not None:
            keep(clone, key)
    if not clone.wrappers.get(WrappersMP.OUTER_SAMPLE, {}).get(PLAN_KEY):
        clone.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, PLAN_KEY, _outer_sample)
    return clone


def _require(plan: Plan, techniques: Collection[str], patcher: "ModelPatcher") -> None:
    """Raises ValueError if these techniques lack something here: blocks that are known, a device, a package."""
    if techniques:
        find_stack(own_network(patcher))
    if plan.fp8 is not None and "fp8" in techniques:
        require_torchao()
        require_float8(patcher.load_device)
    if plan.compile is not None and "compile" in techniques:
        compile_settings(plan.compile)
    if "cache" in techniques:
        _several_blocks(patcher, "the first-block cache")
    if "parallel" in techniques:
        _several_blocks(patcher, "context parallelism")
        setting_of(plan, patcher)


def _several_blocks(patcher: "ModelPatcher", technique: str) -> BlockStack:
    """The model's blocks. Raises ValueError if there is only one."""
    stack = find_stack(own_network(patcher))
    if len(stack.keys) < 2:
        raise ValueError(f"This model has {len(stack.keys)} block(s); {technique} needs at least two.")
    return stack


def plan_of(patcher: "ModelPatcher") -> Plan:
    """The plan on a model; an empty one if no Skein node has touched it."""
    return patcher.get_attachment(PLAN_KEY) or Plan()


def _outer_sample(executor, *args, **kwargs):
    """OUTER_SAMPLE wrapper: the plan holds exactly as long as the sampling inside."""
    guider = executor.class_obj
    plan = plan_of(guider.model_patcher)
    noise = args[0] if args else kwargs["noise"]
    with live.sampling(plan.techniques, guider.model_patcher.load_device), applied(plan, guider):
        _warn_of_memory(plan, guider.model_patcher, noise.shape)
        latent = executor(*args, **kwargs)
        live.sampled(some_values(latent))
        return latent


def _warn_of_memory(plan: Plan, patcher: "ModelPatcher", latent: tuple[int, ...]) -> None:
    """Say beforehand that a size is too large for a GPU. ComfyUI may still find a way, so nothing is refused."""
    device, dtype = patcher.load_device, patcher.model.get_dtype_inference()
    if device.type != "cuda" or plan == Plan():
        return
    load = Load.of(find_stack(patcher.model.diffusion_model), latent, dtype.itemsize)
    world = 1 if plan.parallel is None else len(visible_devices(plan.parallel.device_names)) * machines()[0]
    text = advice(load, plan, memory.get_total_memory(device), world)
    if text:
        logger.warning("Skein: %s", text)
        note("memory", text)


@contextmanager
def applied(plan: Plan, guider, mesh: Mesh | None = None) -> Iterator[None]:
    """Apply a plan to a guider's run and take it off at the end, also after an exception or an interrupt.

    mesh: the processes that share the run, in a worker; None in ComfyUI's own process.
    """
    options = guider.model_options
    guider.model_options = comfy.model_patcher.create_model_options_clone(options)
    try:
        # Wrappers run in this order, blocks the other way round: the cache decides before a compiled block is entered.
        with ExitStack() as techniques:
            if mesh is None:
                _refuse_conflicts(plan, guider)
                transformer_options = guider.model_options["transformer_options"]
                add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, PLAN_KEY, live.step, transformer_options)
                if "cache" in plan.techniques:
                    _count_evaluations(transformer_options)
            if plan.parallel is not None and mesh is None:
                if plan.cache is not None and "cache" in plan.techniques:
                    plan = replace(
                        plan, cache=replace(plan.cache, sigmas=cache_sigmas(plan.cache, guider.model_patcher))
                    )
                techniques.enter_context(delegated(plan, guider))
                plan = Plan()
            if plan.fp8 is not None or plan.compile is not None:
                techniques.enter_context(plain(guider))
            sharding = None if mesh is None or mesh.world == 1 else _sharding(mesh, guider)
            if plan.fp8 is not None:
                techniques.enter_context(_quantizing(plan.fp8, guider))
            if plan.attention is not None or plan.compile is not None or sharding is not None:
                techniques.enter_context(_attending(plan.attention, guider, sharding))
            if plan.compile is not None:
                techniques.enter_context(_compiling(plan.compile, guider))
            if plan.cache is not None and "cache" in plan.techniques:
                techniques.enter_context(_caching(plan.cache, guider, mesh))
            if sharding is not None:
                _share_blocks(sharding, guider)
            yield
    finally:
        guider.model_options = options


def _refuse_conflicts(plan: Plan, guider) -> None:
    """Raises ValueError for what other nodes have put on the model, or has the run do so for what they put on later."""
    patcher = guider.model_patcher
    left_alone = ("fp8",) if plan.fp8 is not None and is_quantized(patcher.model) else ()
    conflicts.refuse(plan, guider, left_alone)
    for technique in plan.techniques[:1]:
        conflicts.watch(guider.model_options["transformer_options"], technique, patcher)
        if patcher.model.diffusion_model is not patcher.get_model_object("diffusion_model"):
            unload(patcher)  # another workflow's object patch is on it still


@contextmanager
def _quantizing(config: FP8Config, guider) -> Iterator[None]:
    """The model's FP8 twin in the model's place, before ComfyUI loads it."""
    source = guider.model_patcher
    conflicts.watch(guider.model_options["transformer_options"], "fp8", source)
    try:
        with quantized(source, config) as guider.model_patcher:
            yield
    finally:
        guider.model_patcher = source


@contextmanager
def _attending(config: AttentionConfig | None, guider, sharding: Sharding | None) -> Iterator[None]:
    """Attention by the plan. Without one, ComfyUI's own as one operator, which compiled and shared blocks need."""
    config = config or AttentionConfig(kernel="stock", trim_text=False)
    find_stack(guider.model_patcher.model.diffusion_model)  # refuses models that it does not know
    transformer_options = guider.model_options["transformer_options"]
    selection = Selection(config, partial(stock, optimized_attention), say=partial(note, "attention"))
    hook = AttentionHook(selection, config.trim_text, sharding.around if sharding else lambda attend, exact: attend)
    add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, PLAN_KEY, hook.around_model, transformer_options)
    hook.put_on(transformer_options)
    yield
    show(config.node_id, "; ".join(selection.reasons), "attention" if selection.reasons else "")


@contextmanager
def _compiling(config: CompileConfig, guider) -> Iterator[None]:
    patcher = guider.model_patcher
    stack = find_stack(patcher.model.diffusion_model)
    transformer_options = guider.model_options["transformer_options"]
    obstacle = _compile_obstacle(transformer_options)
    if obstacle:
        logger.warning("Skein compile: the blocks run uncompiled, because %s.", obstacle)
        show(config.node_id, f"uncompiled: {obstacle}", "compile")
        yield
        return
    if transformer_options.get("patches") or transformer_options.get("patches_replace"):
        config = replace(config, warm_up=False)  # other packs' code in the blocks may keep count of its calls
    blocks = CompiledBlocks(config, partial(show, config.node_id, about="compile"))
    keys = [f"diffusion_model.{name}" for name in stack.modules]
    modules = [patcher.model.get_submodule(key) for key in keys]
    settings = compile_settings(config)
    try:
        set_torch_compile_wrapper(_RunView(patcher, transformer_options), keys=keys, **settings)
    except Exception as error:  # of the compiler's own: nothing of the model runs here
        blocks.give_up("a block", error, patcher.model.diffusion_model)
        yield
        return
    around_model = only_for(patcher.model.diffusion_model, blocks.around_model, "Compile Blocks")
    add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, PLAN_KEY, around_model, transformer_options)
    for key, module in zip(stack.keys, modules):
        _wrap_block(transformer_options, key, blocks.around_block(key, module), innermost=True)
    with blocks.settings(), _frozen(patcher.model.diffusion_model):
        yield


def _compile_obstacle(transformer_options: dict) -> str:
    """Why blocks are not compiled, in words; empty if nothing stands in the way."""
    if any(transformer_options.get("patches", {}).get(name) for name in ATTENTION_PATCHES):
        return "another node's attention patch runs inside of the blocks"
    try:
        require_own_folder()
    except (ValueError, OSError) as error:
        return str(error)
    return ""


@contextmanager
def _frozen(network: nn.Module) -> Iterator[None]:
    """Within: no parameter requires gradients. Older ComfyUIs load them so and patch them otherwise, and compiled
    blocks would be compiled again for a LoRA."""
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


class _RunView:
    """A ModelPatcher as set_torch_compile_wrapper sees it; what it adds goes to one run's options, not to the model."""

    def __init__(self, patcher: "ModelPatcher", transformer_options: dict):
        self.get_model_object = patcher.get_model_object
        self.model_options: dict = {}
        self._transformer_options = transformer_options

    def add_wrapper_with_key(self, kind: str, key: str, wrapper: Callable) -> None:
        add_wrapper_with_key(kind, key, wrapper, self._transformer_options)

    def remove_wrappers_with_key(self, kind: str, key: str) -> None:
        assert not self._transformer_options.get("wrappers", {}).get(kind, {}).get(key)


def _count_evaluations(transformer_options: dict) -> None:
    """Let each model call know the sampler's evaluation that it belongs to, in the workers too."""
    evaluations = Evaluations()
    wrappers = transformer_options.setdefault("wrappers", {})
    others = wrappers.get(WrappersMP.PREDICT_NOISE, {})
    # Outside of other packs' wrappers: one that evaluates several times (tiles, guidance) is one evaluation.
    wrappers[WrappersMP.PREDICT_NOISE] = {PLAN_KEY: [evaluations.around_evaluation], **others}
    add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, PLAN_KEY, evaluations.around_model, transformer_options)


@contextmanager
def _caching(config: CacheConfig, guider, mesh: Mesh | None) -> Iterator[None]:
    patcher = guider.model_patcher
    stack = _several_blocks(patcher, "the first-block cache")
    transformer_options = guider.model_options["transformer_options"]

    run = Run(node_id=config.node_id, limit=config.max_consecutive_hits, accumulate=config.accumulate)
    sigmas = cache_sigmas(config, patcher)
    cache = FirstBlockCache(config, *sigmas, *(() if mesh is None or mesh.world == 1 else (mesh.total,)))
    hook = CacheHook(cache, run, Stopwatch(patcher.load_device))
    add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, PLAN_KEY, hook.around_model, transformer_options)
    keys = stack.keys
    _wrap_block(transformer_options, keys[0], hook.first_block)
    for key in keys[1:-1]:
        _wrap_block(transformer_options, key, hook.middle_block)
    _wrap_block(transformer_options, keys[-1], hook.last_block)

    started = time.perf_counter()
    begin(run)
    try:
        yield
        run.finished = True
    except BaseException as error:
        run.error = live.sentence(error)
        raise
    finally:
        cache.reset()
        hook.stopwatch.read()
        run.seconds = time.perf_counter() - started
        publish(run)


def cache_sigmas(config: CacheConfig, patcher: "ModelPatcher") -> tuple[float, float]:
    """The sigmas between which calls may be reused, under the sampling that other nodes have given the model."""
    if config.sigmas is not None:
        return config.sigmas
    percent_to_sigma = patcher.get_model_object("model_sampling").percent_to_sigma
    return float(percent_to_sigma(config.start_percent)), float(percent_to_sigma(config.end_percent))


def _sharding(mesh: Mesh, guider) -> Sharding:
    return Sharding(mesh, _several_blocks(guider.model_patcher, "context parallelism").heads)


def _share_blocks(sharding: Sharding, guider) -> None:
    """Each block on this rank's tokens, outside of everything else that stands around it."""
    transformer_options = guider.model_options["transformer_options"]
    first, *middle, last = find_stack(guider.model_patcher.model.diffusion_model).keys
    _wrap_block(transformer_options, first, sharding.first_block)
    for key in middle:
        _wrap_block(transformer_options, key, sharding.block)
    _wrap_block(transformer_options, last, sharding.last_block)


def _wrap_block(transformer_options: dict, key: BlockKey, wrapper: Callable, innermost: bool = False) -> None:
    """Put `wrapper(args, run_block)` around one block: outside of what another pack has put there, or next to the
    block itself."""
    replacements = transformer_options.setdefault("patches_replace", {}).setdefault("dit", {})
    other = replacements.get(key)

    def replacement(args: dict, extra: dict) -> dict:
        original = extra["original_block"]
        if other is None:
            return wrapper(args, original)
        if innermost:
            return other(args, {**extra, "original_block": lambda inner_args: wrapper(inner_args, original)})
        return wrapper(args, lambda inner_args: other(inner_args, extra))

    replacements[key] = replacement
