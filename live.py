"""What goes on in this ComfyUI: sampling, the runs, the processes that compute, and what else is waited for.

Each change is marked (`_mark`), and soon after listeners get a message with what is so then (events.py); `snapshot()`
is all of it. Changes come from the sampling thread and from those of the worker group, messages from the server's.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from . import events, host, processes
from .activities import Activities, Progress
from .processes import TEXT_LENGTH
from .runs import Run
from .sparse_runs import SparseRun

KEPT_RUNS = 50


@dataclass
class Sampling:
    """The sampling in progress, or the last one. calls: of the model, since it began. step: the one under way, from 0.

    expected_s: how long it takes in all, as was thought before (expected_from: "measured" or "scaled", as
    forecast.py has it, or "" for nowhere); expected_end: when it will have ended, in seconds since the epoch, from the
    steps done once there are some.
    activity: what goes on beside model calls, {"text", "part" (of it done, None: unknown), "since"}; None: nothing.
    """

    running: bool = False
    techniques: list[str] = field(default_factory=list)
    prompt_id: str | None = None
    workflow_id: str | None = None
    node_id: str | None = None  # of the sampler
    started: float | None = None  # seconds since the epoch
    calls: int = 0
    step_ms: float | None = None  # from the beginning of a call to that of the next
    error: str | None = None
    notes: dict[str, str] = field(default_factory=dict)  # technique -> what it did
    steps: int | None = None
    step: int | None = None
    ended: float | None = None  # seconds since the epoch
    expected_s: float | None = None
    expected_from: str = ""
    expected_bytes: float | None = None  # of device memory
    expected_end: float | None = None
    activity: dict | None = None


_runs: deque[Run] = deque(maxlen=KEPT_RUNS)
_sparse_runs: deque[SparseRun] = deque(maxlen=KEPT_RUNS)
_sampling = Sampling()
_keep: Callable[[Run | SparseRun], None] | None = None
_activities = Activities(lambda shown: _show_activity(shown))
_loading = ExitStack()  # the activity before a sampling's first call
_tellers: list[Callable[[str], None]] = []
_last_call = 0.0


def keep_runs(kept: Sequence[Run | SparseRun], keep: Callable[[Run | SparseRun], None]) -> None:
    """Begin with runs that were kept before ComfyUI was started, and hand on each that ends."""
    global _keep
    with events.lock:
        _runs.extend(run for run in kept if isinstance(run, Run))
        _sparse_runs.extend(run for run in kept if isinstance(run, SparseRun))
        _keep = keep


def snapshot() -> dict:
    """All of it, JSON-ready."""
    return _news(since=-1)


def _news(since: int) -> dict:
    """What goes on, and the runs that have changed since a version. JSON-ready."""
    with events.lock:
        return {
            "version": events.version(),
            "time": time.time(),
            "sampling": asdict(_sampling),
            "processes": [asdict(process) for process in processes.all_processes()],
            "runs": [run.as_dict() for run in _runs if run.version > since],
            "sparse": [run.as_dict() for run in _sparse_runs if run.version > since],
        }


def _mark(*changed: Run | SparseRun) -> None:
    """Something has changed: also these runs."""
    events.changed(*changed)
    for run in changed:
        if _keep is not None and run.ended and run.calls:
            _keep(run)


def runs() -> list[Run]:
    """The last runs under the cache, oldest first; the last one may be in progress."""
    return list(_runs)


def current_run() -> Run | None:
    """The run in progress."""
    return _runs[-1] if _runs and not _runs[-1].ended else None


@contextmanager
def sampling(techniques: Sequence[str], device: torch.device) -> Iterator[None]:
    """Within: sampling under a plan with these techniques, in this process or with it as the one that asks."""
    global _sampling, _last_call
    with events.lock:
        _last_call = 0.0
        _sampling = Sampling(True, list(techniques), *host.executing(), started=time.time())
        processes.begin(device)
        _loading.enter_context(_activities.within("Loading the model"))  # until the first call
        processes.look(at_once=True)
        _mark()
    error: str | None = None
    try:
        yield
    except BaseException as problem:
        error = sentence(problem)
        raise
    finally:
        with events.lock:
            _sampling.running, _sampling.error, _sampling.ended = False, error, time.time()
            processes.rest()
            _give_up(error)
            _loading.close()
            _activities.in_workers(None)  # an interrupt is not told to them
            processes.look(at_once=True)
            _mark()
            if error is None and _sampling.techniques:
                host.add_to_metadata("skein", _sums())


def _sums() -> dict:
    """What the sampling that ends did, for the metadata of what comes of it."""
    start = _sampling.started or 0.0
    run = next((run for run in reversed(_runs) if run.started >= start and run.calls), None)
    sparse = next((run for run in reversed(_sparse_runs) if run.started >= start), None)
    return {
        "techniques": _sampling.techniques,
        "seconds": round(time.time() - start, 2),
        "calls": _sampling.calls,
        "cache": None if run is None else {"threshold": run.calls[0].threshold, "share": run.share, **run.sums()},
        "sparse_attention": None if sparse is None else sparse.sums(),
    }


def _give_up(error: str | None) -> None:
    """End runs that were begun and will not be heard of again: their worker is gone."""
    run, sparse = current_run(), current_sparse_run()
    if run is not None:
        run.ended, run.error, run.seconds = True, error, time.time() - run.started
        _mark(run)
    if sparse is not None:
        sparse.ended = True
        _mark(sparse)


def step(call: Any, run: Callable) -> Any:
    """Around a model call (models/seam.py): counts them, and their pace on the host's clock."""
    global _last_call
    now = time.perf_counter()
    with events.lock:
        _sampling.calls += 1
        if _last_call:
            _sampling.step_ms = 1000 * (now - _last_call)
            processes.paced(_sampling.step_ms)
        _last_call = now
        _loading.close()
        processes.look()
        _mark()
    return run(call)


