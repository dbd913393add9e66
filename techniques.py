"""Each technique on a run, as a context manager that puts it on the run's own options and seam and takes it off again.

One that the plan does not ask for does nothing. TECHNIQUES is their order.
"""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from comfy.ldm.modules.attention import optimized_attention
from comfy.patcher_extension import WrappersMP
from torch import nn

from . import conflicts, live
from .attention import RING, AttentionHook, Heads, Selection, SparseAttention, Together, stock
from .attributes import changed
from .cache import CacheHook, Evaluations, FirstBlockCache
from .compilation import CompiledBlocks, require_own_folder
from .estimate import Load, room_bytes
from .footprint import needed_bytes
from .models import Network, Seam
from .offloaded import CASTS, OffloadedBlocks, ahead_bytes
from .parallel import Mesh, Sharding
from .patchers import own_network, plain, take_off_unless_beside
from .plan import PLAN_KEY, AttentionConfig, CacheConfig, Plan, SparseConfig
from .quantization import quantized
from .report import begin, note, publish, show, sparse_called
from .runs import Run
from .slices import SlicedBlocks
from .stopwatch import Stopwatch
from .workers import delegated

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

logger = logging.getLogger("skein")


@dataclass
class Sampling:
    """A run that techniques are put on. mesh: the processes that share it, in a worker; None in ComfyUI's own process.

    latent: the shape of what is sampled, where that is known beforehand. sharding: this process's part of each call,
    where there are others. offloaded: blocks with weights off the device.
    """

    plan: Plan
    guider: Any
    mesh: Mesh | None
    latent: Sequence[int] = ()
    seam: Seam = field(default_factory=Seam)
    sharding: Sharding | None = None
    offloaded: OffloadedBlocks | None = None

    @property
    def options(self) -> dict:
        """The run's own transformer_options."""
        return self.guider.model_options["transformer_options"]


@contextmanager
def delegating(run: Sampling) -> Iterator[None]:
    """The run in the workers, with what these could not find out."""
    plan = run.plan
    for name in ("cache", "sparse"):
        config = getattr(plan, name)
        if config is not None and name in plan.techniques:
            plan = replace(plan, **{name: replace(config, sigmas=sigmas_of(config, run.guider.model_patcher))})
    with delegated(plan, run.guider, run.seam):
        yield


@contextmanager
def _loading_plainly(run: Sampling) -> Iterator[None]:
    """The model loaded without ComfyUI's dynamic VRAM, where that cannot work."""
    with plain(run.guider) if run.plan.loads_plainly else nullcontext():
        yield


@contextmanager
def _quantizing(run: Sampling) -> Iterator[None]:
    """The model's FP8 twin in the model's place, before ComfyUI loads it."""
    if run.plan.fp8 is None:
        yield
        return
    guider, source = run.guider, run.guider.model_patcher
    conflicts.watch(run.options, "fp8", source)
    work = needed_bytes(run.plan, source, run.latent) if run.latent else 0
    try:
        with quantized(source, run.plan.fp8, work) as guider.model_patcher:
            yield
    finally:
        guider.model_patcher = source


@contextmanager
def _sharing(run: Sampling) -> Iterator[None]:
    """Each call's tokens over the processes of a mesh."""
    if run.mesh is not None and run.mesh.world > 1:
        run.sharding = Sharding(run.mesh, whole_sequences="sparse" in run.plan.techniques)
        require_several_blocks(run.guider.model_patcher, "context parallelism")
        run.seam.blocks.append(run.sharding.around_block)
        run.seam.after = run.sharding.before_after
    yield


@contextmanager
def _attending(run: Sampling) -> Iterator[None]:
    """Attention by the plan. Without one, ComfyUI's own as one operator, which compiled, shared and sparse blocks need;
    text is then cut for sparse attention, which takes no mask."""
    config, sparse = run.plan.attention, _sparse(run)
    as_it_is = run.plan.compile is None and run.sharding is None and "slices" not in run.plan.techniques
    if config is None and as_it_is and sparse is None:
        yield
        return
    config = config or AttentionConfig(kernel="stock", trim_text=sparse is not None)
    selection = Selection(config, partial(stock, optimized_attention), say=partial(note, "attention"))
    around = None if run.sharding is None else run.sharding.around
    hook = AttentionHook(selection, config.trim_text, around, sparse)
    run.seam.models.append(hook.around_model)
    run.seam.blocks.append(hook.around_block)
    hook.put_on(run.options)
    with nullcontext() if sparse is None else _recorded(run, sparse):
        yield
    show(config.node_id, "; ".join(selection.reasons), "attention" if selection.reasons else "")


