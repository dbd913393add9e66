"""Several worker processes give what one process gives, on the CPU: real workers, real messages, gloo.

Ordered by group, because starting one takes seconds; within a group another checkpoint is loaded in place.
"""

import functools
import os
import re
import sys
from pathlib import Path
from types import MethodType, SimpleNamespace
from unittest import mock

import comfy.model_management as memory
import comfy.samplers
import pytest
import torch
from comfy.patcher_extension import WrappersMP
from comfy_extras.nodes_easycache import EasyCacheNode
from random_checkpoints import SMALL, random_model, text, with_lora
from skein import engine, live
from skein.bench.errors import relative_error
from skein.demo.sampling import sample
from skein.plan import AttentionConfig, CacheConfig, CompileConfig, FP8Config, ParallelConfig, SparseConfig
from skein.report import recent_runs
from skein.workers import GroupError, release
from skein.workers.delegation import _take_off
from skein.workers.group import running_group
from skein.workers.proxy import proxy_of
from skein.workers.room import clear_own
from small_models import HUNYUAN_VIDEO_15, around_each_call, around_the_text

TOLERANCE = 2e-6
GROUPS = {  # processes, ulysses degree, heads that so many can share
    "1": (1, 0, (2,)),
    "2": (2, 0, (2, 3, 6)),
    "ring of 2": (2, 1, (2,)),
    "3": (3, 0, (3, 4)),
    "ring of 3": (3, 1, (2,)),
    "4": (4, 0, (4, 6)),
    "2 x 2": (4, 2, (2, 3)),
}
CASES = {
    **{f"text of {n}": dict(positive=text(n)) for n in (1, 7, 255, 256, 257)},
    "one frame": dict(positive=text(7), shape=(1, 16, 1, 8, 6)),
    "nine latent frames": dict(positive=text(7), shape=(1, 16, 9, 4, 6)),
    "five tokens": dict(positive=text(7), shape=(1, 16, 1, 2, 10)),
    "guidance and a batch": dict(
        positive=text(7), negative=text(5, seed=4), cfg=3.0, latent=torch.zeros(2, 16, 3, 8, 6)
    ),
    "token replacement": dict(positive=text(7, guiding_frame_index=0)),
    "a reference": dict(positive=text(7, ref_latent=torch.ones(1, 16, 1, 8, 6))),
}


@pytest.fixture(scope="module", autouse=True)
def _no_workers_left():
    yield
    release()


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    with torch.inference_mode():
        folder = tmp_path_factory.mktemp("checkpoints")
        return functools.cache(functools.partial(random_model, folder))


@pytest.fixture(scope="module", params=list(GROUPS))
def group(request):
    """(What puts the plan on a model, heads)."""
    count, ulysses, heads = GROUPS[request.param]
    config = ParallelConfig(",".join(["cpu"] * count), ulysses_degree=ulysses)
    return lambda model, **plan: engine.edit(model, parallel=config, **plan), heads


def both(parallel, model, arguments, **plan):
    """The result in one process and in the workers."""
    arguments = {"positive": text(7), **SMALL, **arguments}
    return sample(engine.edit(model, **plan), **arguments), sample(parallel(model, **plan), **arguments)


@pytest.mark.parametrize("case", list(CASES))
def test_the_workers_compute_what_one_process_computes(group, models, case):
    parallel, heads = group
    for count in heads if case == "text of 7" else heads[:1]:
        one, many = both(parallel, models(count), CASES[case])
        assert relative_error(many, one) < TOLERANCE, count


def test_lora(group, models):
    """Strengths change between runs, and no LoRA is left when there is none."""
    parallel, heads = group
    model, results = models(heads[0]), []
    for strength in (1.0, -0.5, None, 1.0):
        patched = with_lora(model, strength) if strength else model
        one, many = both(parallel, patched, {})
        assert relative_error(many, one) < TOLERANCE
        results.append(many)
    assert torch.equal(results[0], results[3]) and relative_error(results[0], results[2]) > 1e-3


