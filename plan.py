"""The plan: what the nodes ask for, as plain data that every room shares.

A node clones the model, replaces one field of the plan on it and returns the clone; the engine carries the
plan out when sampling starts. So the order of our nodes does not matter, the last of two equal nodes wins, and
the same object can be pickled to another process.
"""

import re
from dataclasses import dataclass, field, fields
from typing import Any, get_args, get_type_hints

PLAN_KEY = "skein"  # the attachment and wrapper key on a ModelPatcher
MODEL_DEFAULT = -1.0  # as a threshold: the one of the model's architecture
LARGEST_SHARE = 0.9  # of calls to reuse
PREDICTORS = ("fit", "taylor")
KERNELS = ("auto", "flash3", "flash4", "cudnn", "sage", "flash2", "stock")
FP8_MODES = ("per_row", "per_tensor", "weight_only")
COMPILE_MODES = ("default", "no-cudagraphs", "max-autotune-no-cudagraphs", "max-autotune")
DYNAMIC_SHAPES = ("auto", "on", "off")
CPU_PROCESSES = 16  # at most: each takes 0.5 to 0.9 GB of host memory before it has a model
DECODE_MODES = ("auto", "whole", "tiled")
SPARSE_RULES = ("max_error", "density", "tau")
PRESETS = ("balanced", "exact", "fastest", "low memory")


@dataclass(frozen=True)
class CacheConfig:
    """Settings of the first-block cache (see cache/first_block.py). Raises ValueError on values out of range.

    threshold: a call is reused while its expected relative error stays below this; 0 switches the cache off, and
        MODEL_DEFAULT is replaced by the model's own when the plan is put on it.
    start_percent, end_percent: the part of sampling, 0 to 1, in which calls may be reused.
    warmup_calls: model calls at the start that are always computed.
    max_consecutive_hits: computed call forced after this many reused ones; -1 for no limit.
    order: 0 reuses the last residual; 1 and 2 extrapolate from the last two or three computed calls.
    predictor: how orders 1 and 2 extrapolate: "fit" to what the first block shows, or "taylor" over sigma.
    accumulate: compare the change summed since the last computed call, not the last change alone.
    sigmas: the two percents as sigmas, where the model's own sampling is not at hand; None: asked of the model.
    node_id: the node to show the result on; not part of the plan's identity.
    reuse_share: the share of all calls that is reused, by a threshold of its own that changes from call to call
        (cache/share.py); 0: `threshold` decides.
    """

    threshold: float = MODEL_DEFAULT
    start_percent: float = 0.0
    end_percent: float = 1.0
    warmup_calls: int = 0
    max_consecutive_hits: int = -1
    order: int = 2
    predictor: str = "fit"
    accumulate: bool = False
    sigmas: tuple[float, float] | None = None
    node_id: str | None = field(default=None, compare=False)
    reuse_share: float = 0.0

    def __post_init__(self) -> None:
        if self.threshold != MODEL_DEFAULT and not 0 <= self.threshold <= 1:
            raise ValueError(
                f"The threshold must lie between 0 and 1, or be -1 for the model's default, not {self.threshold}; "
                "0 switches the cache off."
            )
        if not 0 <= self.reuse_share <= LARGEST_SHARE:
            raise ValueError(
                f"reuse_share must lie between 0 and {LARGEST_SHARE}, not {self.reuse_share}; 0.5 reuses half of the "
                "calls, 0 leaves it to the threshold."
            )
        _check_range(self.start_percent, self.end_percent)
        if self.warmup_calls < 0:
            raise ValueError(f"warmup_steps must be 0 or more, not {self.warmup_calls}.")
        if self.max_consecutive_hits < -1:
            raise ValueError(
                f"max_consecutive_hits must be 0 or more, or -1 for no limit, not {self.max_consecutive_hits}."
            )
        if self.order not in (0, 1, 2):
            raise ValueError(f"predict_order must be 0, 1 or 2, not {self.order}.")
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
class SparseConfig:
    """Settings of sparse attention (see attention/sparse/). Raises ValueError on values out of range.

    max_error: the relative error of a layer's attention output that is accepted; 0 switches sparse attention off.
    rule: "max_error": as few blocks as that allows; "density": this share of the blocks in each layer; "tau": the
        blocks whose score is so many standard deviations above the mean of its row, as Sol-Attn takes them.
    start_percent, end_percent: the part of sampling, 0 to 1, in which attention is sparse.
    dense_blocks: numbers of blocks that stay dense, such as "0-2, -1"; -1 is the last one.
    min_tokens: shorter sequences stay dense; 0: those in which sparse attention is measured to be no faster.
    tail: what is left out enters as one term a block.
    sigmas: the two percents as sigmas, where the model's own sampling is not at hand; None: asked of the model.
    node_id: the node to show the result on; not part of the plan's identity.
    """

    max_error: float = 0.1
    rule: str = "max_error"
    density: float = 0.25
    tau: float = 1.0
    start_percent: float = 0.2
    end_percent: float = 1.0
    dense_blocks: str = ""
    min_tokens: int = 0
    tail: bool = True
    sigmas: tuple[float, float] | None = None
    node_id: str | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if not 0 <= self.max_error <= 1:
            raise ValueError(
                f"max_error must lie between 0 and 1, not {self.max_error}; 0 switches sparse attention off."
            )
        _one_of("rule of sparse attention", self.rule, SPARSE_RULES)
        if not 0 < self.density <= 1:
            raise ValueError(f"density must lie above 0 and be at most 1, not {self.density}.")
        if not -10 <= self.tau <= 10:
            raise ValueError(f"tau must lie between -10 and 10, not {self.tau}.")
        _check_range(self.start_percent, self.end_percent)
        if self.min_tokens < 0:
            raise ValueError(f"min_tokens must be 0 (measured) or more, not {self.min_tokens}.")
        self.stays_dense(0, 1)

    def stays_dense(self, block: int, blocks: int) -> bool:
        """Whether a block, by its number, of so many is among dense_blocks. Raises ValueError if these are no numbers
        of blocks."""
        for part in filter(None, self.dense_blocks.replace(" ", "").split(",")):
            found = re.fullmatch(r"(-?\d{1,4})(?:-(\d{1,4}))?", part, re.ASCII)
            if found is None:
                raise ValueError(
                    f'dense_blocks must be numbers of blocks such as "0-2, -1", not {self.dense_blocks[:60]!r}.'
                )
            first, last = int(found[1]), int(found[2] or found[1])
            if first <= block <= last or first == block - blocks:
                return True
        return False