def _sparse(run: Sampling) -> SparseAttention | None:
    """The run's sparse attention, if the plan asks for it and the processes that share it are not in a ring."""
    config, patcher, sharding = run.plan.sparse, run.guider.model_patcher, run.sharding
    if config is None or "sparse" not in run.plan.techniques:
        return None
    together = Together()
    if sharding is not None:
        heads = Network(own_network(patcher)).heads
        if all(each.ring_size > 1 or each.ulysses_size > heads for each in sharding.mesh.arrangements):
            show(config.node_id, RING, "sparse")
            return None
        together = Together(lambda: Heads(sharding.of_all_heads, sharding.first_head), sharding.mesh.largest)
    say = partial(show, config.node_id, about="sparse")
    return SparseAttention(config, sigmas_of(config, patcher), patcher.load_device, together, sparse_called, say)


@contextmanager
def _recorded(run: Sampling, sparse: SparseAttention) -> Iterator[None]:
    run.seam.models.append(sparse.around_model)
    sparse_called(sparse.record)
    try:
        yield
    finally:
        record = sparse.end()
        sparse_called(record)
        said = "; ".join([record.summary(), *sparse.reasons])
        logger.info("Skein sparse attention: %s", record.summary())
        show(sparse.config.node_id, said, "sparse")


@contextmanager
def _fetching(run: Sampling) -> Iterator[None]:
    """Weights that ComfyUI has left off the device, brought to it block by block, where blocks do not run as ComfyUI
    has them run."""
    plan, patcher = run.plan, run.guider.model_patcher
    model = patcher.model
    if not plan.loads_plainly and "slices" not in plan.techniques:
        yield
        return
    required = partial(_memory_required, model, plan, model.memory_required)
    alone = run.mesh is None or run.mesh.world == 1  # else others would wait for a call that is made once more
    run.offloaded = OffloadedBlocks(partial(note, "offloaded"), patcher if alone and not patcher.is_dynamic() else None)
    run.seam.models.append(run.offloaded.around_model)
    run.seam.blocks.append(run.offloaded.around_block)
    with run.offloaded.on(), changed([(model, "memory_required", required)]):
        if run.latent and not patcher.is_dynamic():
            take_off_unless_beside(patcher, model.memory_required(list(run.latent)))
        yield


def _memory_required(
    model: Any, plan: Plan, own: Callable, input_shape: Sequence[int], *conds: Any, **named: Any
) -> float:
    """A model's memory_required, by which ComfyUI leaves weights off the device: its own knows nothing of slices, of
    weights that come ahead, and of what the allocator loses."""
    network, room = Network(model.diffusion_model), 0.0
    if len(input_shape) >= 4:  # of several latents packed into one the shape says nothing
        room = room_bytes(Load.of(network, input_shape, model.get_dtype_inference().itemsize), plan)
    if "slices" not in plan.techniques or not room:
        room = max(room, own(input_shape, *conds, **named))
    return room + ahead_bytes(network)


@contextmanager
def _repeating(run: Sampling) -> Iterator[None]:
    """A call for which memory runs out is made once more with all weights off the device. It stands inside of all that
    is around a call."""
    if run.offloaded is not None:
        run.seam.models.append(run.offloaded.around_call)
    yield


@contextmanager
def _slicing(run: Sampling) -> Iterator[None]:
    """Blocks in slices of tokens."""
    config = run.plan.slices
    if config is None or config.count == 1:
        yield
        return
    slices = SlicedBlocks(config.count, partial(note, "slices"))
    run.seam.blocks.append(slices.around_block)
    run.seam.within = slices.within
    yield


