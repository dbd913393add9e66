"""Carries a plan out: puts its techniques on a sampling run, and takes them off again.

Nodes call `edit`, which puts a plan on a clone of the model and one OUTER_SAMPLE wrapper beside it. When
sampling starts, the wrapper adds what the plan asks for to the run's own copy of the model options and
puts the old options back when sampling ends, however it ends. Nothing outlives the run, nothing global changes.
"""

import logging
import time
from collections.abc import Iterator, Set
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import comfy.model_management as memory
import comfy.model_patcher
from comfy.ldm.modules.attention import optimized_attention
from comfy.patcher_extension import WrappersMP, add_wrapper_with_key
from torch import nn

from . import conflicts, live
from .attention import AttentionHook, Selection, stock
from .cache import CacheHook, Evaluations, FirstBlockCache
from .compilation import CompiledBlocks, compile_settings, require_own_folder
from .estimate import Load, advice
from .files import files_of
from .latents import some_values
from .models import Network, Seam
from .parallel import Mesh, Sharding
from .patchers import PLAIN_KEY, TWIN_KEY, keep, own_network, plain, unload
from .plan import MODEL_DEFAULT, PLAN_KEY, AttentionConfig, CacheConfig, CompileConfig, FP8Config, Plan
from .quantization import is_quantized, quantized, require_float8, require_torchao
from .report import begin, note, publish, show
from .runs import Run
from .stopwatch import Stopwatch
from .workers import delegated, setting_of, visible_devices
from .workers.environment import machines

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

logger = logging.getLogger("skein")


def edit(patcher: "ModelPatcher", **changes: Any) -> "ModelPatcher":
    """A clone of the model whose plan has the given fields replaced, e.g. `edit(model, cache=CacheConfig())`.

    Raises ValueError where it is already known that sampling under these fields would be refused.
    """
    plan = _with_threshold(replace(plan_of(patcher), **changes), patcher)
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


def _with_threshold(plan: Plan, patcher: "ModelPatcher") -> Plan:
    """The plan with the cache's threshold that suits the model, where the user has named none."""
    if plan.cache is None or plan.cache.threshold != MODEL_DEFAULT:
        return plan
    threshold = Network(own_network(patcher)).architecture.threshold
    return replace(plan, cache=replace(plan.cache, threshold=threshold))


def _require(plan: Plan, techniques: Set[str], patcher: "ModelPatcher") -> None:
    """Raises ValueError if these techniques lack something here: blocks that are known, a device, a package."""
    refuses = Network(own_network(patcher)).architecture.refuses if techniques else {}
    for technique in techniques & refuses.keys():
        raise ValueError(
            f"{conflicts.NAMES[technique]} cannot work with {type(own_network(patcher)).__name__} models, because "
            f"{refuses[technique]}; remove {conflicts.NAMES[technique]}."
        )
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


def _several_blocks(patcher: "ModelPatcher", technique: str) -> None:
    """Raises ValueError if the model has only one block."""
    blocks = Network(own_network(patcher)).blocks
    if len(blocks) < 2:
        raise ValueError(f"This model has {len(blocks)} block(s); {technique} needs at least two.")


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
    packed = len(latent) < 4  # several streams of tokens in one, of which the shape says nothing
    if device.type != "cuda" or not plan.techniques or packed:
        return
    load = Load.of(Network(patcher.model.diffusion_model), latent, dtype.itemsize)
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
    seam = Seam()
    try:
        with ExitStack() as techniques:
            if mesh is None:
                _refuse_conflicts(plan, guider)
                seam.models.append(live.step)
                if "cache" in plan.techniques:
                    seam.models.append(_evaluations(guider).around_model)
            if plan.parallel is not None and mesh is None:
                techniques.enter_context(delegated(_for_workers(plan, guider), guider, seam))
                only = "Context Parallel"
            else:
                techniques.enter_context(_computed_here(plan, guider, seam, mesh))
                only = "" if plan.compile is None else "Compile Blocks"
            if mesh is not None or plan.techniques:  # else the model may be one that Skein does not know
                _put_on(seam, guider, only)
            yield
    finally:
        guider.model_options = options


def _for_workers(plan: Plan, guider) -> Plan:
    """The plan with what a worker could not find out."""
    if plan.cache is None or "cache" not in plan.techniques:
        return plan
    return replace(plan, cache=replace(plan.cache, sigmas=cache_sigmas(plan.cache, guider.model_patcher)))


