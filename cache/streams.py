"""Which earlier calls a call goes on from: streams.

One evaluation of the model may take several calls of one conditioning at one sigma: tiles, the samples of a batch in
turn, guidance that calls the model again with something perturbed. Each of them must be compared with its own like in
the step before, never with another. A call's stream is found by

- its identity: the conditioning, the window of frames, size and device, and what else its options say (`identities`);
- its place among the calls of one identity in one evaluation: two of these never share a stream. Evaluations are
  counted where ComfyUI makes them (`Evaluations`), so a sampler that comes back to a sigma (heun, dpm_2, a corrector)
  stays in its stream, and guidance is told apart whose perturbation nothing shows;
- its input: what is not at all like the last input of a stream does not go on from it (other tiles, tiles in
  another order, fresh noise).

Where the number of calls of one identity changes (guidance begins or ends), places mean something else, and the streams
of that identity end. A stream ends, too, that neither this sigma nor the one before has called.

Letters: B batch, C channels, N sampled values.
"""

import threading
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..models import ModelCall, RunModel
from .prediction import Total

EVALUATION_KEY = "skein_evaluation"  # in transformer_options: the number of the evaluation that a call belongs to
NOT_IDENTITY = ("sigmas", "sample_sigmas", "cond_or_uncond", "uuids", "context_window", EVALUATION_KEY)
SAMPLED = 8192  # positions of a latent that inputs are compared by
LIKE = 0.7  # the least cosine of an input and the last one of its stream
MARGIN = 0.05  # a stream whose cosine is larger by this comes before one whose turn it is


class Evaluations:
    """Counts a sampler's evaluations of the model, and tells each model call which one it belongs to."""

    def __init__(self) -> None:
        self.number = 0

    def around_evaluation(self, execute: Callable, *args: Any, **kwargs: Any) -> Any:
        """PREDICT_NOISE wrapper."""
        self.number += 1
        return execute(*args, **kwargs)

    def around_model(self, call: ModelCall, run: RunModel) -> Any:
        """Around the model's calls."""
        call.options[EVALUATION_KEY] = self.number
        return run(call)


@dataclass
class _Stream:
    number: int
    input: Tensor  # a sample of its last one, as a unit vector
    evaluation: Hashable = None  # of its last call
    stage: int = 0  # of its last call


@dataclass
class _Places:
    """The streams of one identity, in the order in which they began."""

    streams: list[_Stream] = field(default_factory=list)
    calls: int = 0  # in this evaluation
    before: int | None = None  # in the last one that had any


class Streams:
    """The streams of one run. forget: called with the number of each one that has ended. total: sums over the processes
    that share a video; all have the whole input, and must find the same streams."""

    def __init__(self, forget: Callable[[int], None], total: Total):
        self._forget = forget
        self._total = total
        self._places: dict[Hashable, _Places] = {}
        self._evaluation: Hashable = None
        self._sigma: float | None = None
        self._stage = 0  # evaluations in a row at one sigma: tiles may be an evaluation each
        self._begun = 0
        self._lock = threading.Lock()  # ComfyUI's MultiGPU calls the model on several threads

    def find(self, options: dict, latent: Tensor, sigma: float) -> list[int]:
        """The numbers of the streams that the chunks of a call go on with; new ones where there is nothing to go on
        from. latent: the model's input (B, C, ...)."""
        keys = identities(options, latent)
        with self._lock:
            self._begin(options.get(EVALUATION_KEY) or ("sigma", sigma), sigma)
            return [self._next(key, part) for key, part in zip(keys, latent.chunk(len(keys)))]

    def _begin(self, evaluation: Hashable, sigma: float) -> None:
        if evaluation == self._evaluation:
            return
        self._evaluation = evaluation
        if sigma != self._sigma:
            self._sigma, self._stage = sigma, self._stage + 1
        for key, places in list(self._places.items()):
            changed = places.calls and places.before not in (None, places.calls)
            streams, places.streams = places.streams, []
            for stream in streams:
                if changed or stream.stage < self._stage - 1:
                    self._forget(stream.number)
                else:
                    places.streams.append(stream)
            if places.calls:
                places.before, places.calls = places.calls, 0
            if not places.streams and not changed:
                del self._places[key]

    def _next(self, key: Hashable, latent: Tensor) -> int:
        places, sample = self._places.setdefault(key, _Places()), _sample(latent)
        stream = self._like(sample, [s for s in places.streams if s.evaluation != self._evaluation])
        if stream is None:
            stream = _Stream(self._begun, sample)
            places.streams.append(stream)
            self._begun += 1
        stream.input, stream.evaluation, stream.stage = sample, self._evaluation, self._stage
        places.calls += 1
        return stream.number

    def _like(self, sample: Tensor, streams: Sequence[_Stream]) -> _Stream | None:
        """The first stream whose last input is as much like this one as any's; None if none is."""
        if not streams:
            return None
        cosines = torch.stack([stream.input for stream in streams]) @ sample
        sums = self._total(torch.cat([cosines, cosines.new_ones(1)]))
        likeness = (sums[:-1] / sums[-1]).tolist()  # in each process the same
        best = max(likeness)
        if not best >= LIKE:  # NaN is not
            return None
        return next(stream for stream, like in zip(streams, likeness) if like >= best - MARGIN)


def _sample(latent: Tensor) -> Tensor:
    """Evenly spaced values of (B, C, ...) as a unit vector (N), float32, without the mean of each channel."""
    flat = latent.flatten(2)
    values = flat[:, :, :: max(flat.shape[2] // SAMPLED, 1) | 1].float()
    values = (values - values.mean(dim=2, keepdim=True)).flatten()
    return values / values.norm().clamp(min=1e-30)


def identities(options: dict, latent: Tensor) -> list[Hashable]:
    """What the chunks of this call's batch are, as far as the call shows: ComfyUI's id of each one's conditioning, the
    window of frames where context windows are in use, size and device, and what else its options hold."""
    window = getattr(options.get("context_window"), "index_list", None)
    others = {name: value for name, value in options.items() if name not in NOT_IDENTITY}
    uuids = options.get("uuids") or options.get("cond_or_uncond") or [None]
    if len(latent) % len(uuids):  # a part of ComfyUI's batch, which another pack has split
        uuids = [tuple(uuids)]
    size = (len(latent) // len(uuids), *latent.shape[1:])
    common = (tuple(window) if window is not None else None, size, latent.device, _content(others))
    return [(uuid, *common) for uuid in uuids]


def _content(value: Any, listed: bool = False) -> Hashable:
    """What can tell an option of one call from that of another in the same step and is the same in the next: keys,
    flags, texts, numbers in lists (blocks), functions by their code, for some packs make them anew for each call. Of
    all else, numbers above all (steps are counted, strengths follow a schedule), the type only."""
    if isinstance(value, (bool, str)) or (listed and isinstance(value, int)):
        return value
    if isinstance(value, dict):
        return frozenset((key, _content(each)) for key, each in value.items())
    if isinstance(value, (list, tuple)):
        return tuple(_content(each, listed=True) for each in value)
    code = _code(value)
    return str(type(value)) if code is None else code


def _code(value: Any) -> Hashable:
    """The code of a function, also of a method or a partial one; None of what is no function."""
    function = getattr(value, "func", value)
    return getattr(function, "__code__", None) or getattr(function, "__qualname__", None)
