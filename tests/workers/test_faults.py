"""Workers that are killed, fail or are interrupted: one clear message, and the next run is right.

On the CPU, or on the two GPUs that SKEIN_DEVICES names ("0,1"). `make faults` takes ten rounds (tests/conftest.py).
"""

import gc
import os
import random
import signal
import threading
import time
import weakref
from contextlib import suppress
from pathlib import Path

import comfy.model_management as memory
import psutil
import pytest
import torch
from random_checkpoints import SMALL, random_model, text
from skein import engine, live
from skein.bench.errors import relative_error
from skein.demo.sampling import sample
from skein.plan import CacheConfig, ParallelConfig, SparseConfig
from skein.workers import GroupError, group, in_use, release

DEVICES = os.environ.get("SKEIN_DEVICES", "cpu,cpu")
ON_CPU = DEVICES == "cpu,cpu"
TWO = ParallelConfig(DEVICES)
TOLERANCE = 2e-6 if ON_CPU else 1e-2  # ComfyUI computes in bfloat16 on GPUs
BROKEN = Path(__file__).parent / "broken_worker"
SLOW = dict(positive=text(7), shape=(1, 16, 9, 48, 48), steps=3)  # seconds a step
if not ON_CPU:
    SLOW |= dict(shape=(1, 16, 33, 90, 160), steps=100)  # seconds in all


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    with torch.inference_mode():
        return random_model(tmp_path_factory.mktemp("checkpoints"), 2)


@pytest.fixture(scope="module")
def expected(model):
    with torch.inference_mode():
        return sample(model, text(7), **SMALL)


@pytest.fixture(autouse=True)
def _nothing_left(tmp_path, monkeypatch):
    """When release returns no worker is left, whose GPU would still be full, and no file."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    yield
    pids = list(group._group.pids.values()) if group._group else []
    release()
    assert not any(map(group._runs, pids)), pids
    assert not list(tmp_path.iterdir())


def gone(pids, seconds=5.0):
    """Whether all processes have ended within so many seconds."""
    deadline = time.monotonic() + seconds
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def run(model, **arguments):
    return sample(engine.edit(model, parallel=TWO), **{"positive": text(7), **SMALL, **arguments})


def later(seconds, action):
    thread = threading.Timer(seconds, action)
    thread.start()
    return thread


@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
@pytest.mark.parametrize("victim", ["0", "1", "launcher"])
def test_killed_at_a_random_moment(model, expected, victim, warm, _round):
    """While starting, joining, loading (cold) or in the middle of a step: one message within 5 s, nothing is left of
    the group, the next run is right."""
    moment = random.Random(f"{victim} {warm} {_round}").uniform(0, 2 if warm else 6)
    if warm:
        run(model)
    killed, processes = [], []

    def kill():
        while not (found := dict(started())).get(victim):
            time.sleep(0.01)
        time.sleep(moment)
        processes.extend(found.values())
        os.kill(found[victim], signal.SIGKILL)
        killed.append(time.monotonic())

    thread = later(0, kill)
    who = r"The workers|Worker \d .*" if victim == "launcher" else rf"Worker {victim} .*|The workers"
    with pytest.raises(GroupError, match=f"({who}) ended without a message"):
        run(model, **SLOW)
    assert time.monotonic() - killed[0] < 5 and gone(processes), moment
    thread.join()
    assert relative_error(run(model), expected) < TOLERANCE


def started():
    """The launcher, and the workers by rank, below this process."""
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            if "bootstrap.py" in " ".join(process.cmdline()):
                yield process.environ()["RANK"], process.pid
            elif "launch.py" in " ".join(process.cmdline()):
                yield "launcher", process.pid


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_killed_while_idle_costs_nothing_but_a_restart(model, expected, rank, _round, caplog):
    run(model)
    pids = dict(group._group.pids)
    os.kill(pids[rank], signal.SIGKILL)
    assert gone([pids[rank]])
    assert relative_error(run(model), expected) < TOLERANCE
    assert "ended since the last run" in caplog.text and gone(pids.values())


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        ("RuntimeError", GroupError, r"Worker 1 \(\w+\) failed: RuntimeError: broken for the test"),
        ("OutOfMemoryError", torch.OutOfMemoryError, r"Worker 1 \(\w+\) ran out of memory"),
        pytest.param(
            "AcceleratorError",
            torch.OutOfMemoryError,
            r"Worker 1 \(\w+\) ran out of memory",
            marks=pytest.mark.skipif(not hasattr(memory, "is_oom"), reason="this ComfyUI does not know it either"),
        ),
    ],
)
def test_one_rank_alone_fails(model, expected, kind, error, message, _round, monkeypatch):
    """Out of memory is ComfyUI's own exception for it, so that its handling runs."""
    with monkeypatch.context() as environment:
        environment.setenv("PYTHONPATH", str(BROKEN), prepend=os.pathsep)
        environment.setenv("SKEIN_BREAK", f"1:{kind}")
        started = time.monotonic()
        with pytest.raises(error, match=message):
            run(model)
    assert time.monotonic() - started < 60
    assert relative_error(run(model), expected) < TOLERANCE


