"""Workers keep several models: base and refiner, Wan 2.2's two experts. Real workers on the CPU."""

import gc
import logging
import os
import signal
import time
from pathlib import Path

import comfy.model_management as memory
import comfy.sd
import pytest
import torch
from random_checkpoints import SMALL, random_model, text, with_lora
from skein import engine
from skein.bench.errors import relative_error
from skein.demo.sampling import sample
from skein.patchers import loaded_entries
from skein.plan import FP8Config, ParallelConfig
from skein.workers import group, keeping, release
from skein.workers.proxy import proxy_of
from skein.workers.recipe import recipe_of
from small_models import save_random_hunyuan_video

TWO = ParallelConfig("cpu,cpu")
TOLERANCE = 2e-6


@pytest.fixture(autouse=True)
def _no_workers_left():
    yield
    release()


@pytest.fixture
def two(tmp_path):
    """Two models and what one process makes of each."""
    models = [random_model(tmp_path, 2, torch.float32, seed=seed) for seed in (0, 1)]
    return [(model, sample(model, text(7), **SMALL)) for model in models]


def run(model, **plan):
    return sample(engine.edit(model, parallel=TWO, **plan), text(7), **SMALL)


def loaded_again(model):
    """As by a second node of the same loader."""
    load, arguments, *_ = model.cached_patcher_init
    return load(*arguments)


def right(model, expected):
    return relative_error(run(model), expected) < TOLERANCE


def loads(caplog):
    """How often the workers have loaded a model."""
    return caplog.text.count("Skein workers: 2 ready in")


def has(model):
    return group._group is not None and group._group.models.find(recipe_of(model)) is not None


def unload(model):
    """As ComfyUI does it for one model of several."""
    proxies = [entry for entry in loaded_entries() if entry.model.model is proxy_of(model).model]
    assert len(proxies) == 1
    keep = [entry for entry in loaded_entries() if entry not in proxies]
    memory.free_memory(1e30, proxies[0].device, keep_loaded=keep)


