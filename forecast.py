"""How long a run will take: known from runs before it, with the same techniques on the same kind of device.

Where a ComfyUI server runs, the last runs' times are kept in its folder for the pack, `user/__skein/times.json`.
"""

import json
import logging
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from . import host
from .estimate import work_of
from .models import Network
from .patchers import own_network
from .plan import Plan

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

logger = logging.getLogger("skein")

KEPT_TIMES = 200
# A run is the first of its kind in a process, which compiles; the first of a second size, for which blocks are compiled
# with sizes as variables; or one of those after them.
FIRST, SIZE, AGAIN = "first", "size", "again"
SIZE_PART = 0.25  # of what came before a first run, where it is not known of a second size; it was 0.1 to 0.3
COMPILED = '"compile"'  # in a job's techniques
OUTLIER = 4.0  # times most others. A dense step takes 2.5 times a sparse one (docs/BENCHMARKS.md)
MEASURED, SCALED = "measured", "scaled"  # the source of a forecast: a run of this size, or of another one


@dataclass(frozen=True)
class Job:
    """What a run's time depends on. work: in proportion to the operations of a step, for runs of other sizes."""

    device: str
    model: str
    techniques: str
    sampler: str
    work: float

    def is_like(self, other: "Job") -> bool:
        """Whether two jobs differ in their size at most."""
        return (self.device, self.model, self.techniques, self.sampler) == (
            other.device, other.model, other.techniques, other.sampler,
        )  # fmt: skip


@dataclass(frozen=True)
class Time:
    """What a run took, in seconds. step: each step. before: all else: loading, and what is compiled and tried once.
    kind: one of FIRST, SIZE, AGAIN."""

    job: Job
    before: float
    step: float
    kind: str

    @classmethod
    def of(cls, job: Job, seconds: Sequence[float], kind: str) -> "Time":
        """Of a run whose steps took so long, the first with all that came before it. A step that took far longer than
        most, because something was compiled in it, counts as one of those beside it."""
        rest = sorted(seconds[1:])
        most = OUTLIER * rest[int(0.75 * (len(rest) - 1))]  # a computed one, unless the cache reuses three quarters
        usual = [each for each in rest if each <= most]
        step = sum(usual) / len(usual)
        return cls(job, max(sum(seconds) - step * len(seconds), 0.0), step, kind)


@dataclass(frozen=True)
class Forecast:
    """What a run is expected to take, in seconds. source: MEASURED or SCALED."""

    seconds: float
    step: float
    source: str


def job_of(plan: Plan, guider: Any, latent: Sequence[int], sampler: Any, world: int) -> Job:
    """The job of a guider's run on a latent (B, C, ...). world: devices that share it."""
    patcher: ModelPatcher = guider.model_patcher
    network = own_network(patcher)
    device, function = patcher.load_device, getattr(sampler, "sampler_function", sampler)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    guided = getattr(guider, "cfg", 1.0) != 1.0
    return Job(
        device=f"{world} x {name}",
        model=f"{type(network).__name__}, {patcher.model_size()} bytes",
        techniques=_techniques(plan),
        sampler=f"{getattr(function, '__name__', type(function).__name__)}{', guided' if guided else ''}",
        work=work_of(Network(network), latent) * (2 if guided else 1),
    )


def _techniques(plan: Plan) -> str:
    """The settings of a plan's techniques as a text; equal where these are."""
    settings = {
        name: {each.name: getattr(config, each.name) for each in fields(config) if each.compare}
        for name, config in ((name, getattr(plan, name)) for name in plan.techniques)
    }
    return json.dumps(settings, sort_keys=True)


class Times:
    """The last runs' times, oldest first."""

    def __init__(self) -> None:
        self.times: list[Time] = []
        self._met: list[Job] = []  # in this process, where blocks are compiled for them by now
        self._read = False

    def forecast(self, job: Job, steps: int) -> Forecast | None:
        """What so many steps of a job will take; None where nothing like it has run."""
        self._read_file()
        like = [time for time in self.times if time.job.is_like(job)]
        if not like:
            return None

        def distance(time: Time) -> tuple[float, bool]:
            return abs(math.log(time.job.work / job.work)), time.kind != AGAIN

        nearest = min(reversed(like), key=distance)
        step = nearest.step * job.work / nearest.job.work
        source = MEASURED if nearest.job.work == job.work else SCALED
        return Forecast(self._before(job, like) + step * steps, step, source)

    def _before(self, job: Job, like: Sequence[Time]) -> float:
        kind = self.kind_of(job)
        known = {time.kind: time.before for time in like}  # of each kind the newest
        if kind in known:
            return known[kind]
        if kind == FIRST:
            return max(known.values())
        return SIZE_PART * known.get(FIRST, 0.0) if kind == SIZE and COMPILED in job.techniques else 0.0

    def kind_of(self, job: Job) -> str:
        """What the next run of a job will be in this process."""
        met = [each.work for each in self._met if each.is_like(job)]
        return FIRST if not met else SIZE if job.work not in met and len(set(met)) == 1 else AGAIN

    def add(self, job: Job, seconds: Sequence[float]) -> None:
        """Keep what the steps of a finished run took; the first with all that came before it."""
        if len(seconds) < 2:
            return
        self._read_file()
        self.times.append(Time.of(job, seconds, self.kind_of(job)))
        del self.times[:-KEPT_TIMES]
        if job not in self._met:
            self._met.append(job)
        self._write_file()

    def _read_file(self) -> None:
        if self._read or host.server() is None:
            return
        self._read = True
        try:
            kept = json.loads(_path().read_text(encoding="utf-8"))
            self.times[:0] = [Time(**{**each, "job": Job(**each["job"])}) for each in kept]
        except FileNotFoundError:
            pass
        except (OSError, ValueError, TypeError, KeyError) as error:
            logger.warning("Skein: %s cannot be read; a new one is written (%s).", _path(), error)

    def _write_file(self) -> None:
        if host.server() is None:
            return
        path = _path()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            new = path.with_suffix(".new")
            new.write_text(json.dumps([asdict(time) for time in self.times], indent=1), encoding="utf-8")
            os.replace(new, path)
        except OSError as error:
            logger.warning("Skein: the times of runs cannot be kept (%s).", error)


def _path() -> Path:
    import folder_paths

    return Path(folder_paths.get_system_user_directory("skein")) / "times.json"


TIMES = Times()
