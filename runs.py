"""What a run did, as plain data: its model calls, and what can be said of them."""

import math
import statistics
import time
import uuid
from dataclasses import dataclass, field


@dataclass
class Call:
    """One model call. `change` is the relative change that decided, None where nothing could be compared;
    `ms` is the time of the call on the device, None until it is known.

    For estimates of other thresholds: `admitted` tells whether the call lay where calls may be reused at all (range,
    warm-up), `parts` are the numbers of the conditionings in its batch, `step` is the sampling step it belongs to.
    """

    sigma: float
    change: float | None
    threshold: float
    reused: bool
    ms: float | None = None
    admitted: bool = True
    parts: list[int] = field(default_factory=lambda: [0])
    step: int = 0


@dataclass
class Run:
    """The calls of one sampling run under the first-block cache."""

    calls: list[Call] = field(default_factory=list)
    node_id: str | None = None
    started: float = field(default_factory=time.time)  # seconds since the epoch
    seconds: float = 0.0
    finished: bool = False  # False after an exception or an interrupt
    id: str = field(default_factory=lambda: uuid.uuid4().hex[:12])
    steps: int | None = None  # sampling steps in all, where the sampler tells
    limit: int = -1  # max_consecutive_hits
    accumulate: bool = False
    share: float = 0.0  # of the calls that was to be reused; 0: one threshold for all calls
    ended: bool = False
    error: str | None = None  # why it stopped early
    prompt_id: str | None = None  # ComfyUI's, of the prompt that it was part of
    workflow_id: str | None = None  # of the workflow that the prompt was made from
    latent: list[float] = field(default_factory=list)  # values of the latent that it made (latents.py)
    version: int = 0  # of the state in which it changed last (events.py)

    @property
    def reused(self) -> int:
        return sum(call.reused for call in self.calls)

    @property
    def computed(self) -> int:
        return len(self.calls) - self.reused

    def typical_ms(self, reused: bool) -> float | None:
        """The median time of the computed or of the reused calls; None until one is known. The first computed call,
        in which blocks are compiled and kernels tried, only counts where there is no other."""
        times = [call.ms for call in self.calls if call.reused == reused and call.ms is not None]
        if not reused and len(times) > 1 and times[0] == self.calls[0].ms:
            del times[0]
        return statistics.median_low(times) if times else None

    @property
    def speedup(self) -> float:
        """Estimated: the time of these calls had each been computed, over that with those reused that were. 1.0 where
        nothing was reused, or no time is known yet."""
        computed, reused = self.typical_ms(reused=False), self.typical_ms(reused=True)
        if not computed or not reused:
            return 1.0
        return max(len(self.calls) * computed / (self.computed * computed + self.reused * reused), 1.0)

    def summary(self) -> str:
        computed, reused, times = self.computed, self.reused, f"{self.speedup:.2f}"
        if self.share:
            did = f"{computed} computed, {reused} reused ({self.share:.0%} asked for), about {times}x as fast"
        else:
            did = f"{computed} computed, {reused} reused, about {times}x as fast"
        return f"{len(self.calls)} model calls: {did}"

    def sums(self) -> dict:
        """What the summary and the panel say of the calls; told with each of them."""
        return {
            "reused": self.reused,
            "computed": self.computed,
            "speedup": self.speedup,
            "computed_ms": self.typical_ms(reused=False),
            "reused_ms": self.typical_ms(reused=True),
        }

    def as_dict(self) -> dict:
        """JSON-ready: every field but `latent`, and the sums. It is made often while a run goes on."""
        fields = {**vars(self), "calls": [dict(vars(call)) for call in self.calls], **self.sums()}
        del fields["latent"]
        return fields


def finite(value: float | None) -> float | None:
    """The value if it is a number that JSON can carry."""
    return value if value is not None and math.isfinite(value) else None
