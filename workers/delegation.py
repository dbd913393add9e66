"""A run whose model is in the workers: a proxy takes its place, and its calls go out."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict

import comfy.model_management as memory
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from .. import conflicts, live, processes
from ..files import LOAD_AGAIN, changes, require_unchanged
from ..models import OPTIONS, ModelCall, RunModel, Seam
from ..patchers import KEYS, is_kept, unload
from ..plan import Plan
from ..report import show
from .conversation import GroupError
from .group import Group, group_for, release, running_group
from .held import HeldModel
from .keeping import need_of
from .options import plain
from .protocol import NotPlain
from .proxy import Proxy, proxy_of
from .recipe import export_patches, inference_type, recipe_of
from .room import clear_own, shares
from .setting import Setting
from .wanted import setting_of

logger = logging.getLogger("skein")


@contextmanager
def delegated(plan: Plan, guider, seam: Seam) -> Iterator[None]:
    """Within: the guider's model runs in the workers. Raises ValueError on what cannot go there, before they start."""
    source, config = guider.model_patcher, plan.parallel
    assert config is not None
    recipe, setting, patches = recipe_of(source), setting_of(plan, source), export_patches(source)
    what = _look_at_files(setting, recipe, source)
    _take_off(source)
    proxy = proxy_of(source)
    guider.model_patcher = proxy.patcher(source)
    started = time.perf_counter()
    try:
        group = group_for(setting, memory.throw_exception_if_processing_interrupted)
        with group.used(), group.models.run(_loaded(group, recipe, source, plan, started), proxy) as model:
            kept = [key for key in KEYS if is_kept(source, key)]
            how = {"dtype": inference_type(source), "kept": kept}
            told = group.models.begin(model, asdict(plan), patches, source.patches_uuid, **how)
            proxy.begins(plan, len(setting.devices) * setting.nodes, told)
            caller = _Caller(group, proxy, source.load_device)
            conflicts.watch(guider.model_options["transformer_options"], "parallel", proxy.root)
            seam.models.append(caller)
            try:
                yield
            except BaseException:
                group.end_run()  # else they would keep its hidden states until the next one
                raise
            group.last_run = caller.figures(group.models.end(model))
        for rank, seconds in enumerate(group.last_run["exchange_s"]):
            processes.changed(rank, exchange_share=seconds / max(caller.seconds, 1e-9))
        show(config.node_id, "; ".join(filter(None, [caller.summary(), what])), "parallel")
    except GroupError as error:
        what = changes(recipe["files"])
        if not what:
            raise
        raise GroupError(f"{error} {what} since ComfyUI loaded it, which may be why. {LOAD_AGAIN}") from error
    finally:
        guider.model_patcher = source
        if not config.keep_warm:
            release()


def _look_at_files(setting: Setting, recipe: dict, source: ModelPatcher) -> str:
    """What has happened to the model's files since ComfyUI loaded it: workers that have it too go on as ComfyUI does.

    Raises ValueError if others would have to read them.
    """
    group = running_group()
    if group is None or group.setting != setting or group.models.find(recipe) is None:
        require_unchanged(source, "Context Parallel")
    what = changes(recipe["files"])
    if what:
        logger.warning("Skein workers: %s; the model that was loaded before goes on. %s", what, LOAD_AGAIN)
    return what


def _take_off(source: ModelPatcher) -> None:
    """Take a model off the GPU that ComfyUI keeps there outside of its books (--highvram): a worker has it there."""
    if source.offload_device.type != "cpu":
        unload(source)
        source.model.to("cpu")
        source.model.device = torch.device("cpu")


def _loaded(group: Group, recipe: dict, source: ModelPatcher, plan: Plan, started: float) -> HeldModel:
    """The model in the workers, which load it if they do not have it. started: when they were asked for."""
    assert plan.parallel is not None
    models, devices = group.models, group.setting.devices
    model = models.find(recipe)
    there = model is not None and model is models.last and models.on_devices
    if shares(group, source.load_device) and not there:
        clear_own(source.load_device)
    if model is not None:
        return model
    show(plan.parallel.node_id, f"loading the model in {len(group.pids)} workers")
    with live.activity("Loading the model in the worker processes"):
        model = models.load(recipe, need_of(source, recipe, plan, "cpu" in devices))
    try:
        require_unchanged(source, "Context Parallel")
    except ValueError:
        models.forget(model)
        raise
    seconds = time.perf_counter() - started
    logger.info("Skein workers: %d ready in %.1f s (%s)", len(group.pids), seconds, ", ".join(devices))
    return model


class _Caller:
    """In the place of the model's calls: the workers run them."""

    def __init__(self, group: Group, proxy: Proxy, own: torch.device):
        self.group, self.proxy, self.own = group, proxy, own  # own: this process's device
        self.calls = 0
        self.seconds = 0.0

    def __call__(self, call: ModelCall, _run: RunModel) -> Tensor:
        started = time.perf_counter()
        if call.arguments.get("control") is not None:
            raise ValueError(conflicts.AWAY.format(found="a ControlNet"))
        sample = call.latent
        if not self.calls and shares(self.group, self.own):
            clear_own(self.own, self.proxy.need(sample.shape))
        arguments = {name: value for name, value in call.arguments.items() if name != OPTIONS}
        message = {"arguments": arguments, "options": plain(call.options)}
        try:
            out = self.group.ask("call", message)
        except NotPlain as error:
            raise ValueError(conflicts.AWAY.format(found=f"an argument of the model ({error})")) from error
        out = out.to(sample.device, copy=True)
        self.calls += 1
        self.seconds += time.perf_counter() - started
        return out

    def summary(self) -> str:
        each = self.seconds / max(self.calls, 1)
        return f"{self.calls} calls on {', '.join(self.group.setting.devices)}: {each:.2f} s each"

    def figures(self, told: dict[int, dict]) -> dict:
        """The run in numbers: its calls, and what the workers told at its end, by rank.

        exchange_s: of each rank, with what it waited for slower ones. Bytes: those of the fullest rank.
        """
        answers = [told[rank] for rank in sorted(told)]
        fullest = {name: max(answer[name] for answer in answers) for name in ("peak_bytes", "reserved_bytes")}
        exchanges = [answer["exchange_s"] for answer in answers]
        return {"calls": self.calls, "call_s": self.seconds, "exchange_s": exchanges, **fullest}
