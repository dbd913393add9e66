"""The plan: what the nodes ask for, as plain data that every room shares.

A node clones the model, replaces one field of the plan on it and returns the clone; the engine carries the
plan out when sampling starts. So the order of our nodes does not matter, the last of two equal nodes wins, and
the same object can be pickled to another process.
"""

import math
from dataclasses import dataclass, field

PLAN_KEY = "skein"  # the attachment and wrapper key on a ModelPatcher
PREDICTORS = ("fit", "taylor")
KERNELS = ("auto", "flash3", "flash4", "cudnn", "sage", "flash2", "stock")
FP8_MODES = ("per_tensor", "per_row", "weight_only")
COMPILE_MODES = ("default", "max-autotune-no-cudagraphs", "max-autotune")
DYNAMIC_SHAPES = ("auto", "on", "off")


@dataclass(frozen=True)
class CacheConfig:
    """Settings of the first-block cache (see cache/first_block.py). Raises ValueError on values out of range.

    threshold: a call is reused while its expected relative error stays below this; 0 switches the cache off.
    start_percent, end_percent: the part of sampling, 0 to 1, in which calls may be reused.
    warmup_calls: model calls at the start that are always computed.
    max_consecutive_hits: computed call forced after this many reused ones; -1 for no limit.
    order: 0 reuses the last residual; 1 and 2 extrapolate from the last two or three computed calls.
    predictor: how orders 1 and 2 extrapolate: "fit" to what the first block shows, or "taylor" over sigma.
    accumulate: compare the change summed since the last computed call, not the last change alone.
    node_id: the node to show the result on; not part of the plan's identity.
    """

    threshold: float = 0.06
    start_percent: float = 0.0
    end_percent: float = 1.0
    warmup_calls: int = 0
    max_consecutive_hits: int = -1
    order: int = 2
    predictor: str = "fit"
    accumulate: bool = False
    node_id: str | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if not (math.isfinite(self.threshold) and 0 <= self.threshold <= 1):
            raise ValueError(f"The threshold must lie between 0 and 1, not {self.threshold}; 0 switches the cache off.")
        if not (0 <= self.start_percent <= 1 and 0 <= self.end_percent <= 1):
            raise ValueError("start_percent and end_percent must lie between 0 and 1.")
        if self.start_percent > self.end_percent:
            raise ValueError(
                f"start_percent ({self.start_percent}) lies after end_percent ({self.end_percent}); swap the two."
            )
        if self.warmup_calls < 0:
            raise ValueError(f"warmup_calls must be 0 or more, not {self.warmup_calls}.")
        if self.max_consecutive_hits < -1:
            raise ValueError(
                f"max_consecutive_hits must be 0 or more, or -1 for no limit, not {self.max_consecutive_hits}."
            )
        if self.order not in (0, 1, 2):
            raise ValueError(f"The prediction order must be 0, 1 or 2, not {self.order}.")
        _one_of("predictor", self.predictor, PREDICTORS)


@dataclass(frozen=True)
class AttentionConfig:
    """Settings of the attention (see attention/). Raises ValueError on values out of range.

    kernel: one of KERNELS; "auto" takes the fastest exact one that this GPU and these packages run.
    trim_text: cut padded text tokens and drop their mask, so that fast kernels run.
    allow_8bit: "auto" may take 8-bit kernels, and flash3 runs in FP8.
    exact_steps: under allow_8bit, this many first and last sampling steps stay exact.
    node_id: the node to show the result on; not part of the plan's identity.
    """

    kernel: str = "auto"
    trim_text: bool = True
    allow_8bit: bool = False
    exact_steps: int = 2
    node_id: str | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        _one_of("attention kernel", self.kernel, KERNELS)
        if self.exact_steps < 0:
            raise ValueError(f"exact_steps must be 0 or more, not {self.exact_steps}.")
        if self.kernel == "sage" and not self.allow_8bit:
            raise ValueError("The sage kernel computes in 8 bits; switch allow_8bit on, or choose another kernel.")


@dataclass(frozen=True)
class FP8Config:
    """Settings of FP8 linear layers (see quantization/). Raises ValueError on values out of range.

    mode: FP8 arithmetic with one scale per tensor or per row, or weight_only: FP8 storage, exact arithmetic.
    modulation: store the modulation layers in FP8 too, a quarter of HunyuanVideo's weights; they compute exactly.
    node_id: the node to show the result on; not part of the plan's identity.
    """

    mode: str = "per_tensor"
    modulation: bool = True
    node_id: str | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        _one_of("FP8 mode", self.mode, FP8_MODES)


@dataclass(frozen=True)
class CompileConfig:
    """Settings of compiled blocks (see compilation/). Raises ValueError on values out of range.

    mode: one of torch.compile's modes.
    dynamic: sizes as variables of the compiled code: from the start, never, or ("auto") once one has changed.
    warm_up: compile before the first step, on the size of this run.
    cache_folder: where compiled code is kept; empty for PyTorch's own choice.
    node_id: the node to show the result on; not part of the plan's identity.
    """

    mode: str = "default"
    dynamic: str = "auto"
    warm_up: bool = True
    cache_folder: str = ""
    node_id: str | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        _one_of("compile mode", self.mode, COMPILE_MODES)
        _one_of("dynamic", self.dynamic, DYNAMIC_SHAPES)


@dataclass(frozen=True)
class Plan:
    """All that is asked of the engine; None where a technique is not asked for."""

    cache: CacheConfig | None = None
    attention: AttentionConfig | None = None
    fp8: FP8Config | None = None
    compile: CompileConfig | None = None


def _one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"The {name} must be one of {', '.join(choices)}, not {value!r}.")
