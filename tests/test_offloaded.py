"""Blocks whose weights are not on the device (offloading.py)."""

import threading
from types import SimpleNamespace

import comfy.model_management as memory
import pytest
import skein.offloaded
import skein.patchers
import torch
from comfy.patcher_extension import WrappersMP
from loras import with_lora
from offloading import Offloading
from skein import engine, live
from skein.demo.sampling import sample
from skein.models import Network
from skein.patchers import take_off_unless_beside, take_off_weights
from skein.plan import AttentionConfig, CacheConfig, CompileConfig, FP8Config, Plan, SlicesConfig
from skein.report import recent_runs
from skein.techniques import Sampling, _fetching
from skein.units import bytes_text
from torch._dynamo.utils import counters

SMALL = dict(shape=(1, 16, 3, 8, 8), steps=2)
FP8 = {"fp8": FP8Config(), "attention": AttentionConfig(kernel="stock")}
COMPILED = {"compile": CompileConfig(warm_up=False)}
LAST_LAYERS = [
    "double_blocks.0.txt_mlp.2",
    "double_blocks.1.txt_mlp.2",
    "single_blocks.0.linear2",
    "single_blocks.1.linear2",
]
PATHS = ["double_blocks.0", "double_blocks.1", "single_blocks.0", "single_blocks.1"]


@pytest.fixture
def offloading(monkeypatch):
    return Offloading(monkeypatch)


@pytest.mark.parametrize("plan", [FP8, COMPILED, {**FP8, "slices": SlicesConfig(2)}], ids=["fp8", "compiled", "slices"])
def test_each_weight_comes_once_a_call(tiny_model, offloading, plan):
    patcher = engine.edit(tiny_model, **plan)
    whole = sample(patcher, "a red circle", **SMALL)
    assert torch.equal(sample(offloading.put_on(patcher), "a red circle", **SMALL), whole)
    assert len(offloading.fetched) == len(offloading.host) == 2 * len(set(map(id, offloading.host.values())))
    size = bytes_text(sum(weight.nbytes for weight in offloading.host.values()) / 2)
    said = live.snapshot()["sampling"]["notes"]["offloaded"]
    assert said.startswith(f"{size} of the blocks' {size} of weights stay in the computer's memory")


def test_pinned_weights_come_while_the_block_before_runs(tiny_model, offloading, monkeypatch):
    monkeypatch.setattr(skein.offloaded._Coming, "quick", True)
    offloading.hooked = dict(zip(PATHS, LAST_LAYERS))
    sample(offloading.put_on(engine.edit(tiny_model, **FP8)), "a red circle", **SMALL)
    one_call = ["begun"]
    for path in PATHS[:-1]:
        one_call += ["came", "begun", path]
    assert offloading.log == 2 * [*one_call, "came", PATHS[-1]]


def test_weights_that_are_not_pinned_are_copied_once_the_block_before_has_started(tiny_model, offloading):
    """CUDA may make such copies at once, and start the block after them."""
    offloading.hooked = dict(zip(PATHS, LAST_LAYERS))
    sample(offloading.put_on(engine.edit(tiny_model, **FP8)), "a red circle", **SMALL)
    one_call = [each for path in PATHS for each in ("begun", "came", path)]
    assert offloading.log == 2 * one_call


class Full:
    """A block's layer for which memory runs out, the first so many times."""

    def __init__(self, times):
        self.times, self.calls = times, 0

    def __call__(self, executor, *args, **kwargs):
        layer = executor.class_obj.diffusion_model.get_submodule(LAST_LAYERS[1])
        with layer.register_forward_pre_hook(self.hook):
            return executor(*args, **kwargs)

    def hook(self, _layer, _inputs):
        self.calls += 1
        if self.calls <= self.times:
            raise torch.OutOfMemoryError("full")


@pytest.mark.parametrize("cache", [{}, {"cache": CacheConfig(threshold=0.9)}], ids=["", "cache"])
def test_a_call_for_which_memory_runs_out_is_made_again_with_all_weights_off_the_device(
    tiny_model, cache, caplog, monkeypatch
):
    patcher, full, loaded = engine.edit(tiny_model, **FP8, **cache), Full(1), []

    def take_off(run):
        before = run.loaded_size()
        take_off_weights(run)
        loaded.append((before, run.loaded_size()))

    monkeypatch.setattr(skein.offloaded, "take_off_weights", take_off)
    six = {**SMALL, "steps": 6}
    whole = sample(patcher, "a red circle", **six)
    record = recent_runs()[-1] if cache else None
    patcher.add_wrapper(WrappersMP.APPLY_MODEL, full)
    with caplog.at_level("WARNING", "skein"):
        assert torch.equal(sample(patcher, "a red circle", **six), whole)
    assert caplog.text.count(skein.offloaded.RAN_OUT) == 1
    ((before, after),) = loaded
    assert after < before / 10
    if record is not None:
        again = recent_runs()[-1]
        assert again.reused == record.reused > 0 and full.calls == 6 - again.reused + 1
        assert [call.reused for call in again.calls] == [call.reused for call in record.calls]