def gone(pids, seconds=5.0):
    deadline = time.monotonic() + seconds
    while any(Path(f"/proc/{pid}").exists() for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_neither_is_loaded_twice(two, caplog):
    caplog.set_level(logging.INFO, "skein")
    for _ in range(2):
        assert all(right(model, expected) for model, expected in two)
    assert loads(caplog) == 2


def test_with_fp8_and_lora_in_turn(two, caplog):
    """What techniques keep of each, and the patches on each, stay apart."""
    caplog.set_level(logging.INFO, "skein")
    (first, _), (second, _) = two
    patched, plan = with_lora(second), dict(fp8=FP8Config())
    alone = []
    for model in (first, patched):
        alone.append(run(model, **plan))
        release()
    before = loads(caplog)
    for _ in range(2):
        assert all(torch.equal(run(model, **plan), one) for model, one in zip((first, patched), alone))
    assert loads(caplog) - before == 2 and relative_error(*alone) > 1e-2


def test_two_loaders_of_one_file_are_one_model_in_the_workers(two, caplog):
    """It goes when ComfyUI has unloaded both."""
    caplog.set_level(logging.INFO, "skein")
    (model, expected), (other, _) = two
    again = with_lora(loaded_again(model))
    patched = sample(again, text(7), **SMALL)
    run(other)
    for _ in range(2):
        assert right(model, expected) and right(again, patched)
    assert loads(caplog) == 2 and relative_error(patched, expected) > 1e-3
    unload(model)
    assert has(model) and right(again, patched)
    unload(again)
    assert not has(model) and has(other)


def test_a_model_that_comfyui_unloads_goes_and_the_other_stays_until_it_is_the_last(two, caplog):
    caplog.set_level(logging.INFO, "skein")
    (first, expected), (second, other) = two
    assert right(first, expected) and right(second, other)
    pids = dict(group._group.pids)
    unload(first)
    assert not has(first) and has(second) and group._group.pids == pids
    assert right(second, other) and loads(caplog) == 2
    assert right(first, expected) and loads(caplog) == 3 and group._group.pids == pids
    memory.unload_all_models()
    assert group._group is None and gone(pids.values())
    assert right(first, expected)


def test_comfyui_is_given_memory_by_all_and_loses_none(two, caplog):
    caplog.set_level(logging.INFO, "skein")
    for model, expected in two:
        assert right(model, expected)
    proxies = [entry for entry in loaded_entries() if entry.model.model is proxy_of(two[0][0]).model]
    assert proxies[0].model_loaded_memory() > 1e6
    assert not proxies[0].model_unload(0) and proxies[0].model_loaded_memory() == 0
    assert all(right(model, expected) for model, expected in two) and loads(caplog) == 2


@pytest.mark.parametrize("smart", [True, False], ids=["", "--disable-smart-memory"])
def test_a_model_stays_when_comfyui_makes_room_for_the_other(two, smart, monkeypatch, caplog):
    """Where there are GPUs it does when it loads the other's proxy: in the run, of which the workers lose nothing."""
    caplog.set_level(logging.INFO, "skein")
    monkeypatch.setattr(memory, "DISABLE_SMART_MEMORY", not smart)
    (first, expected), (second, other) = two
    load, asked = memory.load_models_gpu, []

    def loading(models, *args, **kwargs):
        load(models, *args, **kwargs)
        mine = [entry for entry in loaded_entries() if any(entry.model.is_clone(model) for model in models)]
        with monkeypatch.context() as full:
            free = memory.get_free_memory
            full.setattr(memory, "get_free_memory", lambda *a, torch_free_too=False: (0, 0) if torch_free_too else 0)
            asked.append(group._group.in_use)
            memory.free_memory(1, torch.device("cpu"), keep_loaded=mine)
            full.setattr(memory, "get_free_memory", free)

    assert right(first, expected)
    monkeypatch.setattr(memory, "load_models_gpu", loading)
    for _ in range(2):
        assert right(second, other) and right(first, expected)
    assert loads(caplog) == 2 and asked == [True] * 4


def test_a_model_whose_file_is_overwritten_goes_alone(two, tmp_path, caplog):
    caplog.set_level(logging.INFO, "skein")
    (first, _), (second, other) = two
    run(first), run(second)
    pids, path = dict(group._group.pids), first.cached_patcher_init[1][0]
    save_random_hunyuan_video(tmp_path / "another", 7, 256)
    with open(path, "r+b") as file:
        file.write((tmp_path / "another").read_bytes())
    assert right(second, other)
    with pytest.raises(ValueError, match="was written to while"):
        run(first)
    assert not has(first) and has(second)
    assert right(second, other) and group._group.pids == pids and loads(caplog) == 2
    again = comfy.sd.load_diffusion_model(path)
    assert right(again, sample(again, text(7), **SMALL))


def test_where_the_host_lacks_memory_the_least_recently_used_goes(two, tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO, "skein")
    (first, _), (second, _) = two
    third, plan = random_model(tmp_path, 2, torch.float32, seed=2), dict(fp8=FP8Config())
    alone = sample(engine.edit(third, **plan), text(7), **SMALL)
    run(first, **plan), run(second, **plan)
    before = run(first, **plan)
    monkeypatch.setattr(keeping, "available", lambda: 0 if has(second) else 1 << 40)
    assert relative_error(run(third, **plan), alone) < 1e-2
    assert has(first) and not has(second) and has(third)
    assert torch.equal(run(first, **plan), before) and loads(caplog) == 3
    run(second, **plan)  # there is memory: that of the others
    assert has(first) and has(third)


def test_models_in_their_files_take_no_memory_of_the_host_so_none_goes(two, tmp_path, monkeypatch):
    (first, expected), (second, other) = two
    monkeypatch.setattr(keeping, "available", lambda: 0)
    assert right(first, expected) and right(second, other)
    converted = comfy.sd.load_diffusion_model(first.cached_patcher_init[1][0], {"dtype": torch.bfloat16})
    run(converted)  # lacks memory, of which it gains nothing
    assert has(first) and has(second) and has(converted)
    (key,) = [each.key for each in group._group.models._models if each.recipe == recipe_of(converted)]
    for answer in group._group.ask_all("holdings", {}).values():
        size = memory.module_size(converted.model)
        assert 0.9 * size < answer["models"].pop(key)["host"] <= size
        assert all(each["host"] < 0.02 * size and not each["device"] for each in answer["models"].values())
    right(second, other)
    third = random_model(tmp_path, 2, torch.bfloat16, seed=3)
    run(third)
    assert has(first) and has(second) and has(third) and not has(converted)


@pytest.mark.parametrize(
    ("available", "free", "device", "expected"),
    [
        (100, 40, 30, False),  # the new one fits beside what is on the device
        (100, 0, 30, False),  # what comes off the two devices fits into the host
        (50, 0, 30, True),
        (50, 20, 30, False),  # only so much comes off
        (0, 0, 0, False),  # all of it lies in files
    ],
)
def test_what_comes_off_the_devices_must_fit_into_the_host(available, free, device, expected, monkeypatch):
    monkeypatch.setattr(keeping, "available", lambda: available)
    told = {rank: {"free": free, "models": {7: {"device": device, "host": 1000}}} for rank in (0, 1)}
    assert keeping.lacking(told, keeping.Need(40, 0)) == expected


def interrupted(model, kind, monkeypatch):
    """A run that is interrupted while the workers answer this question."""
    asked = group._group.conversation

    def interrupt_once():
        if [each.kind for each in asked.pending] == [kind]:
            monkeypatch.undo()
            raise memory.InterruptProcessingException

    monkeypatch.setattr(asked, "_check_interrupt", interrupt_once)
    with pytest.raises(memory.InterruptProcessingException):
        run(model)


@pytest.mark.parametrize("kind", ["load", "begin"])
def test_an_interrupted_load_leaves_no_second_model_in_the_workers(two, kind, monkeypatch):
    (first, expected), (second, other) = two
    run(first)
    interrupted(second, kind, monkeypatch)
    assert right(second, other) and right(first, expected)
    assert [len(each["models"]) for each in group._group.ask_all("holdings", {}).values()] == [2, 2]


@pytest.mark.parametrize("kind", ["load", "begin"])
def test_a_model_that_comfyui_has_not_loaded_keeps_no_workers(two, kind, monkeypatch):
    run(two[0][0])
    interrupted(two[1][0], kind, monkeypatch)
    memory.unload_all_models()
    assert group._group is None


def test_loading_a_file_again_and_again_in_comfyui_keeps_one_model(two, caplog):
    """As where ComfyUI caches nothing (--cache-none)."""
    caplog.set_level(logging.INFO, "skein")
    (first, expected), (second, _) = two
    run(first), run(second)
    for _ in range(3):
        again = loaded_again(first)
        assert right(again, expected)
    gc.collect()
    held = group._group.models.last
    assert loads(caplog) == 2 and set(held.proxies) == {proxy_of(first), proxy_of(again)}


def test_models_that_nobody_has_any_more_go_when_another_is_loaded(two, tmp_path):
    (first, _), (second, _) = two
    again = loaded_again(first)
    run(first), run(again), run(second)
    unload(again)
    assert has(first)
    two[0] = first = None
    gc.collect()
    run(random_model(tmp_path, 2, torch.float32, seed=2))
    assert not has(again) and has(second)


def test_a_worker_killed_between_two_samplers(two, caplog):
    (first, expected), (second, other) = two
    for model, one in ((second, other), (first, expected)):
        run(first)
        pids = dict(group._group.pids)
        os.kill(pids[1], signal.SIGKILL)
        assert gone([pids[1]])
        assert right(model, one) and "ended since the last run; starting new ones" in caplog.text
        assert gone(pids.values())
        caplog.clear()
