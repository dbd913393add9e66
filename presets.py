"""The presets of the Speed Up node: which techniques a run gets, on this machine, for this model and size.

A preset is resolved when sampling starts, because only then the size, the other nodes and the free GPUs are known. It
fills in what no other node has set. What cannot work here is left out, with the reason in words, where the technique's
own node would refuse.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from . import conflicts, needs
from .footprint import expected_bytes, needed_bytes, usable_bytes, with_slices, world_of
from .models import Network
from .patchers import own_network
from .plan import (
    AttentionConfig,
    CacheConfig,
    CompileConfig,
    FP8Config,
    ParallelConfig,
    Plan,
    PresetConfig,
    SparseConfig,
    device_names,
)
from .quantization import computes_in_fp8, is_quantized
from .workers.recipe import export_patches, recipe_of

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

CACHED = ("balanced", "fastest", "low memory")  # presets with the cache
FASTEST_THRESHOLD = 1.5  # times the model's own
FEWEST_TOKENS = 10_000  # several GPUs gained 1.06x on 4,096 image tokens, 1.9x on 75,600 (docs/BENCHMARKS.md)


@dataclass
class Choice:
    """What a preset has chosen. plan: without the preset. left_out: technique -> why, for those it would have had."""

    plan: Plan
    left_out: dict[str, str] = field(default_factory=dict)


def wanted(plan: Plan, threshold: float) -> Plan:
    """The plan with all that its preset would have, whatever the machine and the size. threshold: the model's own, for
    the cache."""
    if plan.preset is None:
        return plan
    preset, node_id = plan.preset, plan.preset.node_id  # a run is known by its node; the others' words are in notes
    fastest = preset.preset == "fastest"
    filled: dict[str, Any] = {"attention": AttentionConfig(allow_8bit=fastest), "compile": CompileConfig()}
    if len(device_names(preset.devices)) > 1 or (preset.devices == "all" and torch.cuda.device_count() > 1):
        filled["parallel"] = ParallelConfig(preset.devices)
    if preset.preset != "exact":
        filled["fp8"] = FP8Config()
    if preset.preset in CACHED:
        filled["cache"] = CacheConfig(threshold * (FASTEST_THRESHOLD if fastest else 1), node_id=node_id)
    if fastest:
        filled["sparse"] = SparseConfig(node_id=node_id)
    missing = {name: config for name, config in filled.items() if getattr(plan, name) is None}
    return replace(plan, preset=None, **missing)


def resolve(plan: Plan, guider: Any, latent: Sequence[int]) -> Choice:
    """The plan with its preset filled in, for a run of a guider on a latent (B, C, ...)."""
    choice = Choice(replace(plan, preset=None))
    if plan.preset is None:
        return choice
    case = Case(plan.preset, guider.model_patcher, latent)
    whole = wanted(plan, case.network.architecture.threshold)
    for name, obstacle in ORDER.items():
        config = getattr(whole, name)
        if getattr(plan, name) is not None or config is None:
            continue
        tried = replace(choice.plan, **{name: config})
        why = _refused(tried, name, guider) or obstacle(case, tried)
        if why is None:
            choice.plan = tried
        elif why:
            choice.left_out[name] = why
    if choice.plan.cache is not None and plan.cache is None:
        fit_cache(choice, case)
    return choice


@dataclass
class Case:
    """A run that a preset is for: its model, and the shape of its latent (B, C, ...)."""

    preset: PresetConfig
    patcher: "ModelPatcher"
    latent: Sequence[int]
    network: Network = field(init=False)
    usable: float = field(init=False)  # bytes of the device

    def __post_init__(self) -> None:
        self.network = Network(own_network(self.patcher))
        self.usable = usable_bytes(self.patcher.load_device)

    def fits(self, plan: Plan) -> bool:
        """Whether each device has room for a run under a plan and the model's weights."""
        need = expected_bytes(with_slices(plan, self.patcher, self.latent), self.patcher, self.latent)
        return need is None or need <= self.usable

    def has_room(self, plan: Plan) -> bool:
        """Whether each device has room for a run under a plan, be the weights wherever they are."""
        plan = with_slices(plan, self.patcher, self.latent)
        return needed_bytes(plan, self.patcher, self.latent) <= self.usable

    def weights_come(self, plan: Plan) -> bool:
        """Whether weights that do not fit come while blocks run: not those in ComfyUI's quantized forms."""
        return plan.loads_plainly and not is_quantized(self.patcher.model)


