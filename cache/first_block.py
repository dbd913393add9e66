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
class _State:
    """What is kept of one conditioning: points of its computed calls, oldest first, over distinct sigmas."""

    signatures: list[Point] = field(default_factory=list)
    residuals: list[Point] = field(default_factory=list)
    previous: Tensor | None = None  # signature of the last call, computed or not
    accumulated: float = 0.0  # change summed since the last computed call
    calls: int = 0
    hits: int = 0  # reused calls since the last computed one


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
        self._states: dict[Hashable, _State] = {}

    def reset(self) -> None:
        """Drop every tensor."""
        self._states.clear()

    def decide(self, conditions: Sequence[Hashable], signature: Tensor, sigma: float) -> Decision:
        """Whether the call with this signature (B, S', C) at `sigma` may reuse earlier residuals."""
        states = [self._states.setdefault(condition, _State()) for condition in conditions]
        changes = [self._observe(s, part, sigma) for s, part in zip(states, signature.chunk(len(states)))]
        known = [change for change in changes if change is not None]
        change = max(known) if len(known) == len(changes) else None
        limit = self.config.max_consecutive_hits
        reuse = (
            change is not None
            and change < self.config.threshold
            and self.end_sigma <= sigma <= self.start_sigma
            and all(state.calls > self.config.warmup_calls for state in states)
            and (limit < 0 or all(state.hits < limit for state in states))
        )
        for state in states:
            state.hits = state.hits + 1 if reuse else 0
            if not reuse:
                state.accumulated = 0.0
                # Freed before the stack runs, so that no more than order + 1 hidden states are ever kept.
                del state.residuals[: max(len(state.residuals) - self.config.order, 0)]
        return Decision(reuse, change)

    def apply(self, conditions: Sequence[Hashable], hidden: Tensor, sigma: float) -> Tensor:
        """The image tokens after the last block, (B, S, C), from those after the first, for a reused call."""
        residuals = [predict(self._states[c].residuals, sigma, self.config.order) for c in conditions]
        return torch.cat([part + residual for part, residual in zip(hidden.chunk(len(residuals)), residuals)])

    def store(self, conditions: Sequence[Hashable], signature: Tensor, residual: Tensor, sigma: float) -> None:
        """Keep what a computed call showed; the tensors must not be changed afterwards."""
        count = len(conditions)
        for condition, sign, change in zip(conditions, signature.chunk(count), residual.chunk(count)):
            state = self._states[condition]
            _append(state.signatures, sigma, sign, keep=self.config.order + 1)
            _append(state.residuals, sigma, change, keep=self.config.order + 1)

    def _observe(self, state: _State, signature: Tensor, sigma: float) -> float | None:
        """Count a call of one conditioning and measure its change; None if there is nothing to compare with."""
        state.calls += 1
        if state.signatures and state.signatures[-1][1].shape != signature.shape:
            state.signatures, state.residuals, state.previous = [], [], None
        if not state.signatures:
            state.previous = signature
            return None
        if self.config.accumulate:
            state.accumulated += relative_change(signature, state.previous)
            change = state.accumulated
        else:
            change = relative_change(signature, predict(state.signatures, sigma, self.config.order))
        state.previous = signature
        return change


def relative_change(value: Tensor, reference: Tensor) -> float:
    """Mean absolute difference over mean absolute reference, the largest of the samples of (B, S, C).

    A reference of zeros or a value that is not finite gives infinity or NaN, neither of which is below a threshold.
    """
    difference = (value - reference).abs().mean(dim=(1, 2), dtype=torch.float32)
    return float((difference / reference.abs().mean(dim=(1, 2), dtype=torch.float32)).max())


def _append(history: list[Point], sigma: float, value: Tensor, keep: int) -> None:
    """Add the newest point; it takes the place of one at the same sigma (two-call samplers come back to it)."""
    history[:] = [point for point in history if point[0] != sigma][-(keep - 1) :] if keep > 1 else []
    history.append((sigma, value))
