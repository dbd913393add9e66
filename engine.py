"""Carries a plan out: puts its techniques on a sampling run, and takes them off again.

Nodes call `edit`, which puts a plan on a clone of the model and one OUTER_SAMPLE wrapper beside it. When
sampling starts, the wrapper adds what the plan asks for to the run's own copy of the model options and
puts the old options back when sampling ends, however it ends. Nothing outlives the run, nothing global changes.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import comfy.model_patcher
from comfy.patcher_extension import WrappersMP, add_wrapper_with_key

from . import conflicts, live, needs
from .estimate import advice, work_bytes
from .footprint import load_of, usable_bytes, with_slices, world_of
from .latents import some_values
from .models import Network, Seam
from .out_of_memory import is_out_of_memory
from .pace import followed
from .parallel import Mesh
from .patchers import PLAIN_KEY, TWIN_KEY, keep, own_network, take_off_others
from .plan import MODEL_DEFAULT, PLAN_KEY, Plan, PresetConfig
from .presets import Choice, resolve, wanted
from .quantization import is_quantized
from .report import note
from .techniques import TECHNIQUES, Sampling, delegating, evaluations
from .units import bytes_text
from .workers.recipe import note_origin

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

logger = logging.getLogger("skein")

AGAIN = "memory ran out; the sampling begins again, with blocks in slices of tokens"
SLICED = "Blocks in {} slices of tokens: {} instead of {} of working memory"


def edit(patcher: "ModelPatcher", **changes: Any) -> "ModelPatcher":
    """A clone of the model whose plan has the given fields replaced, e.g. `edit(model, cache=CacheConfig())`.

    Raises ValueError where it is already known that sampling under these fields would be refused.
    """
    plan = _with_threshold(replace(plan_of(patcher), **changes), patcher)
    needs.require(plan, changes.keys() & {*plan.techniques, "preset"}, patcher)
    note_origin(patcher)  # while the files are what ComfyUI has just loaded
    clone = patcher.clone()
    clone.set_attachments(PLAN_KEY, plan)
    for key, asking in ((TWIN_KEY, [plan.fp8, plan.preset]), (PLAIN_KEY, [plan.fp8, plan.compile, plan.preset])):
        if any(asking):
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


def plan_of(patcher: "ModelPatcher") -> Plan:
    """The plan on a model; an empty one if no Skein node has touched it."""
    return patcher.get_attachment(PLAN_KEY) or Plan()


def wanted_of(patcher: "ModelPatcher") -> Plan:
    """The plan on a model with all that its preset asks for, whatever the machine and the size."""
    plan = plan_of(patcher)
    return plan if plan.preset is None else wanted(plan, Network(own_network(patcher)).architecture.threshold)


ARGUMENTS = ("noise", "latent_image", "sampler", "sigmas", "denoise_mask", "callback")  # of OUTER_SAMPLE, in order


def _outer_sample(executor, *args, **kwargs):
    """OUTER_SAMPLE wrapper: the plan holds exactly as long as the sampling inside."""
    guider, given = executor.class_obj, {**dict(zip(ARGUMENTS, args)), **kwargs}
    asked = plan_of(guider.model_patcher)
    if asked.preset is not None or asked.techniques:
        take_off_others(guider.model_patcher)
    choice, noise = resolve(asked, guider, given["noise"].shape), given["noise"]
    if choice.plan.techniques:
        with suppress(ValueError):  # a model that Skein does not know: applied() says so
            choice.plan = with_slices(choice.plan, guider.model_patcher, noise.shape)
    sliced = _sliced(asked, choice.plan, guider.model_patcher, noise.shape)
    if sliced is None:
        return _sample(executor, choice, asked.preset, args, kwargs)
    conds = {name: [each.copy() for each in several] for name, several in getattr(guider, "conds", {}).items()}
    try:
        return _sample(executor, choice, asked.preset, args, kwargs)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
    # What the sampling had in memory has gone with the exception.
    logger.warning("Skein: %s", AGAIN)
    choice.plan, guider.conds = sliced, conds  # these as they were before ComfyUI prepared them
    return _sample(executor, choice, asked.preset, args, kwargs)


def _sliced(asked: Plan, plan: Plan, patcher: "ModelPatcher", latent: tuple[int, ...]) -> Plan | None:
    """A plan for when memory runs out: the blocks, which are whole, in slices. None where that cannot be, or where
    somebody has asked for it to be as it is."""
    if asked.slices is not None or plan.slices is None or plan.slices.count > 1 or plan.parallel is not None:
        return None
    sliced = with_slices(replace(plan, slices=None), patcher, latent, usable=0)
    return sliced if "slices" in sliced.techniques else None


def _sample(executor, choice: Choice, preset: PresetConfig | None, args: tuple, kwargs: dict):
    """The sampling as it has been chosen."""
    guider, given = executor.class_obj, {**dict(zip(ARGUMENTS, args)), **kwargs}
    noise = given["noise"]
    with (
        live.sampling(choice.plan.techniques, guider.model_patcher.load_device),
        followed(choice, preset, guider, given) as callback,
        applied(choice.plan, guider, latent=tuple(noise.shape)),
    ):
        _tell_of_memory(choice.plan, guider.model_patcher, noise.shape)
        if "callback" in kwargs or len(args) < len(ARGUMENTS):
            kwargs = {**kwargs, "callback": callback}
        else:
            args = (*args[: len(ARGUMENTS) - 1], callback, *args[len(ARGUMENTS) :])
        latent = executor(*args, **kwargs)
        live.sampled(some_values(latent))
        return latent


def _tell_of_memory(plan: Plan, patcher: "ModelPatcher", latent: tuple[int, ...]) -> None:
    """Say what slices of tokens save; and beforehand that a size is too large for a GPU. ComfyUI may still find a way,
    so nothing is refused."""
    load = load_of(patcher, latent) if plan.techniques else None
    if load is not None and plan.slices is not None and "slices" in plan.techniques:
        whole, sliced = (work_bytes(load, each, world_of(plan)) for each in (replace(plan, slices=None), plan))
        text = SLICED.format(plan.slices.count, bytes_text(sliced), bytes_text(whole))
        logger.info("Skein: %s", text)
        note("slices", text)
    if patcher.load_device.type != "cuda":
        return
    text = "" if load is None else advice(load, plan, usable_bytes(patcher.load_device), world_of(plan))
    if text:
        logger.warning("Skein: %s", text)
        note("memory", text)


@contextmanager
def applied(plan: Plan, guider, mesh: Mesh | None = None, latent: Sequence[int] = ()) -> Iterator[None]:
    """Apply a plan to a guider's run and take it off at the end, also after an exception or an interrupt.

    mesh: the processes that share the run, in a worker; None in ComfyUI's own process. latent: see Sampling.
    """
    options = guider.model_options
    guider.model_options = comfy.model_patcher.create_model_options_clone(options)
    run = Sampling(plan, guider, mesh, latent)
    try:
        with ExitStack() as techniques:
            if mesh is None:
                _refuse_conflicts(plan, guider)
                run.seam.models.append(live.step)
                if "cache" in plan.techniques:
                    run.seam.models.append(evaluations(guider).around_model)
            away = plan.parallel is not None and mesh is None
            for put_on in (delegating,) if away else TECHNIQUES:
                techniques.enter_context(put_on(run))
            if mesh is not None or plan.techniques:  # else the model may be one that Skein does not know
                alone = "Context Parallel" if away else "Compile Blocks" if plan.compile is not None else ""
                _put_on(run.seam, guider, alone)
            yield
    finally:
        guider.model_options = options


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
            raise ValueError(f"{only} cannot work where a guider has two models; remove {only} from the first one.")
        return execute(*args, **kwargs)

    add_wrapper_with_key(WrappersMP.APPLY_MODEL, PLAN_KEY, around, guider.model_options["transformer_options"])


def _refuse_conflicts(plan: Plan, guider) -> None:
    """Raises ValueError for what other nodes have put on the model, or has the run do so for what they put on later."""
    patcher = guider.model_patcher
    left_alone = ("fp8",) if plan.fp8 is not None and is_quantized(patcher.model) else ()
    conflicts.refuse(plan, guider, left_alone)
    for technique in plan.techniques[:1]:
        conflicts.watch(guider.model_options["transformer_options"], technique, patcher)