@pytest.mark.parametrize("settings", [dict(threshold=0.4), dict(reuse_share=0.5)], ids=["threshold", "share"])
def test_the_cache_decides_as_in_one_process(group, models, settings):
    parallel, heads = group
    model, arguments = models(heads[0]), dict(steps=12, shape=(1, 16, 3, 12, 10))
    plan = dict(cache=CacheConfig(start_percent=0.1, **settings))
    runs = []
    for build in (lambda: engine.edit(model, **plan), lambda: parallel(model, **plan)):
        runs.append((sample(build(), text(7), **arguments), recent_runs()[-1]))
    (one, alone), (many, shared) = runs
    assert shared is not alone and [call.reused for call in shared.calls] == [call.reused for call in alone.calls]
    assert shared.reused == 6 or (not shared.share and 0 < shared.reused < 12)
    assert shared.share == alone.share and relative_error(many, one) < 1e-4


def test_sparse_attention_chooses_as_in_one_process(group, models):
    """Blocks, errors and the picture; where the devices form a ring, all is dense, and the node says so."""
    parallel, heads = group
    plan = dict(sparse=SparseConfig(0.2, start_percent=0.3, min_tokens=1))
    arguments = dict(steps=4, shape=(1, 16, 3, 24, 20), positive=text(9))
    for count in heads:
        model = models(count)
        one, alone = sample(engine.edit(model, **plan), **arguments), live.sparse_runs()[-1]
        many, shared = sample(parallel(model, **plan), **arguments), live.sparse_runs()[-1]
        if "ring" in live.snapshot()["sampling"]["notes"]["sparse"]:
            dense = sample(model, **arguments)
            assert shared is alone and relative_error(many, dense) < TOLERANCE < relative_error(one, dense)
            continue
        assert shared is not alone and shared.ended and [call.sparse for call in shared.calls][-1] == 4
        for call, other in zip(shared.calls, alone.calls, strict=True):
            assert (call.step, call.sparse) == (other.step, other.sparse)
            assert call.density == pytest.approx(other.density) and call.error == pytest.approx(other.error, abs=1e-4)
        assert shared.density < 0.95 and relative_error(many, one) < 1e-4
        assert [layer.path for layer in shared.layers] == [layer.path for layer in alone.layers]
        assert all(len(layer.density) == count for layer in shared.layers)


def with_softer_input(model):
    """Guidance by a second call in a step, which differs from the first by its input only."""

    def after(args):
        (soft,) = comfy.samplers.calc_cond_batch(
            args["model"], [args["cond"]], 0.9 * args["input"], args["sigma"], args["model_options"]
        )
        return args["denoised"] + args["cond_denoised"] - soft

    model = model.clone()
    model.set_model_sampler_post_cfg_function(after)
    return model


def test_the_cache_tells_calls_of_one_evaluation_apart_as_in_one_process(models):
    model, arguments = with_softer_input(models(2)), dict(steps=12, shape=(1, 16, 3, 12, 10))
    workers, runs = ParallelConfig("cpu,cpu"), []
    for parallel in (None, workers):
        edited = engine.edit(model, cache=CacheConfig(threshold=0.4, start_percent=0.1), parallel=parallel)
        runs.append((sample(edited, text(7), **arguments), recent_runs()[-1]))
    (one, alone), (many, shared) = runs
    assert [call.parts for call in alone.calls] == [[0], [1]] * 12
    assert [(call.parts, call.reused) for call in shared.calls] == [(call.parts, call.reused) for call in alone.calls]
    assert 0 < shared.reused < 24 and relative_error(many, one) < 1e-4


def test_a_threshold_of_0_is_no_cache_that_another_could_not_stand_beside(models):
    model = engine.edit(models(2), cache=CacheConfig(threshold=0), parallel=ParallelConfig("cpu,cpu"))
    beside = EasyCacheNode.execute(model, 0.2, 0.15, 0.95, False)[0]
    assert torch.isfinite(sample(beside, text(7), **SMALL)).all()
    with pytest.raises(ValueError, match="EasyCache and First-Block Cache cannot work"):
        sample(engine.edit(beside, cache=CacheConfig()), text(7), **SMALL)