@contextmanager
def _compiling(run: Sampling) -> Iterator[None]:
    config, options = run.plan.compile, run.options
    if config is None:
        yield
        return
    obstacle = _compile_obstacle(options)
    if obstacle:
        logger.warning("Skein compile: the blocks run uncompiled, because %s.", obstacle)
        show(config.node_id, f"uncompiled: {obstacle}", "compile")
        yield
        return
    if options.get("patches") or options.get("patches_replace"):
        config = replace(config, warm_up=False)  # other packs' code in the blocks may keep count of its calls
    # Workers exchange in between, and with 8-bit attention the first and last steps have another kernel.
    # So it is between dense and sparse steps, and what is sparse is decided on the host.
    same_kernels = (
        run.sharding is None
        and not (run.plan.attention and run.plan.attention.allow_8bit)
        and "sparse" not in run.plan.techniques
    )
    assert run.offloaded is not None
    say = partial(show, config.node_id, about="compile")
    blocks = CompiledBlocks(config, say, same_kernels, run.offloaded.came)
    run.seam.models.append(blocks.around_model)
    run.seam.blocks.append(blocks.around_block)
    with blocks.settings(), _alike(run.guider.model_patcher.model.diffusion_model):
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
def _alike(network: nn.Module) -> Iterator[None]:
    """Within: blocks differ in nothing that tells compiled graphs apart and comes of how ComfyUI has loaded or patched
    them. No parameter requires gradients, as older ComfyUIs load them; and all layers have CASTS of their own, as those
    have that ComfyUI has once left off the device."""
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    layers = [layer for layer in network.modules() if hasattr(layer, CASTS) and CASTS not in vars(layer)]
    for parameter in parameters:
        parameter.requires_grad_(False)
    for layer in layers:
        setattr(layer, CASTS, getattr(layer, CASTS))
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)
        for layer in layers:
            if getattr(layer, CASTS) == getattr(type(layer), CASTS):  # not left off the device meanwhile
                delattr(layer, CASTS)


def evaluations(guider) -> Evaluations:
    """Counts the sampler's evaluations of the model, of which each call is told, in the workers too."""
    counter = Evaluations()
    wrappers = guider.model_options["transformer_options"].setdefault("wrappers", {})
    others = wrappers.get(WrappersMP.PREDICT_NOISE, {})
    # Outside of other packs' wrappers: one that evaluates several times (tiles, guidance) is one evaluation.
    wrappers[WrappersMP.PREDICT_NOISE] = {PLAN_KEY: [counter.around_evaluation], **others}
    return counter


@contextmanager
def _caching(run: Sampling) -> Iterator[None]:
    """The first-block cache. It stands inside of the sharing and outside of all else."""
    config, patcher = run.plan.cache, run.guider.model_patcher
    if config is None or "cache" not in run.plan.techniques:
        yield
        return
    require_several_blocks(patcher, "the first-block cache")
    record = Run(
        node_id=config.node_id,
        limit=config.max_consecutive_hits,
        accumulate=config.accumulate,
        share=config.reuse_share,
    )
    sigmas = sigmas_of(config, patcher)
    total = () if run.mesh is None or run.sharding is None else (run.mesh.total,)
    cache = FirstBlockCache(config, *sigmas, *total)
    hook = CacheHook(cache, record, Stopwatch(patcher.load_device))
    run.seam.models.append(hook.around_model)
    run.seam.blocks.insert(0 if run.sharding is None else 1, hook.around_block)

    started = time.perf_counter()
    begin(record)
    try:
        yield
        record.finished = True
    except BaseException as error:
        record.error = live.sentence(error)
        raise
    finally:
        cache.reset()
        hook.stopwatch.read()
        record.seconds = time.perf_counter() - started
        publish(record)


def sigmas_of(config: CacheConfig | SparseConfig, patcher: "ModelPatcher") -> tuple[float, float]:
    """The sigmas of start_percent and end_percent, under the sampling that other nodes have given the model."""
    if config.sigmas is not None:
        return config.sigmas
    percent_to_sigma = patcher.get_model_object("model_sampling").percent_to_sigma
    return float(percent_to_sigma(config.start_percent)), float(percent_to_sigma(config.end_percent))


def require_several_blocks(patcher: "ModelPatcher", technique: str) -> None:
    """Raises ValueError if the model has only one block."""
    blocks = Network(own_network(patcher)).blocks
    if len(blocks) < 2:
        raise ValueError(f"This model has {len(blocks)} block(s); {technique} needs at least two.")


# What is put on a run in this process, in this order: a block is cut before the cache is asked, and the cache decides
# before a compiled block is entered.
TECHNIQUES = (
    _loading_plainly,
    _quantizing,
    _sharing,
    _attending,
    _fetching,
    _slicing,
    _compiling,
    _caching,
    _repeating,
)
