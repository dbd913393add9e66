"""What sparse attention did in a run, as plain data: its model calls, its layers, and what can be said of them."""

import time
import uuid
from dataclasses import dataclass, field


@dataclass
class SparseCall:
    """One model call. density: the share of attention's blocks that was computed, a mean over the layers, of which a
    dense one counts 1. error: the mean of the layers' measured errors. ms: of all its attentions, None until it is
    known. sparse: how many of them were."""

    step: int
    sigma: float
    density: float = 1.0
    error: float = 0.0
    sparse: int = 0
    attentions: int = 0
    ms: float | None = None


@dataclass
class SparseLayer:
    """One attention of a block, by the block's path: means over the calls in which it was sparse, of each head."""

    path: str
    density: list[float]
    error: list[float]
    calls: int = 1

    def add(self, density: list[float], error: list[float]) -> None:
        """One more call in which it was sparse."""
        self.calls += 1
        self.density = [mean + (new - mean) / self.calls for mean, new in zip(self.density, density)]
        self.error = [mean + (new - mean) / self.calls for mean, new in zip(self.error, error)]


@dataclass
class SparseRun:
    """The calls of one sampling run under sparse attention.

    dense_ms: of one attention computed in full, None where it has not been measured. kernel: which one runs.
    """

    max_error: float | None = None
    node_id: str | None = None
    kernel: str = ""
    dense_ms: float | None = None
    steps: int | None = None
    calls: list[SparseCall] = field(default_factory=list)
    layers: list[SparseLayer] = field(default_factory=list)
    started: float = field(default_factory=time.time)  # seconds since the epoch
    id: str = field(default_factory=lambda: uuid.uuid4().hex[:12])
    ended: bool = False
    prompt_id: str | None = None  # ComfyUI's, of the prompt that it was part of
    workflow_id: str | None = None
    latent: list[float] = field(default_factory=list)  # values of the latent that it made (latents.py)
    version: int = 0  # of the state in which it changed last (events.py)

    @property
    def sparse_calls(self) -> list[SparseCall]:
        return [call for call in self.calls if call.sparse]

    @property
    def density(self) -> float:
        """Of attention in the calls in which it was sparse."""
        return _mean([call.density for call in self.sparse_calls], 1.0)

    @property
    def error(self) -> float:
        return _mean([call.error for call in self.sparse_calls], 0.0)

    @property
    def speedup(self) -> float | None:
        """Of attention in these calls: their time had each been computed in full, over what they took. The first one,
        in which kernels are tried, only counts where there is no other."""
        timed = [call for call in self.sparse_calls if call.ms]
        timed = timed[1:] or timed
        if not timed or self.dense_ms is None:
            return None
        return sum(call.attentions for call in timed) * self.dense_ms / sum(call.ms or 0.0 for call in timed)

    def summary(self) -> str:
        if not self.sparse_calls:
            return "all attention was dense"
        parts = [f"{100 * self.density:.0f} % of attention computed", f"{100 * self.error:.1f} % error"]
        if self.speedup is not None:
            parts.append(f"attention {self.speedup:.1f}x as fast")
        return ", ".join(parts)

    def sums(self) -> dict:
        """What the panel says of the calls."""
        return {"density": self.density, "error": self.error, "speedup": self.speedup, "summary": self.summary()}

    def as_dict(self) -> dict:
        """JSON-ready: every field but `latent`, and what is said of the calls. `layers`, thousands of numbers, when the
        run has ended."""
        fields = {**vars(self), "calls": [dict(vars(call)) for call in self.calls]}
        fields["layers"] = [_rounded(layer) for layer in self.layers] if self.ended else []
        del fields["latent"]
        return {**fields, **self.sums()}


def _rounded(layer: SparseLayer) -> dict:
    means = {name: [round(each, 5) for each in vars(layer)[name]] for name in ("density", "error")}
    return {**vars(layer), **means}


def _mean(values: list[float], none: float) -> float:
    return sum(values) / len(values) if values else none