def test_padded_text_and_a_mask_with_holes(group, models):
    parallel, heads = group
    model, mask = models(heads[0]), torch.ones(1, 9, dtype=torch.long)
    mask[0, 5:] = 0
    one, many = both(parallel, model, dict(positive=text(9, attention_mask=mask.clone())), attention=AttentionConfig())
    assert relative_error(many, one) < TOLERANCE
    mask[0, 8] = 1
    holes = dict(positive=text(9, attention_mask=mask))
    if parallel(model).get_attachment("skein").parallel.ulysses_degree in (1, 2):
        with pytest.raises(ValueError, match=r"set ring_degree to 1\.$"):
            both(parallel, model, holes)
    else:
        one, many = both(parallel, model, holes)
        assert relative_error(many, one) < TOLERANCE


def test_fp8_and_compiled_blocks_in_the_workers(models):
    """The plan is applied in each worker; FP8 rounds each token by itself, so sharing the tokens changes little."""
    plan = dict(attention=AttentionConfig(), fp8=FP8Config(), compile=CompileConfig())
    model, two = models(2), ParallelConfig("cpu,cpu")
    one, many = both(lambda model, **plan: engine.edit(model, parallel=two, **plan), model, {}, **plan)
    stock = sample(model, text(7), **SMALL)
    assert relative_error(many, one) < 0.2 * relative_error(one, stock) and relative_error(one, stock) > 1e-3


@pytest.mark.parametrize(
    "error", [GroupError("gone"), torch.OutOfMemoryError("full"), memory.InterruptProcessingException()]
)
def test_workers_that_give_no_memory_are_ended_and_comfyuis_books_are_right(models, error, monkeypatch):
    """What fails is raised for them: ComfyUI asks in the middle of a loop that has unloaded others."""
    model, two = models(2), ParallelConfig("cpu,cpu")
    one = sample(model, text(7), **SMALL)
    sample(engine.edit(model, parallel=two), text(7), **SMALL)
    asked, workers = [], running_group()

    def fail():
        asked.append(error)
        raise error

    clear_own(torch.device("cpu"))
    monkeypatch.setattr(workers, "give_room", fail)
    monkeypatch.setattr(memory, "get_free_memory", lambda *_, **__: 0)
    memory.free_memory(1, torch.device("cpu"))
    monkeypatch.undo()
    interrupted = memory.processing_interrupted()
    memory.interrupt_current_processing(False)
    assert asked and running_group() is None
    assert interrupted == isinstance(error, memory.InterruptProcessingException)
    memory.cleanup_models_gc()
    assert relative_error(sample(engine.edit(model, parallel=two), text(7), **SMALL), one) < TOLERANCE


def test_the_proxy_takes_no_memory(models):
    """Also after ComfyUI has loaded it, which fills what it finds on the meta device."""
    model = models(2)
    sample(engine.edit(model, parallel=ParallelConfig("cpu,cpu")), text(7), **SMALL)
    network = running_group().models.last.proxy.model.diffusion_model
    assert [each.shape for each in network.parameters()] == [
        each.shape for each in model.model.diffusion_model.parameters()
    ]
    held = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in network.parameters()}
    assert sum(held.values()) < 1 << 20


def test_conditionings_share_a_call_where_the_workers_have_memory_for_it(models, monkeypatch):
    model, guided = models(2), dict(positive=text(7), negative=text(7, seed=4), cfg=3.0, **SMALL)
    one, calls = sample(model, **guided), []
    for need in (0.0, 1e18):
        monkeypatch.setattr("skein.workers.proxy.room_bytes", lambda *_, need=need: need)
        many = sample(engine.edit(model, parallel=ParallelConfig("cpu,cpu")), **guided)
        assert relative_error(many, one) < TOLERANCE
        calls.append(running_group().last_run["calls"])
        proxy = running_group().models.last.proxy
        assert proxy.model.memory_required(SMALL["shape"]) == 0  # for ComfyUI's own process, when it does not sample
    assert calls[1] == 2 * calls[0]


