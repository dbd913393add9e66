"""Reporting of what a run does: kept for the panel, logged in one line, shown on the node, handed out of a worker."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any, TypeVar

from torch import Tensor

from . import events, host, live, processes
from .latents import SAME, difference, some_values
from .plan import CacheConfig, Plan, SparseConfig
from .runs import Call, Run
from .sparse_runs import SparseCall, SparseLayer, SparseRun
from .stopwatch import Timed

logger = logging.getLogger("skein")

AnyRun = TypeVar("AnyRun", Run, SparseRun)

_deliver: Callable[[str, Any], None] | None = None  # in a worker process: hands reports to ComfyUI's


def recent_runs() -> list[Run]:
    """The last runs in this process that have ended, oldest first."""
    return [run for run in live.runs() if run.ended]


def runs_of(latent: Tensor, plan: Plan) -> tuple[Run | None, SparseRun | None]:
    """The runs under a plan's cache and under its sparse attention that made a latent; None for what the plan does not
    ask for, and for sparse attention that stood back (techniques.py) in the cache's run. Raises ValueError if the plan
    asks for neither, or if none of the last runs made the latent."""
    cache = plan.cache if "cache" in plan.techniques else None
    sparse = plan.sparse if "sparse" in plan.techniques else None
    if cache is None and sparse is None:
        raise ValueError(
            "There is neither First-Block Cache nor Sparse Attention on this model, or it is switched off (threshold "
            "0, max_error 0); connect the model that comes out of its node."
        )
    values = some_values(latent)
    run = None if cache is None else _run_of_cache(values, cache)
    try:
        return run, None if sparse is None else _run_of_sparse(values, sparse)
    except ValueError:
        if run is None:
            raise
        return run, None


def _run_of_cache(values: list[float], cache: CacheConfig) -> Run:
    own = [run for run in recent_runs() if run.node_id == cache.node_id and run.calls]

    def fits(run: Run) -> bool:
        return run.share == cache.reuse_share and (run.share > 0 or run.calls[0].threshold == cache.threshold)

    return _nearest(values, own, "First-Block Cache", fits)


def _run_of_sparse(values: list[float], sparse: SparseConfig) -> SparseRun:
    max_error = sparse.max_error if sparse.rule == "max_error" else None
    own = [run for run in live.sparse_runs() if run.ended and run.node_id == sparse.node_id and run.calls]
    return _nearest(values, own, "Sparse Attention", lambda run: run.max_error == max_error)


def _nearest(values: list[float], runs: list[AnyRun], technique: str, fits: Callable[[AnyRun], bool]) -> AnyRun:
    """The run that made a latent with these values, of a technique's runs, oldest first. Of several that ended in one
    latent, one that fits the settings, the newest. Raises ValueError if it is none of them."""
    if not runs:
        raise ValueError(
            f"This model's {technique} has not run yet, or not lately; connect the latent of the sampler that uses it."
        )

    def distance(run: AnyRun) -> tuple[float, bool]:
        return difference(values, run.latent), not fits(run)

    nearest = min(reversed(runs), key=distance)
    if distance(nearest)[0] > SAME:
        raise ValueError(
            f"None of the last {live.KEPT_RUNS} runs ended with this latent; connect the sampler's own latent, before "
            "any node that changes it. If it is older than these runs, sample again with another seed."
        )
    return nearest


def deliver_to(send: Callable[[str, Any], None]) -> None:
    """From now on hand everything that is reported to another process: send(kind, data), with a kind of KINDS and data
    for receive()."""
    global _deliver
    _deliver = send
    live.deliver_activity(lambda shown: send("activity", {"shown": shown}))


def receive(kind: str, data: dict) -> None:
    """Report what another process has delivered."""
    KINDS[kind](data)


def begin(run: Run) -> None:
    """A run begins."""
    if _deliver is not None:
        return _deliver("begun", asdict(run))
    live.begun(run)


def add(run: Run, call: Call, timed: Sequence[Timed] = ()) -> None:
    """A call of a run has ended. timed: calls of it whose time has become known."""
    with events.lock:  # ComfyUI's multi-GPU clones call on several threads, and a call is known by its index
        run.calls.append(call)
        times = [[i, each.ms] for i, each in enumerate(run.calls) if any(each is one for one in timed)]
        if _deliver is not None:
            return _deliver("called", {"run": run.id, "steps": run.steps, "call": asdict(call), "times": times})
        live.called(run)


def publish(run: Run) -> None:
    """Keep a run that has ended, log it, and show it on its node where a ComfyUI server runs."""
    run.ended = True
    if _deliver is not None:
        return _deliver("run", asdict(run))
    live.ended(run)
    ended = "" if run.finished else " (stopped early)"
    logger.info("Skein first-block cache: %s%s", run.summary(), ended)
    show(run.node_id, run.summary() + ended, "cache")


def sparse_called(run: SparseRun) -> None:
    """A run under sparse attention has begun, has one call more, or has ended."""
    if _deliver is not None:
        return _deliver("sparse", asdict(run) if run.ended else {**asdict(run), "layers": []})
    live.sparse_called(run)


def show(node_id: str | None, text: str, about: str = "") -> None:
    """Show a line of status on a node, where a ComfyUI server runs. about: the technique, to show it
    in the panel too."""
    if _deliver is not None:
        return _deliver("show", {"node_id": node_id, "text": text, "about": about})
    if about:
        live.noted(about, text)
    instance = host.server()
    if instance is not None and node_id is not None:
        instance.send_progress_text(text, node_id, instance.client_id)  # others may have another graph open


def note(about: str, text: str) -> None:
    """Say in the panel alone what a technique does at the moment."""
    if _deliver is not None:
        return _deliver("note", {"about": about, "text": text})
    live.noted(about, text)


def progress(amount: int) -> None:
    """Tell of work done, from a worker to whoever waits for its answer."""
    if _deliver is not None:
        _deliver("progress", amount)


def memory(readings: list[dict]) -> None:
    """Tell of the workers' memory: of each its rank, and the bytes used and in all."""
    if _deliver is not None:
        return _deliver("filled", {"readings": readings})
    processes.filled(readings)


def _run_of(data: dict) -> Run:
    return Run(**{**data, "calls": [Call(**call) for call in data["calls"]]})


def _sparse_run_of(data: dict) -> SparseRun:
    calls, layers = [SparseCall(**each) for each in data["calls"]], [SparseLayer(**each) for each in data["layers"]]
    return SparseRun(**{**data, "calls": calls, "layers": layers})


def _receive_call(data: dict) -> None:
    run = live.current_run()
    if run is None or run.id != data["run"]:
        return  # of a run that has been given up
    run.steps = data["steps"]
    run.calls.append(Call(**data["call"]))
    for index, ms in data["times"]:
        run.calls[index].ms = ms
    live.called(run)


KINDS: dict[str, Callable[[dict], None]] = {
    "begun": lambda data: begin(_run_of(data)),
    "called": _receive_call,
    "run": lambda data: publish(_run_of(data)),
    "sparse": lambda data: sparse_called(_sparse_run_of(data)),
    "show": lambda data: show(**data),
    "note": lambda data: note(**data),
    "filled": lambda data: memory(**data),
    "activity": lambda data: live.worker_activity(data["shown"]),
}
