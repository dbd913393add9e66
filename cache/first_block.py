"""First-block cache: skip the rest of a transformer while its first block says that little has changed.

The algorithm is ParaAttention's (github.com/chengzeyi/ParaAttention): run the first block, compare the change it
made to the image tokens (the signature) with that of earlier calls, and if it is close, add what the remaining
blocks changed (the residual) from earlier calls instead of running them.

Letters: B batch, S image tokens, C channels.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..plan import CacheConfig
from .prediction import Point, predict

SIGNATURE_TOKENS = 8192  # a signature holds about this many evenly spaced tokens, which is plenty to judge a mean


def sample_tokens(hidden: Tensor) -> Tensor:
    """An evenly spaced part of the tokens of (B, S, C), as a view; all of them in small videos.

    The step is odd, so that it does not fall on one column of a frame.
    """
    step = max(hidden.shape[1] // SIGNATURE_TOKENS, 1)
    return hidden[:, :: step | 1]


@dataclass(frozen=True)
class Decision:
    """Whether a call may be reused, and the relative change that says so (None: nothing to compare with)."""

    reuse: bool
    change: float | None


@dataclass
class _Condition:
    """What is kept of one conditioning's computed calls: points over distinct sigmas, oldest first."""

    signatures: list[Point] = field(default_factory=list)
    residuals: list[Point] = field(default_factory=list)
    previous: Tensor | None = None  # signature of the last call, computed or not
    accumulated: float = 0.0  # change summed since the last computed call
    hits: int = 0  # reused calls since then


class FirstBlockCache:
    """The cache of one sampling run. Knows nothing of models: it is handed signatures and hidden states.

    A batch is made of equal chunks, one a conditioning (ComfyUI batches cond and uncond when memory allows);
    every method takes the ids of the conditionings in that order. State is kept for each of them apart, so
    it does not matter whether they come together or one after another. Chunks of one batch share a decision.
    """

    def __init__(self, config: CacheConfig, start_sigma: float = float("inf"), end_sigma: float = 0.0):
        self.config = config
        self.start_sigma = start_sigma
        self.end_sigma = end_sigma
        self._states: dict[Hashable, _Condition] = {}
        self._calls: dict[Hashable, int] = {}

    def reset(self) -> None:
        """Drop every tensor."""
        self._states.clear()

    def decide(self, conditions: Sequence[Hashable], signature: Tensor, sigma: float) -> Decision:
        """Whether the call with this signature (B, S', C) at `sigma` may reuse earlier residuals."""
        changes = []
        for condition, part in zip(conditions, signature.chunk(len(conditions))):
            changes.append(self._change(condition, part, sigma))
        change = None if any(c is None for c in changes) else max(changes)
        states = [self._states[condition] for condition in conditions]
        reuse = (
            change is not None
            and change < self.config.threshold
            and self.end_sigma <= sigma <= self.start_sigma
            and all(self._calls[c] > self.config.warmup_calls for c in conditions)
            and (self.config.max_consecutive_hits < 0 or all(s.hits < self.config.max_consecutive_hits for s in states))
        )
        return Decision(reuse, change)