def test_workers_outlive_the_next_model_where_comfyui_unloads_all_that_it_does_not_run(models, monkeypatch):
    """--disable-smart-memory."""
    model, two = models(2), ParallelConfig("cpu,cpu")
    one = sample(model, text(7), **SMALL)
    monkeypatch.setattr(memory, "DISABLE_SMART_MEMORY", True)
    sample(engine.edit(model, parallel=two), text(7), **SMALL)
    workers = running_group()
    memory.free_memory(1, torch.device("cpu"))
    assert running_group() is workers and not workers.models.on_devices
    assert relative_error(sample(engine.edit(model, parallel=two), text(7), **SMALL), one) < TOLERANCE
    assert running_group() is workers


def test_workers_on_other_devices_than_comfyuis_are_left_alone_when_that_is_short(models, monkeypatch):
    """There are two kinds of device, which cannot be here."""
    model, other = models(2), models(3)
    for module in ("delegation", "proxy"):
        monkeypatch.setattr(f"skein.workers.{module}.shares", lambda group, device: False)
    memory.load_models_gpu([other])
    sample(engine.edit(model, parallel=ParallelConfig("cpu,cpu")), text(7), **SMALL)
    assert any(entry.model is other for entry in memory.current_loaded_models)
    workers = running_group()
    monkeypatch.setattr(memory, "get_free_memory", lambda _, torch_free_too=False: (0, 0) if torch_free_too else 0)
    memory.free_memory(1, torch.device("cpu"))
    assert running_group() is workers and workers.models.on_devices


def test_a_method_that_another_pack_has_put_on_the_model_is_refused(models):
    """As guiders that change a model's forward do while they sample."""
    model, network = models(2), models(2).model.diffusion_model
    network.forward = MethodType(lambda self, *args, **kwargs: type(self).forward(self, *args, **kwargs), network)
    try:
        with pytest.raises(ValueError, match="Another node has replaced the forward of the model's HunyuanVideo"):
            sample(engine.edit(model, parallel=ParallelConfig("cpu,cpu")), text(7), **SMALL)
    finally:
        del network.forward


@pytest.mark.parametrize("name", ["double_blocks", "forward_orig"])
def test_what_another_pack_puts_on_the_model_around_each_call_is_refused(models, name):
    source = models(2).clone()
    source.set_model_unet_function_wrapper(around_each_call(source.model.diffusion_model, name))
    with pytest.raises(ValueError, match=r"changes the model's own code .* Context Parallel cannot work"):
        sample(engine.edit(source, parallel=ParallelConfig("cpu,cpu")), text(7), **SMALL)


def test_what_another_pack_puts_on_the_proxy_is_refused(models):
    """As wrappers do that are applied after Context Parallel, and change the network that they find when it samples."""

    def on_what_is_there(executor, *args, **kwargs):
        network = executor.class_obj.model_patcher.model.diffusion_model
        with mock.patch.object(network, "forward_orig", lambda *args, **kwargs: None):
            return executor(*args, **kwargs)

    parallel = engine.edit(models(2), parallel=ParallelConfig("cpu,cpu"))
    parallel.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, "another pack", on_what_is_there)
    with pytest.raises(ValueError, match=r"changes the model's own code .* Context Parallel cannot work"):
        sample(parallel, text(7), **SMALL)


def test_a_guider_with_a_second_model_is_refused(models):
    """Its calls come with the first model's options, as ComfyUI's Dual Model CFG Guider makes them."""
    model, second = models(2).clone(), models(3)

    def call_second(executor, *args, **kwargs):
        executor.class_obj = second.model
        return executor(*args, **kwargs)

    model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "second", call_second)
    for plan in (dict(parallel=ParallelConfig("cpu,cpu")), dict(compile=CompileConfig())):
        with pytest.raises(ValueError, match="a guider has two models"):
            sample(engine.edit(model, **plan), text(7), **SMALL)


def test_a_model_that_comfyui_keeps_on_the_gpu_leaves_it(models, monkeypatch):
    """--highvram, without a GPU: what is told to move is what is seen."""
    model = models(2).clone()
    monkeypatch.setattr(model, "offload_device", SimpleNamespace(type="cuda"))
    moves = []
    monkeypatch.setattr(model.model, "to", moves.append)
    for _ in range(2):  # ComfyUI may have loaded it again between two runs
        _take_off(model)
    assert moves.count("cpu") == 2


