"""The steps of a run: when they ended, how many seconds are left, what is said of that.

Times are the device's. Nothing here waits for it before the run has ended.
"""

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from . import conflicts, live
from .footprint import taken_bytes, world_of
from .forecast import TIMES, Forecast, Job, job_of
from .plan import PresetConfig
from .presets import Choice, words
from .report import show
from .stopwatch import Stopwatch
from .units import bytes_text, seconds_text

logger = logging.getLogger("skein")

SAY_SECONDS = 1.0  # between two lines


@dataclass
class Step:
    """A step; the first one with all that came before it."""

    ms: float | None = None


class Pace:
    """Follows one run. say: shows a line of status to the user."""

    def __init__(self, job: Job, steps: int, device: torch.device, say: Callable[[str], None]):
        self.job, self.steps, self._say = job, steps, say
        self.forecast: Forecast | None = TIMES.forecast(job, steps)
        self.ended: list[Step] = []
        self._stopwatch = Stopwatch(device)
        self._stop = self._stopwatch.start()
        self._started = self._said = time.perf_counter()

    def around_callback(self, callback: Callable | None) -> Callable:
        """A sampler's callback, by which it tells that a step has ended."""

        def told(step: int, x0: Any, x: Any, total_steps: int) -> Any:
            self.step_ended()
            return callback(step, x0, x, total_steps) if callback is not None else None

        return told

    def step_ended(self) -> None:
        """One step more has been enqueued."""
        self.ended.append(Step())
        self._stop(self.ended[-1])
        self._stop = self._stopwatch.start()
        self._stopwatch.look()
        done, now = len(self.ended), time.perf_counter()
        left = self.seconds_left()
        live.at_step(min(done, self.steps - 1), self.steps, left)
        if now - self._said >= SAY_SECONDS and done < self.steps:
            self._said = now
            took = seconds_text(now - self._started)
            told = took if left is None else f"{took}, about {seconds_text(left)} left"
            self._say(f"step {done + 1} of {self.steps}: {told}")

    def seconds_left(self) -> float | None:
        """By the steps after the first, once there is one; before that by the forecast."""
        known = [step.ms / 1000 for step in self.ended[1:] if step.ms is not None]
        if known:
            return max(self.steps - len(self.ended), 0) * sum(known) / len(known)
        if self.forecast is None or not self.ended:
            return None
        return max(self.steps - len(self.ended), 0) * self.forecast.step

    def finish(self) -> list[float]:
        """After the run's last step: the seconds of each, kept for later forecasts."""
        self._stopwatch.read()
        seconds = [step.ms / 1000 for step in self.ended if step.ms is not None]
        if len(seconds) == self.steps:
            TIMES.add(self.job, seconds)
        return seconds


@contextmanager
def followed(
    choice: Choice, preset: PresetConfig | None, guider: Any, given: Mapping[str, Any]
) -> Iterator[Callable | None]:
    """Within: the steps of a guider's run are followed; yields the sampler's callback for that. What is expected and
    what came is said on the node of the preset, if there is one, and in the panel.

    given: the arguments of the guider's outer_sample, by name.
    """
    plan, patcher, callback = choice.plan, guider.model_patcher, given.get("callback")
    say = partial(show, None if preset is None else preset.node_id)
    without = [f"Without {conflicts.NAMES[name]}: {why}" for name, why in choice.left_out.items()]
    steps, chosen = len(given["sigmas"]) - 1, words(plan)
    job, shape = None, given["noise"].shape
    with suppress(ValueError):  # a model that Skein does not know: applied() says so, and what to do
        job = job_of(plan, guider, shape, given["sampler"], world_of(plan)) if plan.techniques and steps > 0 else None
    if job is None:
        yield callback
        say(_lines(chosen, *without))
        return
    pace, size = Pace(job, steps, patcher.load_device, say), taken_bytes(plan, patcher, shape)
    forecast = pace.forecast
    if forecast is None:
        live.expect(None, "", size, steps)
    else:
        live.expect(forecast.seconds, forecast.source, size, steps)
    expected = f"{chosen}: {expectation(forecast, size)}"
    logger.info("Skein: %s", expected)
    say(expected)
    with live.telling_activity(say):
        yield pace.around_callback(callback)
    came = f"{chosen}: {outcome(pace.finish())}"
    logger.info("Skein: %s", came)
    say(_lines(came, *live.notes().values(), *without))


def _lines(first: str, *others: str) -> str:
    """Several things to say on a node: a list to Nodes 2.0, which reads such text as Markdown."""
    return "\n- ".join([first, *others])


def expectation(forecast: Forecast | None, size: float | None) -> str:
    """What a run is expected to take. size: bytes of each device's memory, None where they are not known."""
    if forecast is None:
        first = "the time is known after the first steps"
    else:
        first = f"about {seconds_text(forecast.step)} a step, {seconds_text(forecast.seconds)} in all"
    return first if size is None else f"{first}; about {bytes_text(size)}"


def outcome(seconds: Sequence[float]) -> str:
    """What a run has taken."""
    rest = sum(seconds[1:]) / max(len(seconds) - 1, 1)
    each = f", {seconds_text(rest)} each after the first" if len(seconds) > 1 else ""
    return f"{len(seconds)} steps in {seconds_text(sum(seconds))}{each}"