@dataclass(frozen=True)
class FP8Config:
    """Settings of FP8 linear layers (see quantization/). Raises ValueError on values out of range.

    mode: FP8 arithmetic with one scale per tensor or per row, or weight_only: FP8 storage, exact arithmetic.
    modulation: store the modulation layers in FP8 too, a quarter of the model; their arithmetic stays exact.
    node_id: the node to show the result on; not part of the plan's identity.
    """

    mode: str = "per_row"
    modulation: bool = True
    node_id: str | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        _one_of("FP8 mode", self.mode, FP8_MODES)


@dataclass(frozen=True)
class CompileConfig:
    """Settings of compiled blocks (see compilation/). Raises ValueError on values out of range.

    mode: "default" or "max-autotune" of torch.compile; with no-cudagraphs, blocks are never run as CUDA graphs.
    dynamic: sizes as variables of the compiled code: from the start, never, or ("auto") once one has changed.
    warm_up: compile before the first step, on the size of this run.
    node_id: the node to show the result on; not part of the plan's identity.
    """

    mode: str = "default"
    dynamic: str = "auto"
    warm_up: bool = True
    node_id: str | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        _one_of("compile mode", self.mode, COMPILE_MODES)
        _one_of("dynamic", self.dynamic, DYNAMIC_SHAPES)


@dataclass(frozen=True)
class ParallelConfig:
    """Settings of context parallelism (see parallel/ and workers/). Raises ValueError on values that cannot be.

    devices: "all" GPUs, or their numbers ("0,1"), or "cpu,cpu" for two processes on the CPU.
    ulysses_degree, ring_degree: devices that exchange heads for tokens, and groups of them in a ring; their product is
        the number of devices. 0 for automatic.
    keep_warm: the workers stay between runs, with the model in their memory.
    node_id: the node to show the result on; not part of the plan's identity.
    """

    devices: str = "all"
    ulysses_degree: int = 0
    ring_degree: int = 0
    keep_warm: bool = True
    node_id: str | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        names = self.device_names
        check_devices(names, self.devices)
        if self.ulysses_degree < 0 or self.ring_degree < 0:
            raise ValueError("ulysses_degree and ring_degree must be 0 (automatic) or more.")
        if names != ["all"]:
            self.degrees(len(names))

    @property
    def device_names(self) -> list[str]:
        return device_names(self.devices)

    def degrees(self, world: int, heads: int | None = None) -> tuple[int, int]:
        """Ulysses and ring degree for so many devices; (0, 0) if both are automatic. Raises ValueError if they do not
        multiply to it, or if more devices than the model has heads would share these."""
        if not self.ulysses_degree and not self.ring_degree:
            return 0, 0
        ulysses = self.ulysses_degree or world // self.ring_degree
        ring = self.ring_degree or world // ulysses
        if ulysses * ring != world:
            raise ValueError(
                f"ulysses_degree {self.ulysses_degree} and ring_degree {self.ring_degree} do not multiply to {world} "
                "devices; set one of them to 0 to have it chosen."
            )
        if heads is not None and ulysses > heads:
            raise ValueError(
                f"This model has {heads} heads, which {ulysses} devices cannot share; set both degrees to 0."
            )
        return ulysses, ring


@dataclass(frozen=True)
class SlicesConfig:
    """Blocks in slices of tokens (see slices/). No node asks for it: a run has it where memory is short (footprint.py).
    Raises ValueError on values that cannot be.

    count: of slices; 1: never.
    """

    count: int

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"The number of slices must be 1 or more, not {self.count}.")


