"""First-block cache: skip the rest of a transformer while its first block says that little has changed.

The frame is ParaAttention's (github.com/chengzeyi/ParaAttention): run the first block, judge by the change it made to
the image tokens (the signature), and if it is as expected, add what the remaining blocks changed (the
residual) in earlier calls instead of running them.

What is expected, and what is added, are one weighted sum of earlier calls (see prediction.py). With order 0 both are
the last computed call, which is ParaAttention's rule; with higher orders the decision asks how wrong the
prediction is where it can be checked, on the first block, and so spends calls where prediction fails.

Letters: B batch, S image tokens, S' sampled image tokens, C channels.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..plan import CacheConfig
from .prediction import Total, combine, fitted_weights, taylor_weights
from .share import ShareController, Steps

SIGNATURE_TOKENS = 8192  # a signature holds about this many evenly spaced tokens, which is plenty to judge a mean
WEIGHT_LIMIT = 8.0  # a prediction with a larger weight reaches too far from its points to be trusted


def sample_tokens(hidden: Tensor) -> Tensor:
    """An evenly spaced part of the tokens of (B, S, C), as a view; all of them in small videos.

    The step is odd, so that it does not fall on one column of a frame.
    """
    step = max(hidden.shape[1] // SIGNATURE_TOKENS, 1)
    return hidden[:, :: step | 1]


@dataclass(frozen=True)
class Decision:
    """Whether a call may be reused, and the relative change that says so (None: nothing to compare with).

    threshold: what the change was compared with.
    admitted: whether any change could have had it reused, by its sigma and the calls before it.
    """

    reuse: bool
    change: float | None
    threshold: float
    admitted: bool


@dataclass
class _Point:
    """A computed call: its sigma, its signature (B, S', C) and its residual (B, S, C)."""

    sigma: float
    signature: Tensor
    residual: Tensor


@dataclass
class _State:
    """What is kept of one stream: its last computed calls, oldest first, over distinct sigmas."""

    points: list[_Point] = field(default_factory=list)
    weights: Tensor | None = None  # of the points, for the call in progress
    previous: Tensor | None = None  # signature of the last call, computed or not
    accumulated: float = 0.0  # change summed since the last computed call
    calls: int = 0
    hits: int = 0  # reused calls since the last computed one
    share: ShareController | None = None


class FirstBlockCache:
    """The cache of one sampling run. Knows nothing of models: it is handed signatures and hidden states.

    A batch is made of equal chunks, one a conditioning (ComfyUI batches cond and uncond when memory allows);
    every method takes the numbers of their streams (streams.py) in that order. State is kept for each of them apart, so
    it does not matter whether they come together or one after another. Chunks of one batch share a decision.
    """

    def __init__(
        self,
        config: CacheConfig,
        start_sigma: float = float("inf"),
        end_sigma: float = 0.0,
        total: Total = lambda value: value,
    ):
        self.config = config
        self.total = total
        self.steps: Steps | None = None  # of the run; without them the threshold stays where it begins
        self.start_sigma = start_sigma
        self.end_sigma = end_sigma
        self._states: dict[int, _State] = {}

    def reset(self) -> None:
        """Drop every tensor."""
        self._states.clear()

    def forget(self, stream: int) -> None:
        """Drop what is kept of one stream."""
        self._states.pop(stream, None)

    def ended(self, sigma: float) -> bool:
        """Whether sampling is past the part in which calls may be reused: nothing need be kept of a call."""
        return sigma < self.end_sigma

    def decide(self, streams: Sequence[int], signature: Tensor, sigma: float, step: int = 0) -> Decision:
        """Whether the call with this signature (B, S', C) at `sigma`, in a sampling step, may reuse earlier
        residuals."""
        states = [self._states.setdefault(stream, _State()) for stream in streams]
        changes = [self._observe(s, part, sigma) for s, part in zip(states, signature.chunk(len(states)))]
        known = [change for change in changes if change is not None]
        change = max(known) if len(known) == len(changes) else None
        threshold = min(self._threshold(state, step) for state in states)
        limit = self.config.max_consecutive_hits
        admitted = sigma <= self.start_sigma and all(state.calls > self.config.warmup_calls for state in states)
        reuse = (
            change is not None
            and change < threshold
            and admitted
            and (limit < 0 or all(state.hits < limit for state in states))
        )
        for state in states:
            state.hits = state.hits + 1 if reuse else 0
            if state.share is not None:
                state.share.reused += reuse
            if not reuse:
                state.accumulated = 0.0
                self._make_room(state, sigma)
        return Decision(reuse, change, threshold, admitted)

    def _threshold(self, state: _State, step: int) -> float:
        config = self.config
        if not config.reuse_share or self.steps is None:
            return config.threshold
        state.share = state.share or ShareController(config.reuse_share, config.order + 1)
        return state.share.next(step, self.steps)

    def apply(self, streams: Sequence[int], hidden: Tensor) -> Tensor:
        """The image tokens after the last block, (B, S, C), from those after the first, for a reused call."""
        parts = []
        for stream, part in zip(streams, hidden.chunk(len(streams))):
            state = self._states[stream]
            assert state.weights is not None
            parts.append(part + combine([point.residual for point in state.points], state.weights))
        return torch.cat(parts)

    def store(self, streams: Sequence[int], signature: Tensor, residual: Tensor, sigma: float) -> None:
        """Keep what a computed call showed; the tensors must not be changed afterwards."""
        count = len(streams)
        for stream, sign, change in zip(streams, signature.chunk(count), residual.chunk(count)):
            self._states[stream].points.append(_Point(sigma, sign, change))

    def _make_room(self, state: _State, sigma: float) -> None:
        """Drop what the computed call at `sigma` will replace: before the stack runs, so that no more than
        order + 1 hidden states exist at any time. Two-call samplers come back to a sigma; one point stays of it."""
        points = [point for point in state.points if point.sigma != sigma]
        state.points = points[max(len(points) - self.config.order, 0) :]

    def _observe(self, state: _State, signature: Tensor, sigma: float) -> float | None:
        """Count a call of one stream and measure its change; None if there is nothing to compare with."""
        state.calls += 1
        if state.points and state.points[-1].signature.shape != signature.shape:
            state.points = []  # another number of tokens for a latent of the same size
        previous, state.previous = state.previous, signature
        if not state.points:
            return None
        signatures = [point.signature for point in state.points]
        if self.config.predictor == "fit":
            state.weights = fitted_weights(signatures, signature, self.total)
        else:
            state.weights = taylor_weights([point.sigma for point in state.points], sigma, len(signature))
        if self.config.accumulate:
            assert previous is not None
            state.accumulated += relative_change(signature, previous, self.total)
            change = state.accumulated
        else:
            change = relative_change(signature, combine(signatures, state.weights), self.total)
        return change if float(state.weights.abs().max()) <= WEIGHT_LIMIT else None


def relative_change(value: Tensor, reference: Tensor, total: Total = lambda value: value) -> float:
    """Mean absolute difference over mean absolute reference, the largest of the samples of (B, S, C). total: sums over
    the processes that have the other tokens.

    A reference of zeros or a value that is not finite gives infinity or NaN, neither of which is below a threshold.
    """
    sums = [part.abs().sum(dim=(1, 2), dtype=torch.float32) for part in (value - reference, reference)]
    difference, whole = total(torch.stack(sums))
    return float((difference / whole).max())