def _refused(plan: Plan, name: str, guider: Any) -> str | None:
    """Why a technique's own node would refuse this model or machine; None if it would not."""
    try:
        needs.require(plan, {name}, guider.model_patcher)
        conflicts.refuse_technique(name, guider)
    except ValueError as error:
        return str(error)
    return None


def _none(_case: Case, _plan: Plan) -> str | None:
    return None


def _of_compile(case: Case, _plan: Plan) -> str | None:
    return None if case.patcher.load_device.type == "cuda" else ""  # nothing to gain, and nothing to tell


def _of_fp8(case: Case, plan: Plan) -> str | None:
    """FP8 where it computes faster, or where the model would not fit."""
    if is_quantized(case.patcher.model):
        return "the checkpoint is quantized already."
    if case.preset.preset == "low memory" or computes_in_fp8(case.patcher.load_device):
        return None
    if not case.fits(replace(plan, fp8=None)):
        return None
    on_gpu = case.patcher.load_device.type == "cuda"
    return "this GPU computes no faster in FP8, and the model fits without." if on_gpu else ""


def _of_parallel(case: Case, _plan: Plan) -> str | None:
    tokens = case.network.tokens(case.latent)
    if case.preset.devices == "all" and tokens < FEWEST_TOKENS:
        return f"several devices gain little on {tokens} tokens."
    try:
        recipe_of(case.patcher)
        export_patches(case.patcher)
    except ValueError as error:
        return str(error)
    return None


# The techniques that presets have -> what else may speak against each: None: nothing; "": not worth telling. Several
# devices come first: what fits depends on their number.
ORDER: dict[str, Callable[[Case, Plan], str | None]] = {
    "parallel": _of_parallel,
    "attention": _none,
    "compile": _of_compile,
    "fp8": _of_fp8,
    "sparse": _none,
    "cache": _none,
}


def fit_cache(choice: Choice, case: Case) -> None:
    """Have the cache keep as many calls as fit: beside the model, or without it where weights come while blocks run
    (offloaded.py), which costs no time. Or the last one alone, where that fits without the model: it saves more time
    than the weights cost that it takes the place of."""
    assert choice.plan.cache is not None
    enough = case.has_room if case.weights_come(choice.plan) else case.fits
    for order in (2, 1, 0):
        choice.plan = replace(choice.plan, cache=replace(choice.plan.cache, order=order))
        if enough(choice.plan):
            return
    if not case.has_room(choice.plan):
        choice.plan = replace(choice.plan, cache=None)
        choice.left_out["cache"] = "there is not enough memory for it at this size."


def words(plan: Plan) -> str:
    """The techniques of a plan, for the line on a node."""
    named = [conflicts.NAMES[name] for name in ("attention", "compile", "fp8") if name in plan.techniques]
    if plan.attention is not None and plan.attention.allow_8bit:
        named[0] = "8-bit Attention"
    if "sparse" in plan.techniques:
        named.append(conflicts.NAMES["sparse"])
    if plan.cache is not None and "cache" in plan.techniques:
        share, threshold = plan.cache.reuse_share, plan.cache.threshold
        cached = f"First-Block Cache at {share:.0%} reused" if share else f"First-Block Cache at {threshold:g}"
        named.append(cached)
    if plan.parallel is not None:
        named.append(f"{world_of(plan)} devices")
    return ", ".join(named) or "nothing: the model runs as it does without Skein"
