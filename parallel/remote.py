"""A model in the workers, seen from ComfyUI's process: a proxy takes its place, and its calls go out.

The proxy is a second model without weights (its tensors have a shape and no memory): ComfyUI's sampling code finds
everything that it asks of a model, loads nothing and moves nothing. When ComfyUI unloads it, the workers end;
when ComfyUI asks for some of its memory, they give that and stay.
"""

import json
import logging
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import comfy
import comfy.cli_args
import comfy.model_management as memory
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import CallbacksMP
from torch import Tensor, nn

from .. import conflicts, live
from ..estimate import Load, room_bytes
from ..files import LOAD_AGAIN, changes, require_unchanged
from ..models import OPTIONS, OVERRIDE, ModelCall, Network, RunModel, Seam, entry_of, share
from ..patchers import KEYS, clone_over, is_kept, own_network, unload
from ..plan import PLAN_KEY, Plan
from ..report import show
from .group import Group, GroupError, group_for, name_of, release, running_group, visible_devices
from .machines import machines
from .protocol import NotPlain, pack
from .recipe import Patches, export_patches, inference_type, recipe_of
from .setting import Setting

logger = logging.getLogger("skein")

LOAD_SECONDS, BEGIN_SECONDS, CALL_SECONDS = 3600.0, 3600.0, 3600.0  # begin quantizes, a call may compile
LOCAL_OPTIONS = ("wrappers", "callbacks", "patches", "patches_replace", OVERRIDE, "context_window")
PROXY_KEY = "_skein_proxy"  # on the proxy's model; and on the source's, so that the proxy goes when that goes


@contextmanager
def delegated(plan: Plan, guider, seam: Seam) -> Iterator[None]:
    """Within: the guider's model runs in the workers. Raises ValueError on what cannot go there, before they start."""
    source, config = guider.model_patcher, plan.parallel
    assert config is not None
    recipe, setting, patches = recipe_of(source), setting_of(plan, source), export_patches(source)
    what = _look_at_files(setting, recipe, source)
    _take_off(source)
    proxy = _proxy_of(source)
    guider.model_patcher = proxy.patcher(source)
    try:
        group = _ready(setting, recipe, proxy, source, plan)
        _begin(group, proxy, source, plan, patches)
        caller = _Caller(group, proxy, source.load_device)
        conflicts.watch(guider.model_options["transformer_options"], "parallel", proxy.root)
        seam.models.append(caller)
        try:
            yield
        except BaseException:
            group.end_run()  # else they would keep its hidden states until the next one
            raise
        told = group.ask_all("end", {}, CALL_SECONDS)
        _refuse_overwritten(group, told)
        group.last_run = figures(caller, told)
        for rank, seconds in enumerate(group.last_run["exchange_s"]):
            live.workers_changed(rank, exchange_share=seconds / max(caller.seconds, 1e-9))
        show(config.node_id, "; ".join(filter(None, [caller.summary(), what])))
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
    if group is None or group.setting != setting or group.model != recipe:
        require_unchanged(source, "Context Parallel")
    what = changes(recipe["files"])
    if what:
        logger.warning("Skein workers: %s; the model that was loaded before goes on. %s", what, LOAD_AGAIN)
    return what


def _refuse_overwritten(group: Group, told: dict[int, dict]) -> None:
    """Raises ValueError if a file that the workers have mapped has been written to: its model goes."""
    paths = sorted({path for each in told.values() for path in each["overwritten"]})
    if not paths:
        return
    group.model = group.patches = None
    group.ask("load", {"recipe": None}, LOAD_SECONDS)
    live.workers_stand(live.READY)
    raise ValueError(
        f"{', '.join(paths)} was written to while Context Parallel's workers had the model's weights in it, which are "
        f"no longer what ComfyUI loaded. {LOAD_AGAIN}"
    )


def _ready(setting: Setting, recipe: dict, proxy: "Proxy", source: ModelPatcher, plan: Plan) -> Group:
    """Workers with the model loaded."""
    started = time.perf_counter()
    group = group_for(setting, memory.throw_exception_if_processing_interrupted)
    if shares(group, source.load_device) and (group.model != recipe or not group.resident):
        clear_own(source.load_device)
    if group.model != recipe:
        assert plan.parallel is not None
        show(plan.parallel.node_id, f"loading the model in {len(group.pids)} workers")
        group.model = group.patches = None
        group.ask("load", {"recipe": recipe}, LOAD_SECONDS)
        require_unchanged(source, "Context Parallel")
        group.model = recipe
        seconds = time.perf_counter() - started
        logger.info("Skein workers: %d ready in %.1f s (%s)", len(group.pids), seconds, ", ".join(setting.devices))
    group.holder = proxy
    return group


def shares(group: Group, device: torch.device) -> bool:
    """Whether a device of this process is a worker's too."""
    return name_of(device) in group.setting.devices