def test_a_call_for_which_memory_runs_out_once_more_ends_the_run(tiny_model):
    patcher, full = engine.edit(tiny_model, **FP8), Full(2)
    whole = sample(patcher, "a red circle", **SMALL)
    patcher.add_wrapper(WrappersMP.APPLY_MODEL, full)
    with pytest.raises(torch.OutOfMemoryError, match="full"):
        sample(patcher, "a red circle", **SMALL)
    assert full.calls == 2
    assert torch.equal(sample(patcher, "a red circle", **SMALL), whole)  # and the next one runs as ever


def test_weights_leave_the_device_where_a_run_has_no_room_beside_them(tiny_model, monkeypatch):
    memory.load_models_gpu([tiny_model])
    size, whole = tiny_model.loaded_size(), sample(tiny_model, "a red circle", **SMALL)
    own = tiny_model.load_device
    monkeypatch.setattr(tiny_model, "load_device", torch.device("cuda"))
    monkeypatch.setattr(skein.patchers, "room_of", lambda device: size + 1000)
    take_off_unless_beside(tiny_model, 1000)
    assert tiny_model.loaded_size() == size > 0
    take_off_unless_beside(tiny_model, 1001)
    assert tiny_model.loaded_size() < size / 10
    monkeypatch.setattr(tiny_model, "load_device", own)
    assert torch.equal(sample(tiny_model, "a red circle", **SMALL), whole)


def test_before_comfyui_loads_a_run_tells_what_it_needs(tiny_model, monkeypatch):
    needs = []
    monkeypatch.setattr("skein.techniques.take_off_unless_beside", lambda patcher, work: needs.append((patcher, work)))
    patcher = engine.edit(tiny_model, **COMPILED)
    sample(patcher, "a red circle", **{**SMALL, "steps": 1})
    ((run, work),) = needs
    assert run.model is tiny_model.model and work > tiny_model.model.memory_required(SMALL["shape"])


@pytest.mark.parametrize(("world", "again"), [(1, True), (2, False)])
def test_of_several_processes_none_makes_a_call_again(tiny_model, world, again):
    """The others would wait for it."""
    guider = SimpleNamespace(model_patcher=tiny_model, model_options=tiny_model.model_options)
    run = Sampling(Plan(**FP8), guider, SimpleNamespace(world=world))
    with _fetching(run):
        assert (run.offloaded.patcher is tiny_model) == again


def test_blocks_on_the_device_are_left_alone(tiny_model, offloading):
    offloading.paths = PATHS[2:3]
    patcher = engine.edit(tiny_model, **FP8)
    whole = sample(patcher, "a red circle", **SMALL)
    assert torch.equal(sample(offloading.put_on(patcher), "a red circle", **SMALL), whole)
    assert offloading.log == 2 * ["begun", "came"]


def test_a_reused_call_has_no_more_than_two_blocks_come(tiny_model, offloading):
    """The first, by which the cache decides, and the one that was on its way meanwhile."""
    patcher = engine.edit(tiny_model, cache=CacheConfig(threshold=0.9), **FP8)
    sample(offloading.put_on(patcher), "a red circle", **{**SMALL, "steps": 6})
    record = recent_runs()[-1]
    assert record.reused > 0
    assert offloading.log.count("begun") == offloading.log.count("came") == 4 * (6 - record.reused) + 2 * record.reused


def test_where_memory_is_short_nothing_comes_ahead(tiny_model, offloading, monkeypatch):
    """Here there is room for the weights of one block."""
    patcher, empty_like = engine.edit(tiny_model, **FP8), torch.empty_like
    whole = sample(patcher, "a red circle", **SMALL)

    def in_little_memory(weight, **options):
        if weight.is_meta and offloading.log[-1:] == ["came"]:  # and the block has not run
            raise torch.OutOfMemoryError("full")
        return empty_like(weight, **options)

    monkeypatch.setattr(torch, "empty_like", in_little_memory)
    offloading.hooked = dict(zip(PATHS, LAST_LAYERS))
    assert torch.equal(sample(offloading.put_on(patcher), "a red circle", **SMALL), whole)
    assert offloading.log == 2 * [each for path in PATHS for each in ("begun", "came", path)]


