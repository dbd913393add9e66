"""What goes on in this ComfyUI, for whoever looks: sampling, the runs of the cache, the processes that compute.

Every change is told as an event (events.py) with what is needed to follow it; `snapshot()` is all of it at once.
Changes come from the sampling thread and from the threads of the worker group, snapshots from the server's.
"""

import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from . import devices, events, host
from .runs import Run
from .sparse_runs import SparseRun

KEPT_RUNS = 16
LOOK_SECONDS = 1.0  # between two looks at memory and utilisation
TEXT_LENGTH = 600  # of an error: a message is small

# States of a process. "ended" was asked for, "failed" was not.
STARTING, LOADING, READY, RUNNING, ENDED, FAILED = "starting", "loading", "ready", "running", "ended", "failed"


@dataclass
class Process:
    """A process that computes: ComfyUI's own (rank None) or a worker. Bytes, milliseconds, shares of 1."""

    rank: int | None
    device: str
    state: str = READY
    pid: int | None = None
    memory_used: int | None = None
    memory_total: int | None = None
    utilisation: int | None = None  # percent
    step_ms: float | None = None
    exchange_share: float | None = None
    text: str = ""  # why it failed


@dataclass
class Sampling:
    """The sampling in progress, or the last one. calls: of the model, since it began."""

    running: bool = False
    techniques: list[str] = field(default_factory=list)
    prompt_id: str | None = None
    workflow_id: str | None = None
    started: float | None = None  # seconds since the epoch
    calls: int = 0
    step_ms: float | None = None  # from the beginning of a call to that of the next
    error: str | None = None
    notes: dict[str, str] = field(default_factory=dict)  # technique -> what it did


_runs: deque[Run] = deque(maxlen=KEPT_RUNS)
_sparse_runs: deque[SparseRun] = deque(maxlen=KEPT_RUNS)
_sampling = Sampling()
_own = Process(None, "cpu", pid=os.getpid())
_workers: list[Process] = []
_last_call = _last_look = 0.0


def starts_on(device: torch.device) -> None:
    """The device of this process, until it samples."""
    _own.device = str(device)


def snapshot() -> dict:
    """All of it, JSON-ready; "seq" is the number of the last event that it holds."""
    with events.lock:
        return {
            "seq": events.last_seq(),
            "time": time.time(),
            "sampling": asdict(_sampling),
            "processes": [asdict(process) for process in _processes()],
            "runs": [run.as_dict() for run in _runs],
            "sparse": [run.as_dict() for run in _sparse_runs],
        }


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
        _own.device, _own.state = str(device), RUNNING
        events.emit("sampling", sampling=asdict(_sampling))
        look(at_once=True)
    error: str | None = None
    try:
        yield
    except BaseException as problem:
        error = sentence(problem)
        raise
    finally:
        with events.lock:
            _sampling.running, _sampling.error = False, error
            for process in _processes():
                if process.state in (LOADING, RUNNING):  # workers too: an interrupt is not told to them
                    process.state = READY
            _give_up(error)
            look(at_once=True)
            events.emit("sampling", sampling=asdict(_sampling))


def _give_up(error: str | None) -> None:
    """End runs that were begun and will not be heard of again: their worker is gone."""
    run, sparse = current_run(), current_sparse_run()
    if run is not None:
        run.ended, run.error, run.seconds = True, error, time.time() - run.started
        events.emit("run", run=_outline(run))
    if sparse is not None:
        sparse.ended = True
        events.emit("sparse", run=sparse.as_dict())


def step(call: Any, run: Callable) -> Any:
    """Around a model call (models/seam.py): counts them, and their pace on the host's clock."""
    global _last_call
    now = time.perf_counter()
    with events.lock:
        _sampling.calls += 1
        if _last_call:
            _sampling.step_ms = 1000 * (now - _last_call)
            for process in _processes():
                if process.state == RUNNING:
                    process.step_ms = _sampling.step_ms
        _last_call = now
        events.emit("step", calls=_sampling.calls, step_ms=_sampling.step_ms)
    look()
    return run(call)


def expect(seconds: float | None, source: str = "", bytes_: float | None = None, steps: int | None = None) -> None:
    """STAND-IN until the panel branch is merged."""


def at_step(step: int, steps: int) -> None:
    """STAND-IN until the panel branch is merged."""