def clear_own(device: torch.device, need: float = 1e30) -> None:
    """Unload what this process has on a device, all or until so many bytes are free, so that workers have room."""
    memory.soft_empty_cache()  # what ComfyUI counts as free there, but no other process can have
    loaded = [entry for entry in memory.current_loaded_models if entry.model is not None]
    proxies = [entry for entry in loaded if is_proxy(entry.model.model)]  # their unloading ends workers
    memory.free_memory(need, device, keep_loaded=proxies)


def _begin(group: Group, proxy: "Proxy", source: ModelPatcher, plan: Plan, patches: Patches) -> None:
    """Tell the workers of the plan, and of the patches if they have changed; and the proxy of their memory."""
    changed = group.patches != source.patches_uuid
    group.patches = None
    kept = [key for key in KEYS if is_kept(source, key)]
    question = {
        "plan": asdict(plan),
        "patches": patches if changed else None,
        "dtype": inference_type(source),
        "kept": kept,
    }
    told = group.ask_all("begin", question, BEGIN_SECONDS)
    _refuse_overwritten(group, told)
    group.patches = source.patches_uuid
    proxy.size = max(each["weights"] for each in told.values())
    proxy.spare = min(each["spare"] for each in told.values())
    proxy.plan, proxy.world = plan, len(group.setting.devices) * group.setting.nodes
    group.resident = True


class _Caller:
    """In the place of the model's calls: the workers run them."""

    def __init__(self, group: Group, proxy: "Proxy", own: torch.device):
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
        message = {"arguments": arguments, "options": _plain(call.options)}
        try:
            out = self.group.ask("call", message, CALL_SECONDS)
        except NotPlain as error:
            raise ValueError(conflicts.AWAY.format(found=f"an argument of the model ({error})")) from error
        out = out.to(sample.device, copy=True)
        self.calls += 1
        self.seconds += time.perf_counter() - started
        return out

    def summary(self) -> str:
        each = self.seconds / max(self.calls, 1)
        return f"{self.calls} calls on {', '.join(self.group.setting.devices)}: {each:.2f} s each"


def figures(caller: _Caller, told: dict[int, dict]) -> dict:
    """A run in numbers: its calls, and what the workers told at its end, by rank.

    exchange_s: of each rank, with what it waited for slower ones. Bytes: those of the fullest rank.
    """
    answers = [told[rank] for rank in sorted(told)]
    fullest = {name: max(answer[name] for answer in answers) for name in ("peak_bytes", "reserved_bytes")}
    exchanges = [answer["exchange_s"] for answer in answers]
    return {"calls": caller.calls, "call_s": caller.seconds, "exchange_s": exchanges, **fullest}


def _plain(options: dict) -> dict:
    """What of a call's transformer_options is plain data; code in them has been refused before."""
    conflicts.refuse_call(options)
    plain = {}
    for name, value in options.items():
        if name in LOCAL_OPTIONS:
            continue
        try:
            pack(value, [])
        except NotPlain as error:
            logger.debug("Skein workers: %s stays behind (%s)", name, error)
            continue
        plain[name] = value
    window = getattr(options.get("context_window"), "index_list", None)
    if window is not None:
        plain["context_window"] = list(window)
    return plain


