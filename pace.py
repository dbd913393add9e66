"""The steps of a run: when they ended, how many seconds are left, what is said of that.

Times are the device's. Nothing here waits for it before the run has ended.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from . import live
from .forecast import TIMES, Forecast, Job
from .stopwatch import Stopwatch
from .units import bytes_text, seconds_text

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
        live.at_step(min(done, self.steps - 1), self.steps)
        if now - self._said >= SAY_SECONDS and done < self.steps:
            self._said = now
            left = self.seconds_left()
            soon = "" if left is None else f", about {seconds_text(left)} left"
            self._say(f"step {done + 1} of {self.steps}: {seconds_text(now - self._started)}{soon}")

    def seconds_left(self) -> float | None:
        """By the steps after the first, once there is one; before that by the forecast."""
        known = [step.ms / 1000 for step in self.ended[1:] if step.ms is not None]
        if known:
            return (self.steps - len(self.ended)) * sum(known) / len(known)
        if self.forecast is None or not self.ended:
            return None
        return (self.steps - len(self.ended)) * self.forecast.step

    def finish(self) -> list[float]:
        """After the run's last step: the seconds of each, kept for later forecasts."""
        self._stopwatch.read()
        seconds = [step.ms / 1000 for step in self.ended if step.ms is not None]
        if len(seconds) == self.steps:
            TIMES.add(self.job, seconds)
        return seconds


def expectation(forecast: Forecast | None, size: float | None) -> str:
    """What a run is expected to take. size: bytes of each device's memory, None where they are not known."""
    if forecast is None:
        first = "how long it takes is known after its first steps"
    else:
        first = f"about {seconds_text(forecast.step)} a step, {seconds_text(forecast.seconds)} in all"
    return first if size is None else f"{first}; about {bytes_text(size)}"


def outcome(seconds: Sequence[float]) -> str:
    """What a run has taken."""
    rest = sum(seconds[1:]) / max(len(seconds) - 1, 1)
    each = f", {seconds_text(rest)} each after the first" if len(seconds) > 1 else ""
    return f"{len(seconds)} steps in {seconds_text(sum(seconds))}{each}"
