"""A checkpoint that changes on disk: workers have the model that ComfyUI's process has, or there is a sentence."""

import logging
import os
import threading
import time

import comfy.sd
import pytest
import torch
from random_checkpoints import SMALL, random_model, text
from skein import engine
from skein.bench.errors import relative_error
from skein.demo.sampling import load_demo_model, sample
from skein.plan import ParallelConfig
from skein.workers import GroupError, group, release
from skein.workers.recipe import recipe_of
from small_models import save_random_hunyuan_video

TWO = ParallelConfig("cpu,cpu")
TOLERANCE = 2e-6
SLOW = dict(shape=(1, 16, 9, 48, 48), steps=3)  # seconds a step


@pytest.fixture(scope="module", autouse=True)
def _no_workers_left():
    yield
    release()


@pytest.fixture
def model(tmp_path):
    """One process's model and its result; its weights are in this process's memory, wherever the file goes."""
    return random_model(tmp_path, 2, torch.float32)


def file_of(model):
    return model.cached_patcher_init[1][0]


def run(model, **arguments):
    return sample(engine.edit(model, parallel=TWO), **{"positive": text(7), **SMALL, **arguments})


def another(folder, seed=1):
    """Another checkpoint of the same shapes: as long, with the same header."""
    path = folder / "another.safetensors"
    save_random_hunyuan_video(path, seed, 256)
    return path


def replace(model, folder):
    os.replace(another(folder), file_of(model))


def overwrite(model, folder):
    content = another(folder).read_bytes()
    with open(file_of(model), "r+b") as file:
        file.write(content)


def overwrite_and_remove(model, folder):
    overwrite(model, folder)
    os.remove(file_of(model))


def truncate(model, folder):
    os.truncate(file_of(model), 4096)


def remove(model, folder):
    os.remove(file_of(model))


def refused_at_once(model, words):
    """Refused with these words, and before anything is started or asked."""
    running, started = group._group, time.monotonic()
    with pytest.raises(ValueError, match=words):
        run(model)
    assert time.monotonic() - started < 2 and group._group is running


@pytest.mark.parametrize(("change", "words"), [(replace, "has changed on disk"), (remove, "is no longer there")])
def test_replaced_or_removed_the_workers_that_have_it_go_on_and_no_others_start(model, tmp_path, change, words, caplog):
    expected = sample(model, text(7), **SMALL)
    before = run(model)
    pids = dict(group._group.pids)
    change(model, tmp_path)
    caplog.set_level(logging.WARNING, "skein")
    for _ in range(2):
        assert torch.equal(run(model), before) and group._group.pids == pids
    assert relative_error(before, expected) < TOLERANCE and words in caplog.text
    release()
    refused_at_once(model, f"{words}.*Unload Models and Execution Cache")
    assert group._group is None
    assert torch.equal(sample(model, text(7), **SMALL), expected)


def test_replaced_workers_that_have_another_model_do_not_load_it(model, tmp_path):
    (tmp_path / "other").mkdir()
    run(random_model(tmp_path / "other", 3, torch.float32))
    engine.edit(model, parallel=TWO)  # ComfyUI runs the node when it has loaded the model
    replace(model, tmp_path)
    refused_at_once(model, "has changed on disk")


@pytest.mark.parametrize("change", [overwrite, truncate, overwrite_and_remove])
def test_written_to_under_the_workers_the_model_goes_and_they_stay(model, tmp_path, change):
    run(model)
    pids = dict(group._group.pids)
    change(model, tmp_path)
    with pytest.raises(ValueError, match="was written to while"):
        run(model)
    assert group._group.pids == pids and group._group.alive
    refused_at_once(model, "on disk|no longer there")
    save_random_hunyuan_video(file_of(model), 2, 256)
    again = comfy.sd.load_diffusion_model(file_of(model))
    assert relative_error(run(again), sample(again, text(7), **SMALL)) < TOLERANCE
    assert group._group.pids == pids


def test_written_to_in_the_middle_of_a_run(model, tmp_path):
    run(model)
    thread = threading.Timer(1.0, overwrite, (model, tmp_path))
    thread.start()
    with pytest.raises(ValueError, match="was written to while"):
        run(model, **SLOW)
    thread.join()


def test_truncated_in_the_middle_of_a_run_the_error_tells_of_the_file(model, tmp_path):
    run(model)
    thread = threading.Timer(1.0, truncate, (model, tmp_path))
    thread.start()
    with pytest.raises(GroupError, match=r"ended without a message.*has changed on disk.*may be why"):
        run(model, **SLOW)
    thread.join()
    refused_at_once(model, "has changed on disk")


def test_a_file_that_is_put_back_is_the_same(model, tmp_path):
    expected = run(model)
    release()
    os.rename(file_of(model), tmp_path / "away")
    refused_at_once(model, "is no longer there")
    content, stat = (tmp_path / "away").read_bytes(), os.stat(tmp_path / "away")
    with open(file_of(model), "wb") as copy:  # what `cp -p` and network file systems make of it: another inode
        copy.write(content)
    os.utime(file_of(model), ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert relative_error(run(model), expected) < TOLERANCE


def test_one_with_the_size_header_and_time_of_the_other_is_another(model, tmp_path):
    engine.edit(model, parallel=TWO)
    stat = os.stat(file_of(model))
    replace(model, tmp_path)
    os.utime(file_of(model), ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert os.stat(file_of(model)).st_size == stat.st_size
    refused_at_once(model, "has changed on disk")


def test_a_function_of_this_pack_is_called_in_the_workers(demo_model):
    """Whatever the pack's folder is called in ComfyUI's process."""
    loaded = demo_model.clone()
    loaded.cached_patcher_init = (load_demo_model, ())
    assert recipe_of(loaded)["pack"] == "skein" and recipe_of(loaded)["function"] == "load_demo_model"
    prompt = "a red circle moves left"
    workers = sample(engine.edit(loaded, parallel=TWO), prompt, **SMALL)
    assert relative_error(workers, sample(demo_model, prompt, **SMALL)) < TOLERANCE


def test_a_function_that_nobody_could_find_again_is_refused(demo_model):
    loaded = demo_model.clone()
    loaded.cached_patcher_init = (lambda path: load_demo_model(), ("a path",))
    with pytest.raises(ValueError, match="cannot be done here: its loader does not tell how"):
        recipe_of(loaded)