def test_an_error_in_the_middle_leaves_nothing(tiny_model, offloading, monkeypatch):
    patcher = engine.edit(tiny_model, **FP8)
    whole = sample(patcher, "a red circle", **SMALL)

    def unreadable(target, source):
        if offloading.path_of[source] == PATHS[2]:
            raise OSError("the disk is gone")
        offloading.copy(target, source)

    offloaded = offloading.put_on(patcher)
    with monkeypatch.context() as for_now:
        for_now.setattr(skein.offloaded, "copy", unreadable)
        with pytest.raises(OSError, match="the disk is gone"):
            sample(offloaded, "a red circle", **SMALL)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("skein-weights")]

    def stop(step, *_):
        raise KeyError(step)

    with pytest.raises(KeyError):
        sample(offloaded, "a red circle", **SMALL, callback=stop)
    offloading.log.clear()
    assert torch.equal(sample(offloaded, "a red circle", **SMALL), whole)
    assert offloading.log.count("begun") == offloading.log.count("came") == 8


@pytest.mark.parametrize("more", [-1, 1000], ids=["as ComfyUI reckons", "as we do"])
def test_comfyui_keeps_room_for_the_call_and_two_blocks_during_the_run_only(tiny_model, more, monkeypatch):
    model, asked = tiny_model.model, []
    before = model.memory_required(SMALL["shape"])
    monkeypatch.setattr("skein.techniques.room_bytes", lambda load, plan: before + more)

    def look(executor, *args, **kwargs):
        asked.append(model.memory_required(SMALL["shape"], cond_shapes={}))
        return executor(*args, **kwargs)

    patcher = engine.edit(tiny_model, **COMPILED)
    patcher.add_wrapper_with_key(WrappersMP.PREPARE_SAMPLING, "look", look)
    sample(patcher, "a red circle", **SMALL)
    blocks = [sum(w.nbytes for w in each.module.parameters()) for each in Network(model.diffusion_model).blocks]
    assert asked == [before + max(more, 0) + 2 * max(blocks)] and model.memory_required(SMALL["shape"]) == before


def test_partly_loaded_by_comfyui_blocks_make_no_other_graph(tiny_model, monkeypatch):
    """ComfyUI marks the layers that it leaves off the device, and these then cast their weights in each call."""
    patcher = engine.edit(tiny_model, attention=AttentionConfig(), **COMPILED)
    whole, graphs = sample(patcher, "a red circle", **SMALL), counters["stats"]["unique_graphs"]
    for part in (0.7, 0.3, 0.01):
        patcher.detach()
        patcher.partially_load(torch.device("cpu"), int(patcher.model_size() * part))
        assert patcher.model.model_lowvram
        with monkeypatch.context() as as_it_is:
            as_it_is.setattr(memory, "load_models_gpu", lambda *a, **k: None)
            assert torch.equal(sample(patcher, "a red circle", **SMALL), whole)
    patcher.detach()
    assert torch.equal(sample(patcher, "a red circle", **SMALL), whole)
    assert counters["stats"]["unique_graphs"] == graphs


def test_what_comfyui_has_pinned_stays_pinned_between_runs(tiny_model, monkeypatch):
    """Until the model goes off the device, or its weights are others."""
    pinned, begun, layers = set(), [], [f"diffusion_model.{layer}" for layer in LAST_LAYERS]

    def pin(weight):
        pinned.add(weight.data_ptr())
        return True

    def load(models, **options):
        begun.append(len(pinned))
        for patcher in models:
            if not any(patcher.is_clone(entry.model) for entry in memory.current_loaded_models):
                memory.current_loaded_models.insert(0, memory.LoadedModel(patcher))
                memory.current_loaded_models[0].model_load(patcher.model_size() // 3)

    monkeypatch.setattr(memory, "pin_memory", pin)
    monkeypatch.setattr(memory, "unpin_memory", lambda weight: pinned.discard(weight.data_ptr()))
    patcher = engine.edit(tiny_model, **FP8)
    sample(patcher, "a red circle", **SMALL)
    memory.unload_all_models()
    with monkeypatch.context() as partly:
        partly.setattr(memory, "load_models_gpu", load)
        whole = sample(patcher, "a red circle", **SMALL)
        assert torch.equal(sample(patcher, "a red circle", **SMALL), whole)
        assert begun[0] == 0 and begun[1] > 0 and len(pinned) == begun[1]
        sample(engine.edit(with_lora(tiny_model, 1.0, layers, bias=True), **FP8), "a red circle", **SMALL)
    memory.unload_all_models()
    assert not pinned
