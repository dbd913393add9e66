"""Reusing a given share of a run's calls: a controller that sets the threshold from call to call.

How many calls one threshold reuses depends on the model, the prompt, the sampler and the number of steps; a share of
them does not. The controller begins with the threshold that reuses about that share on the models that it was measured
on, and follows what is still missing: the share of the calls to come that must be reused, as odds, beside what it would
be if all were as expected. So calls are still chosen by their change. A run that falls behind or goes ahead comes back
slowly at first, and surely in the end, where each call must be reused, or none may be. The last call is spared where
that can be: its error goes into the result as it is. docs/LOG.md has the figures.
"""

from collections.abc import Sequence
from dataclasses import dataclass

LEVEL = 0.085  # reuses about half of the calls: 0.069 to 0.122 on the models that it was measured on
RISE = 1.4  # the power of the odds of a share by which the threshold that reuses it grows
GAIN = 2.0  # the power of the odds by which the threshold follows what is missing
LARGEST = 1.0  # a prediction that is as wrong as none is never used


@dataclass(frozen=True)
class Steps:
    """A run's sampling steps: their sigmas, and those in which calls may be reused."""

    sigmas: Sequence[float]
    start_sigma: float = float("inf")
    end_sigma: float = 0.0

    def left(self, step: int) -> int:
        """Steps from `step` on."""
        return max(len(self.sigmas) - step, 1)

    def open(self, step: int) -> int:
        """Steps from `step` on, without the last one, in which calls may be reused."""
        return sum(self.start_sigma >= sigma >= self.end_sigma for sigma in self.sigmas[step:-1])


class ShareController:
    """The threshold of one stream of calls.

    share: of all its calls, above 0 and below 1. points: calls that a prediction is made of; so many at the beginning
    are computed, and nothing is made up for them.
    """

    def __init__(self, share: float, points: int):
        self.share = share
        self.level = LEVEL * _odds(share) ** RISE
        self.points = points
        self.calls = 0
        self.reused = 0
        self._first: int | None = None  # step of the first call
        self._step = -1
        self._in_step = 0  # calls of the step in progress
        self._a_step = 0  # calls of the last whole step

    def next(self, step: int, steps: Steps) -> float:
        """The threshold of the next call, which belongs to `step`; 0 to LARGEST. To be asked once a call."""
        if step != self._step:
            self._step, self._a_step, self._in_step = step, self._in_step, 0
        if self._first is None:
            self._first = step
        a_step = max(self._a_step, self._in_step + 1)
        wanted = round(self.share * (self.calls + a_step * steps.left(step) - self._in_step))
        missing, left = wanted - self.reused, a_step * steps.open(step) - self._in_step
        expected = a_step * steps.open(self._first) - min(self.calls, self.points)
        self.calls += 1
        self._in_step += 1
        if missing <= 0:
            return 0.0
        if missing >= left:
            return LARGEST
        if wanted >= expected:
            return min(self.level, LARGEST)
        return min(self.level * (_odds(missing / left) / _odds(wanted / expected)) ** GAIN, LARGEST)


def _odds(share: float) -> float:
    return share / (1 - share)