@pytest.mark.skipif(not ON_CPU, reason="what is broken is the CPU's kernel")
def test_a_sparse_kernel_that_fails_in_one_rank_ends_sparse_attention_in_all(model, monkeypatch):
    """The run goes on, dense in the rank at once and in the others from the next call on, and the node says so."""
    arguments = dict(shape=(1, 16, 3, 24, 20), steps=5)
    dense = run(model, **arguments)
    release()
    sparse = engine.edit(model, sparse=SparseConfig(0.2, start_percent=0.0, min_tokens=1))
    with monkeypatch.context() as environment:
        environment.setenv("PYTHONPATH", str(BROKEN), prepend=os.pathsep)
        environment.setenv("SKEIN_BREAK", "1:sparse")
        out, record = run(sparse, **arguments), live.sparse_runs()[-1]
        told = live.snapshot()["sampling"]["notes"]["sparse"]
    assert "the kernel failed in another process, and attention is dense from here on" in told
    found = [call.sparse for call in record.calls]
    assert found[0] == 4 and found[-1] == 0 and sorted(found, reverse=True) == found and len(found) == 5
    assert record.ended and 1e-4 < relative_error(out, dense) < 0.5


def test_an_interrupt_returns_at_once_and_the_workers_stay(model, expected, _round):
    """And nobody uses them any more, so that they may be released."""
    run(model)
    pids, pressed, used = dict(group._group.pids), [], [in_use()]

    def press():
        used.append(in_use())
        pressed.append(time.monotonic())
        memory.interrupt_current_processing(True)

    later(1.0, press)
    with pytest.raises(memory.InterruptProcessingException):
        run(model, **SLOW)
    assert time.monotonic() - pressed[0] < 1 and [*used, in_use()] == [False, True, False]
    memory.interrupt_current_processing(False)
    assert relative_error(run(model), expected) < TOLERANCE and group._group.pids == pids


def test_an_interrupted_run_ends_in_the_workers_too(model):
    """By itself, when the step under way is done: else they would keep its hidden states until the next run."""
    run(model)
    later(3.0, lambda: memory.interrupt_current_processing(True))
    with pytest.raises(memory.InterruptProcessingException):
        sample(engine.edit(model, parallel=TWO, cache=CacheConfig(threshold=0.5)), **{**SLOW, "steps": 50})
    memory.interrupt_current_processing(False)
    told, connection = [], group._group.conversation.channels[0].connection
    while "run" not in told:  # it is told when its tensors have been dropped
        assert connection.poll(60), told
        told.append(group._group.conversation.channels[0].receive()[0])
    release()


def test_unloading_ends_the_workers_and_the_next_run_starts_new_ones(model, expected):
    run(model)
    pids = list(group._group.pids.values())
    memory.unload_all_models()
    assert group._group is None and gone(pids)
    assert relative_error(run(model), expected) < TOLERANCE


def test_workers_that_have_ended_leave_no_thread_and_no_memory_in_this_process(model):
    run(model)
    ended, threads = weakref.ref(group._group), threading.active_count()
    release()
    gc.collect()
    assert ended() is None and threading.active_count() < threads


def test_workers_are_released_while_they_start(model, expected):
    later(1.0, release)
    with pytest.raises(GroupError, match="released"):
        run(model)
    assert group._group is None
    assert relative_error(run(model), expected) < TOLERANCE


def test_workers_that_are_not_to_be_kept_are_not(model):
    sample(engine.edit(model, parallel=ParallelConfig(DEVICES, keep_warm=False)), text(7), **SMALL)
    assert group._group is None


def test_fifty_runs_in_a_row_leave_nothing(model, expected):
    run(model)
    processes = [os.getpid(), *group._group.pids.values()]

    def used():
        handles = [len(os.listdir(f"/proc/{pid}/fd")) for pid in processes]
        resident = [int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096 for pid in processes]
        return handles, threading.active_count(), resident

    for _ in range(10):
        run(model)
    handles, threads, resident = used()
    for _ in range(50):
        out = run(model)
    assert relative_error(out, expected) < TOLERANCE
    assert used()[:2] == (handles, threads)
    assert all(after < before + (16 << 20) for before, after in zip(resident, used()[2]))