def look(at_once: bool = False) -> None:
    """Tell how full and busy the devices are, once in a while."""
    global _last_look
    now = time.monotonic()
    if not events.listened_to() or (not at_once and now - _last_look < LOOK_SECONDS):
        return
    _last_look = now
    own = devices.memory_of(torch.device(_own.device))
    if own is not None:
        _own.memory_used, _own.memory_total = own
    for process in _processes():
        if process.state in (ENDED, FAILED):
            continue
        used, process.utilisation = devices.load_of(torch.device(process.device))
        if used is not None:
            process.memory_used = used
    events.emit("processes", processes=[asdict(process) for process in _processes()])


def begun(run: Run) -> None:
    """A run under the cache has begun."""
    with events.lock:
        run.prompt_id, run.workflow_id = _sampling.prompt_id, _sampling.workflow_id
        _runs.append(run)
        events.emit("run", run=_outline(run))


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
        layers: dict[str, list] = {} if run.ended else {"layers": []}
        events.emit("sparse", run={**run.as_dict(), **layers})


def sampled(latent: list[float]) -> None:
    """The sampling in progress has made a latent with these values."""
    for run in (current_run(), current_sparse_run()):
        if run is not None:
            run.latent = latent


def called(run: Run, times: list) -> None:
    """A run has one call more. times: [index, ms] of its calls whose time has become known."""
    with events.lock:
        index = len(run.calls) - 1
        call = asdict(run.calls[index])
        events.emit("call", run=run.id, index=index, steps=run.steps, call=call, times=times, sums=run.sums())


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
        events.emit("run", run=_outline(run), times=[[i, call.ms] for i, call in enumerate(run.calls)])


def _outline(run: Run) -> dict:
    """A run without its calls."""
    return {name: value for name, value in run.as_dict().items() if name != "calls"}


def noted(about: str, text: str) -> None:
    """A technique says what it does."""
    with events.lock:
        _sampling.notes[about] = text[:TEXT_LENGTH]
        events.emit("note", about=about, text=text[:TEXT_LENGTH])


def notes() -> dict[str, str]:
    """What the techniques of the sampling in progress, or of the last one, have said."""
    return dict(_sampling.notes)


def workers_started(names: Sequence[str]) -> None:
    """New workers, on devices such as "0" or "cpu"; in the place of those before."""
    with events.lock:
        _workers[:] = [
            Process(rank, name if name == "cpu" else f"cuda:{name}", STARTING) for rank, name in enumerate(names)
        ]
        _tell_processes()


def workers_changed(rank: int | None = None, **values: Any) -> None:
    """Something of one worker, or of all (None), has changed: fields of Process."""
    with events.lock:
        for process in _workers:
            if rank is None or process.rank == rank:
                for name, value in values.items():
                    setattr(process, name, value[:TEXT_LENGTH] if isinstance(value, str) else value)
        _tell_processes()


def workers_stand(state: str) -> None:
    """All workers are in this state now."""
    if any(process.state != state for process in _workers):
        workers_changed(state=state)


def workers_filled(readings: Sequence[dict]) -> None:
    """The workers' memory, as they see it."""
    with events.lock:
        known = {process.rank: process for process in _workers}
        for reading in readings:
            if reading["rank"] in known:
                process = known[reading["rank"]]
                process.memory_used, process.memory_total = reading["used"], reading["total"]
        _tell_processes()


def workers_gone(rank: int | None, state: str, text: str = "") -> None:
    """All workers are gone; `rank` is the one that it began with."""
    with events.lock:
        for process in _workers:
            first = rank is None or process.rank == rank
            process.state = state if first else ENDED
            process.text = text[:TEXT_LENGTH] if first else ""
            process.memory_used = process.utilisation = None
        _tell_processes()


def _processes() -> list[Process]:
    return [_own, *_workers]


def _tell_processes() -> None:
    events.emit("processes", processes=[asdict(process) for process in _processes()])


def sentence(error: BaseException) -> str:
    """An exception in words."""
    name = type(error).__name__
    if name == "InterruptProcessingException":  # of ComfyUI, by name: this module does without it
        return "interrupted"
    text = str(error).strip().splitlines()[0] if str(error).strip() else ""
    plain = isinstance(error, (ValueError, RuntimeError)) and text
    return (text if plain else f"{name}: {text}".rstrip(": "))[:TEXT_LENGTH]