def at_step(step: int, steps: int, left: float | None = None) -> None:
    """A sampling step begins, counted from 0, of so many. left: seconds until the last one ends, None: not known."""
    with events.lock:
        _sampling.step, _sampling.steps = step, steps
        if left is not None:
            _sampling.expected_end = time.time() + left
        _mark()


def expect(seconds: float | None, source: str, size: float | None, steps: int) -> None:
    """How long the sampling in progress takes in all, the bytes on each device, as is thought before, and its steps.
    source: "measured" or "scaled" (forecast.py), or "" where seconds are not known."""
    with events.lock:
        _sampling.expected_s, _sampling.expected_from, _sampling.expected_bytes = seconds, source, size
        _sampling.steps = steps
        if seconds is not None and _sampling.started is not None:
            _sampling.expected_end = _sampling.started + seconds
        _mark()


def activity(text: str) -> AbstractContextManager[Progress]:
    """Within: something goes on that is no model call, and is waited for. Of several the innermost is shown.

    Gives progress(part, text=None), which says how much of it is done (0 to 1, None: unknown), and what goes on now.
    """
    return _activities.within(text)


def deliver_activity(send: Callable[[dict | None], None]) -> None:
    """From now on hand what goes on in this process, a worker, to ComfyUI's."""
    _activities.changed = send


def worker_activity(told: dict | None) -> None:
    """What goes on in the workers."""
    _activities.in_workers(told)


@contextmanager
def telling_activity(say: Callable[[str], None]) -> Iterator[None]:
    """Within: what goes on is said by this too, when it begins."""
    _tellers.append(say)
    try:
        yield
    finally:
        _tellers.remove(say)


def _show_activity(shown: dict | None) -> None:
    with events.lock:
        before, _sampling.activity = _sampling.activity, shown
        _mark()
    if shown is not None and (before is None or before["text"] != shown["text"]):
        for say in _tellers:
            say(shown["text"])


def begun(run: Run) -> None:
    """A run under the cache has begun."""
    with events.lock:
        run.prompt_id, run.workflow_id = _sampling.prompt_id, _sampling.workflow_id
        _runs.append(run)
        _mark(run)


def sparse_runs() -> list[SparseRun]:
    """The last runs under sparse attention, oldest first; the last one may be in progress."""
    return list(_sparse_runs)


def current_sparse_run() -> SparseRun | None:
    """The run under sparse attention in progress."""
    return _sparse_runs[-1] if _sparse_runs and not _sparse_runs[-1].ended else None


def sparse_called(run: SparseRun) -> None:
    """A run under sparse attention has begun, has one call more, or has ended."""
    with events.lock:
        for i, known in enumerate(_sparse_runs):
            if known.id == run.id:
                run.prompt_id, run.workflow_id, run.latent = known.prompt_id, known.workflow_id, known.latent
                _sparse_runs[i] = run
                break
        else:
            run.prompt_id, run.workflow_id = _sampling.prompt_id, _sampling.workflow_id
            _sparse_runs.append(run)
        _mark(run)


def sampled(latent: list[float]) -> None:
    """The sampling in progress has made a latent with these values."""
    for run in (current_run(), current_sparse_run()):
        if run is not None:
            run.latent = latent


def called(run: Run) -> None:
    """A run has one call more, or the time of one has become known."""
    _mark(run)


def ended(run: Run) -> None:
    """A run has ended, with all that is known of it now. Workers end one that was interrupted when the next begins,
    and do not know why: what is known of its end here stays. Nor do they know what was asked of ComfyUI."""
    with events.lock:
        for i, known in enumerate(_runs):
            if known.id == run.id:
                if known.ended:
                    run.finished, run.error, run.seconds = known.finished, known.error, known.seconds
                run.prompt_id, run.workflow_id, run.latent = known.prompt_id, known.workflow_id, known.latent
                _runs[i] = run
                break
        else:
            _runs.append(run)
        _mark(run)


def noted(about: str, text: str) -> None:
    """A technique says what it does."""
    with events.lock:
        _sampling.notes[about] = text[:TEXT_LENGTH]
        _mark()


def notes() -> dict[str, str]:
    """What the techniques of the sampling in progress, or of the last one, have said."""
    return dict(_sampling.notes)


def sentence(error: BaseException) -> str:
    """An exception in words."""
    name = type(error).__name__
    if name == "InterruptProcessingException":  # of ComfyUI, by name: this module does without it
        return "interrupted"
    text = str(error).strip().splitlines()[0] if str(error).strip() else ""
    plain = isinstance(error, (ValueError, RuntimeError)) and text
    return (text if plain else f"{name}: {text}".rstrip(": "))[:TEXT_LENGTH]


events.tell(_news)