@contextmanager
def _computed_here(plan: Plan, guider, seam: Seam, mesh: Mesh | None) -> Iterator[None]:
    """The techniques of a run in this process, in the order in which they stand around blocks and model calls: a block
    is cut before the cache is asked, and the cache decides before a compiled block is entered."""
    with ExitStack() as techniques:
        if plan.fp8 is not None or plan.compile is not None:
            techniques.enter_context(plain(guider))
        if plan.fp8 is not None:
            techniques.enter_context(_quantizing(plan.fp8, guider))
        sharding = None if mesh is None or mesh.world == 1 else Sharding(mesh)
        if sharding is not None:
            _several_blocks(guider.model_patcher, "context parallelism")
            seam.blocks.append(sharding.around_block)
            seam.after = sharding.before_after
        if plan.attention is not None or plan.compile is not None or sharding is not None:
            techniques.enter_context(_attending(plan.attention, guider, seam, sharding))
        if plan.compile is not None:
            same_kernels = sharding is None and not (plan.attention and plan.attention.allow_8bit)  # see exact_steps
            techniques.enter_context(_compiling(plan.compile, guider, seam, same_kernels))
        if plan.cache is not None and "cache" in plan.techniques:
            techniques.enter_context(_caching(plan.cache, guider, seam, mesh))
        yield


def _put_on(seam: Seam, guider, only: str) -> None:
    """Have a seam around each call of the run's model. only: the technique that must not meet another one.

    A guider with a second model calls that with the options of the first.
    """

    def around(execute: Any, *args: Any, **kwargs: Any) -> Any:
        patcher = guider.model_patcher
        own = [patcher, *patcher.get_additional_models_with_key("multigpu")]
        network = execute.class_obj.diffusion_model
        if any(network is each.model.diffusion_model for each in own):
            with seam.on(network):
                return execute(*args, **kwargs)
        if only:
            raise ValueError(f"{only} cannot work where a guider has two models; remove it from the first one.")
        return execute(*args, **kwargs)

    add_wrapper_with_key(WrappersMP.APPLY_MODEL, PLAN_KEY, around, guider.model_options["transformer_options"])


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
def _attending(config: AttentionConfig | None, guider, seam: Seam, sharding: Sharding | None) -> Iterator[None]:
    """Attention by the plan. Without one, ComfyUI's own as one operator, which compiled and shared blocks need."""
    config = config or AttentionConfig(kernel="stock", trim_text=False)
    selection = Selection(config, partial(stock, optimized_attention), say=partial(note, "attention"))
    hook = AttentionHook(selection, config.trim_text, None if sharding is None else sharding.around)
    seam.models.append(hook.around_model)
    seam.blocks.append(hook.around_block)
    hook.put_on(guider.model_options["transformer_options"])
    yield
    show(config.node_id, "; ".join(selection.reasons), "attention" if selection.reasons else "")


@contextmanager
def _compiling(config: CompileConfig, guider, seam: Seam, same_kernels: bool) -> Iterator[None]:
    transformer_options = guider.model_options["transformer_options"]
    obstacle = _compile_obstacle(transformer_options)
    if obstacle:
        logger.warning("Skein compile: the blocks run uncompiled, because %s.", obstacle)
        show(config.node_id, f"uncompiled: {obstacle}", "compile")
        yield
        return
    if transformer_options.get("patches") or transformer_options.get("patches_replace"):
        config = replace(config, warm_up=False)  # other packs' code in the blocks may keep count of its calls
    blocks = CompiledBlocks(config, partial(show, config.node_id, about="compile"), same_kernels)
    seam.models.append(blocks.around_model)
    seam.blocks.append(blocks.around_block)
    with blocks.settings(), _frozen(guider.model_patcher.model.diffusion_model):
        yield


def _compile_obstacle(transformer_options: dict) -> str:
    """Why blocks are not compiled, in words; empty if nothing stands in the way."""
    patches = transformer_options.get("patches", {})
    if any(patches[name] for name in patches if name.startswith("attn")):  # told their block's index: a graph for each
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


def _evaluations(guider) -> Evaluations:
    """Counts the sampler's evaluations of the model, of which each call is told, in the workers too."""
    evaluations = Evaluations()
    wrappers = guider.model_options["transformer_options"].setdefault("wrappers", {})
    others = wrappers.get(WrappersMP.PREDICT_NOISE, {})
    # Outside of other packs' wrappers: one that evaluates several times (tiles, guidance) is one evaluation.
    wrappers[WrappersMP.PREDICT_NOISE] = {PLAN_KEY: [evaluations.around_evaluation], **others}
    return evaluations


@contextmanager
def _caching(config: CacheConfig, guider, seam: Seam, mesh: Mesh | None) -> Iterator[None]:
    patcher = guider.model_patcher
    _several_blocks(patcher, "the first-block cache")
    run = Run(node_id=config.node_id, limit=config.max_consecutive_hits, accumulate=config.accumulate)
    sigmas = cache_sigmas(config, patcher)
    cache = FirstBlockCache(config, *sigmas, *(() if mesh is None or mesh.world == 1 else (mesh.total,)))
    hook = CacheHook(cache, run, Stopwatch(patcher.load_device))
    seam.models.append(hook.around_model)
    seam.blocks.insert(0 if mesh is None or mesh.world == 1 else 1, hook.around_block)  # inside of the sharing

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