class Proxy:
    """A second model without weights in the place of one that is in the workers. Holds ComfyUI's books about it.

    size: bytes of the weights on each device. spare: bytes that can be free beside them on the fullest.
    """

    def __init__(self, source: ModelPatcher):
        unload(source)
        self.size, self.spare = memory.module_size(source.model), 0.0
        self.plan, self.world = Plan(), 1
        self.model: Any = share(source.model)
        network: Any = self.model.diffusion_model
        _empty(network)
        vars(network)[entry_of(network)] = _without_workers
        vars(self.model)[PROXY_KEY] = self
        vars(self.model)["memory_required"] = self._asked
        self.root = ModelPatcher(self.model, source.load_device, source.offload_device, size=1)
        self._watch(self.root)

    def patcher(self, source: ModelPatcher) -> ModelPatcher:
        """A run's patcher over the proxy, with everything of the source's but what the workers do."""
        patcher = clone_over(source, self.root)
        patcher.patches, patcher.patches_uuid = {}, self.root.patches_uuid
        self._watch(patcher)
        return patcher

    def need(self, latent: Sequence[int]) -> float:
        """Bytes that each worker wants free for a call with a latent of this shape."""
        load = Load.of(Network(self.model.diffusion_model), latent, self.model.get_dtype_inference().itemsize)
        return room_bytes(load, self.plan, self.world)

    def _asked(self, input_shape: Sequence[int], *_args: Any, **_kwargs: Any) -> float:
        """The model's memory_required, which ComfyUI asks while it samples, to put conditionings into one call or not;
        and before that, to make room for it in its own process, which needs none."""
        return 0.0 if self.model.current_patcher is None else self.need(input_shape)

    def _watch(self, patcher: ModelPatcher) -> None:
        patcher.add_callback_with_key(CallbacksMP.ON_DETACH, PLAN_KEY, self._detached)
        vars(patcher)["loaded_size"], vars(patcher)["partially_unload"] = self._held, self._give
        vars(patcher)["get_free_memory"] = lambda device: self.spare

    def _held(self) -> int:
        """Bytes that ComfyUI may ask for without ending the workers: what they have of the model on the device."""
        group = running_group()
        idle = group is not None and group.holder is self and group.resident and not live.workers_are_busy()
        return self.size if idle else 0

    def _give(self, _device: Any, wanted: float, *_rest: Any, **_options: Any) -> float:
        """ComfyUI needs some of its device's memory: workers give theirs, and load again when they sample.

        Raises nothing: ComfyUI is in the middle of its books. It ends workers that give too little; so those on other
        devices, which have nothing to give, are said to have given what is wanted.
        """
        group = running_group()
        if group is not None and not shares(group, self.root.load_device):
            return wanted
        try:
            return group.give_room() if group is not None else 0
        except memory.InterruptProcessingException:
            memory.interrupt_current_processing(True)  # for the next node
        except (GroupError, torch.OutOfMemoryError) as error:
            logger.warning("Skein workers: %s", error)
        return 0

    def _detached(self, _patcher: ModelPatcher, unpatch_all: bool) -> None:
        """ComfyUI has unloaded the model: because somebody asked for it or for memory; or, with --disable-smart-memory,
        because it loads another, and then the workers stay."""
        if not unpatch_all:
            return
        if not memory.DISABLE_SMART_MEMORY or live.workers_are_busy():
            release(holder=self)
        elif self._held():
            self._give(None, 0)


def _take_off(source: ModelPatcher) -> None:
    """Take a model off the GPU that ComfyUI keeps there outside of its books (--highvram): a worker has it there."""
    if source.offload_device.type != "cpu":
        unload(source)
        source.model.to("cpu")
        source.model.device = torch.device("cpu")


def is_proxy(model: Any) -> bool:
    return PROXY_KEY in vars(model) and vars(model)[PROXY_KEY].model is model


def _proxy_of(source: ModelPatcher) -> Proxy:
    kept = vars(source.model)
    if PROXY_KEY not in kept:
        kept[PROXY_KEY] = Proxy(source)
    return kept[PROXY_KEY]


def _without_workers(*_args: Any, **_kwargs: Any) -> None:
    """The proxy's own forward: a run puts its caller in this place."""
    raise RuntimeError("Skein: the weights of this model are in the workers; only Context Parallel's runs may call it.")


def _empty(network: Any) -> None:
    """Tensors without memory in the place of all parameters and buffers, which no move touches."""
    for module in network.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(_hollow(parameter), requires_grad=False)
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else _hollow(buffer)
        vars(module)["_apply"] = lambda function, recurse=True, module=module: module


def _hollow(tensor: Tensor) -> Tensor:
    """One value over and over. Not on the meta device: ComfyUI fills what is there with zeros when it loads a model."""
    return torch.empty((), dtype=tensor.dtype).expand(tensor.shape)


def setting_of(plan: Plan, source: ModelPatcher) -> Setting:
    """Which workers this plan wants. Raises ValueError where there can be none."""
    assert plan.parallel is not None
    devices, heads = visible_devices(plan.parallel.device_names), Network(own_network(source)).heads
    nodes, endpoint = machines()
    chosen = plan.parallel
    degrees = chosen.degrees(len(devices), heads) if nodes == 1 else (chosen.ulysses_degree, chosen.ring_degree)
    return worker_setting(devices, degrees, nodes, endpoint)


def worker_setting(devices: tuple[str, ...], degrees: tuple[int, int], nodes: int = 1, endpoint: str = "") -> Setting:
    """Workers with the options of ComfyUI's own process. Raises ValueError where there can be none."""
    if os.name != "posix":
        raise ValueError("Worker processes need Linux; remove Context Parallel, or decode on ComfyUI's own device.")
    together = torch.distributed.is_available() and torch.distributed.is_nccl_available()
    if "cpu" not in devices and not together:
        raise ValueError(
            "Workers on GPUs need NCCL, which PyTorch has on Linux; remove Context Parallel here, or name "
            "ComfyUI's own device in VAE Decode's devices."
        )
    options = {name: value for name, value in vars(comfy.cli_args.args).items() if _is_json(value)}
    options["fast"] = sorted(feature.value for feature in getattr(comfy.cli_args.args, "fast", None) or ())
    if "cpu" in devices:
        options["cpu"] = True
    folder = str(Path(next(iter(comfy.__path__))).parent)
    return Setting(folder, devices, degrees, json.dumps(options, sort_keys=True), nodes, endpoint)


def _is_json(value: object) -> bool:
    return value is None or isinstance(value, (bool, int, float, str))