@dataclass(frozen=True)
class PresetConfig:
    """What the Speed Up node asks for: techniques that are chosen when sampling starts (see presets.py), for what no
    other node has set. Raises ValueError on values that cannot be.

    preset: one of PRESETS. devices: as in ParallelConfig; of several, those that shorten the run.
    node_id: the node to show the result on; not part of the plan's identity.
    """

    preset: str = "balanced"
    devices: str = "all"
    node_id: str | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        _one_of("preset", self.preset, PRESETS)
        check_devices(device_names(self.devices), self.devices)


@dataclass(frozen=True)
class DecodeConfig:
    """Settings of VAE decoding (see vae/): no part of a plan, a node carries them out at once. Raises ValueError.

    mode: "whole" cuts the frame into strips, one a device, and computes what one device would; "tiled" deals out the
        tiles of ComfyUI's tiled decoding; "auto" is whole where it fits. Whole may be in slices (vae/slices.py).
    devices: as in ParallelConfig.
    tile_size, overlap: pixels. temporal_size, temporal_overlap: frames. As ComfyUI's VAE Decode (Tiled) has them.
    node_id: the node to show the result on.
    """

    mode: str = "auto"
    devices: str = "all"
    tile_size: int = 512
    overlap: int = 64
    temporal_size: int = 64
    temporal_overlap: int = 8
    node_id: str | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        _one_of("decode mode", self.mode, DECODE_MODES)
        check_devices(self.device_names, self.devices)
        if self.tile_size < 64 or self.temporal_size < 8:
            raise ValueError("tile_size must be 64 or more, and temporal_size 8 or more.")
        if self.overlap < 0 or self.temporal_overlap < 0:
            raise ValueError("overlap and temporal_overlap must be 0 or more.")

    @property
    def device_names(self) -> list[str]:
        return device_names(self.devices)


def device_names(text: str) -> list[str]:
    """The devices that a text such as "0, 1" names."""
    return [name.lstrip("0") or "0" if is_number(name) else name for name in text.replace(" ", "").lower().split(",")]


def is_number(name: str) -> bool:
    """Whether a device's name is a GPU's number."""
    return name.isascii() and name.isdigit() and len(name) <= 4


def check_devices(names: list[str], text: str) -> None:
    """Raises ValueError if these cannot be devices."""
    shown = repr(text) if len(text) <= 60 else f"{text[:60]!r}..."
    if names != ["all"] and not all(map(is_number, names)) and set(names) != {"cpu"}:
        raise ValueError(f'devices must be "all", GPU numbers such as "0,1", or "cpu,cpu", not {shown}.')
    if "cpu" not in names and len(set(names)) < len(names):
        raise ValueError(f"devices names a GPU twice: {shown}.")
    if "cpu" in names and len(names) > CPU_PROCESSES:
        raise ValueError(
            f"devices asks for {len(names)} processes on the CPU; {CPU_PROCESSES} is the most, and more than "
            "the CPU has cores gain nothing."
        )


@dataclass(frozen=True)
class Plan:
    """All that is asked of the engine; None where a technique is not asked for.

    preset: fills in the techniques when sampling starts, and is None then (presets.py).
    slices: where it is None, the engine decides when sampling starts.
    """

    cache: CacheConfig | None = None
    attention: AttentionConfig | None = None
    fp8: FP8Config | None = None
    compile: CompileConfig | None = None
    parallel: ParallelConfig | None = None
    sparse: SparseConfig | None = None
    preset: PresetConfig | None = None
    slices: SlicesConfig | None = None

    @classmethod
    def of(cls, data: dict[str, dict[str, Any] | None]) -> "Plan":
        """The plan that dataclasses.asdict has made the data of."""
        kinds = {name: get_args(hint)[0] for name, hint in get_type_hints(cls).items()}
        return cls(**{name: None if config is None else kinds[name](**config) for name, config in data.items()})

    @property
    def techniques(self) -> list[str]:
        """The names of what is asked for; a threshold of 0 asks for no cache, a max_error of 0 for no sparse
        attention."""
        asked = [each.name for each in fields(self) if getattr(self, each.name) is not None]
        off = ["preset"]
        if self.cache is not None and self.cache.threshold == 0:
            off.append("cache")
        if self.sparse is not None and self.sparse.rule == "max_error" and self.sparse.max_error == 0:
            off.append("sparse")
        if self.slices is not None and self.slices.count == 1:
            off.append("slices")
        return [name for name in asked if name not in off]

    @property
    def loads_plainly(self) -> bool:
        """Whether the model is loaded without ComfyUI's dynamic VRAM, with which FP8 and compiled blocks cannot work:
        weights that do not fit come block by block then (offloaded.py)."""
        return self.fp8 is not None or self.compile is not None


def _check_range(start_percent: float, end_percent: float) -> None:
    if not (0 <= start_percent <= 1 and 0 <= end_percent <= 1):
        raise ValueError("start_percent and end_percent must lie between 0 and 1.")
    if start_percent > end_percent:
        raise ValueError(f"start_percent ({start_percent}) lies after end_percent ({end_percent}); swap the two.")


def _one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"The {name} must be one of {', '.join(choices)}, not {value!r}.")