def test_hunyuan_video_15(models):
    """Double blocks only, and tokens of byt5 and of an image around the text."""
    model, two = models(2, **HUNYUAN_VIDEO_15), ParallelConfig("cpu,cpu")
    arguments = dict(positive=text(9, **around_the_text()), shape=(1, 32, 3, 5, 6))
    for plan in ({}, dict(attention=AttentionConfig())):
        one, many = both(lambda model, **plan: engine.edit(model, parallel=two, **plan), model, arguments, **plan)
        assert relative_error(many, one) < TOLERANCE


def test_the_fastest_arrangement_is_measured_and_told(models, caplog):
    with caplog.at_level("INFO", logger="skein"):
        sample(engine.edit(models(4), parallel=ParallelConfig("cpu,cpu,cpu,cpu")), text(7), **SMALL)
    told = re.search(r"Ulysses \d x ring \d \(an attention with (.*)\)", caplog.text)
    assert told and [re.search(r"Ulysses (\d)", each)[1] for each in told[1].split(", ")] == ["4", "2", "1"]


def test_every_rank_tells_what_exchanges_took(models):
    sample(engine.edit(models(2), parallel=ParallelConfig("cpu,cpu")), text(7), **SMALL)
    run = running_group().last_run
    assert len(run["exchange_s"]) == 2 and all(0 < seconds < run["call_s"] for seconds in run["exchange_s"])
    shares = [process["exchange_share"] for process in live.snapshot()["processes"]]
    assert [share for share in shares if share] == [seconds / run["call_s"] for seconds in run["exchange_s"]]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_processors_are_divided_among_the_workers(models, monkeypatch):
    """Also those that compile: each worker would have as many processes for that as there are processors."""
    monkeypatch.delenv("TORCHINDUCTOR_COMPILE_THREADS", raising=False)
    release()
    sample(engine.edit(models(2), parallel=ParallelConfig("cpu,cpu")), text(7), **SMALL)
    for pid in running_group().pids.values():
        environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        share = max(os.cpu_count() // 2, 1)
        assert f"TORCHINDUCTOR_COMPILE_THREADS={min(share, 32)}".encode() in environment


def test_a_mask_goes_through_no_ring_whatever_was_fastest_without_one(models):
    mask = torch.ones(1, 9, dtype=torch.long)
    mask[0, 5:8] = 0
    model, four = models(4), ParallelConfig("cpu,cpu,cpu,cpu")
    for positive in (text(9), text(9, attention_mask=mask)):
        one, many = both(lambda model, **plan: engine.edit(model, parallel=four, **plan), model, {"positive": positive})
        assert relative_error(many, one) < TOLERANCE


def test_this_process_makes_room_for_calls_where_they_need_it(models, monkeypatch):
    model, other = models(2), models(3)

    def run():
        sample(engine.edit(model, parallel=ParallelConfig("cpu,cpu")), text(7), **SMALL)
        return any(entry.model is other for entry in memory.current_loaded_models)

    run()
    memory.load_models_gpu([other])
    assert run()  # the workers have their model, and there is room for calls
    monkeypatch.setattr("skein.workers.proxy.room_bytes", lambda *_: 1e18)
    assert not run()


def test_the_proxy_is_asked_for_memory_as_comfyui_asks_its_models(models, monkeypatch):
    """By name, by place, and with what next month's ComfyUI hands over too."""
    proxy, shape = proxy_of(models(2)), [2, 16, 3, 8, 6]
    assert proxy.root.memory_required(shape) == 0  # to make room in this process
    monkeypatch.setitem(vars(proxy.model), "current_patcher", proxy.root)  # it samples
    asked = proxy.model.memory_required
    assert proxy.root.memory_required(shape) == asked(shape, cond_shapes={}) == proxy.need(shape) > 0
    assert asked(input_shape=shape, cond_shapes={}, memory_efficient_attention=True) == proxy.need(shape)
