"""Activations whose last steps wait until a convolution asks for some rows of them.

Between two convolutions ComfyUI's decoders normalize, activate, enlarge, pad and join with the frames of the chunk
before, and each of these copies the whole activation. A Deferred tensor only notes such a step. A convolution computes
what is noted for a few rows at a time (slices.py), so none of these copies is ever whole. A step that is not known here
is computed at once, as ever: ComfyUI's forwards need not know of this, and may change.

B batch, C channels, T frames, H rows, W columns. A window is a span of frames and a span of rows, of all columns.
"""

import copy
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._pytree import tree_map_only

aten: Any = torch.ops.aten
SLICE = 1 << 28  # bytes of input and output that a step has in work at once
Span = tuple[int, int]  # first, end


def rows_of(row: int, height: int) -> int:
    """How many of `height` rows, of so many bytes each, are computed at a time."""
    return min(height, max(1, SLICE // row))


class Step:
    """One step before it is computed. shape: (B, C, T, H, W) of what it gives. sources: the steps before it."""

    def __init__(self, shape: tuple[int, ...], *sources: "Step"):
        self.shape, self.sources = tuple(shape), sources

    def fill(self, out: Tensor, frames: Span, rows: Span) -> None:
        """Write a window into `out`."""
        raise NotImplementedError

    def kept(self, first: int, keep: "Keep") -> "Step":
        """The frames from `first` on, computed so far that nothing but what `keep` is given need be kept for them."""
        return keep(_computed(self, (first, self.shape[2]), (0, self.shape[3]), _like(self)))


class Whole(Step):
    """What has been computed."""

    def __init__(self, tensor: Tensor, ours: bool = True):
        super().__init__(tensor.shape)
        self.tensor, self.ours = tensor, ours

    def fill(self, out: Tensor, frames: Span, rows: Span) -> None:
        out.copy_(window(self, frames, rows, out))

    def kept(self, first: int, keep: "Keep") -> Step:
        return keep(self.tensor[:, :, first:].clone())


class Away(Step):
    """What waits in the host's memory until it is read. host: where, pinned for a GPU. Nobody waits for the copies: all
    are of the stream that computes, so one that uses this memory again comes after this one's."""

    def __init__(self, tensor: Tensor, host: Tensor):
        super().__init__(tensor.shape)
        self.host = host.copy_(tensor, non_blocking=True)
        self.here: Tensor | None = None

    def fill(self, out: Tensor, frames: Span, rows: Span) -> None:
        if self.here is None:  # stays as long as this step, which one convolution has for itself
            self.here = torch.empty_like(self.host, device=out.device).copy_(self.host, non_blocking=True)
        out.copy_(self.here[:, :, frames[0] : frames[1], rows[0] : rows[1]])


Keep = Callable[[Tensor], Step]


class Local(Step):
    """What one place of the frame makes of the same place: function(out, *inputs) writes it, where out may be the first
    input."""

    def __init__(self, function: Callable[..., object], channels: int, *sources: Step):
        shape = sources[0].shape
        super().__init__((shape[0], channels, *shape[2:]), *sources)
        self.function = function

    def fill(self, out: Tensor, frames: Span, rows: Span) -> None:
        first, *rest = self.sources
        if isinstance(first, Whole) or first.shape != self.shape:
            x = window(first, frames, rows, out)
        else:
            first.fill(out, frames, rows)
            x = out
        self.function(out, x, *(window(each, frames, rows, out) for each in rest))


class Cut(Step):
    """The frames from `first` to `end`."""

    def __init__(self, source: Step, first: int, end: int):
        super().__init__((*source.shape[:2], end - first, *source.shape[3:]), source)
        self.first = first

    def fill(self, out: Tensor, frames: Span, rows: Span) -> None:
        self.sources[0].fill(out, (frames[0] + self.first, frames[1] + self.first), rows)

    def kept(self, first: int, keep: Keep) -> Step:
        (source,) = self.sources
        if self.first + self.shape[2] == source.shape[2]:
            return source.kept(self.first + first, keep)
        return super().kept(first, keep)


class Joined(Step):
    """One after the other in time."""

    def __init__(self, *sources: Step):
        shape = sources[0].shape
        super().__init__((*shape[:2], sum(source.shape[2] for source in sources), *shape[3:]), *sources)

    def fill(self, out: Tensor, frames: Span, rows: Span) -> None:
        start = 0
        for source in self.sources:
            first, end = max(frames[0], start), min(frames[1], start + source.shape[2])
            if first < end:
                source.fill(out.narrow(2, first - frames[0], end - first), (first - start, end - start), rows)
            start += source.shape[2]

    def kept(self, first: int, keep: Keep) -> Step:
        last = self.sources[-1]
        before = self.shape[2] - last.shape[2]
        return last.kept(first - before, keep) if first >= before else super().kept(first, keep)


class Enlarged(Step):
    """Each frame, row and column so many times."""

    def __init__(self, source: Step, factors: tuple[int, ...]):
        super().__init__((*source.shape[:2], *(size * times for size, times in zip(source.shape[2:], factors))), source)
        self.factors = factors

    def fill(self, out: Tensor, frames: Span, rows: Span) -> None:
        t, h, _ = self.factors
        small_frames, small_rows = (
            (first // times, -(-end // times)) for (first, end), times in ((frames, t), (rows, h))
        )
        small = window(self.sources[0], small_frames, small_rows, out)
        large = functional.interpolate(small, scale_factor=[float(times) for times in self.factors], mode="nearest")
        first, top = frames[0] % t, rows[0] % h
        out.copy_(large[:, :, first : first + out.shape[2], top : top + out.shape[3]])

    def kept(self, first: int, keep: Keep) -> Step:
        times = self.factors[0]
        before = first // times
        source = Enlarged(self.sources[0].kept(before, keep), self.factors)
        return source if first == before * times else Cut(source, first - before * times, source.shape[2])


class Padded(Step):
    """With so many columns, rows and frames more at either side: what is at the edge again, or zeros."""

    def __init__(self, source: Step, padding: list[int], zeros: bool = False):
        left, right, top, bottom, front, back = padding
        b, c, t, h, w = source.shape
        super().__init__((b, c, front + t + back, top + h + bottom, left + w + right), source)
        self.padding, self.zeros = list(padding), zeros

    def fill(self, out: Tensor, frames: Span, rows: Span) -> None:
        (source,) = self.sources
        left, _, top, _, front, _ = self.padding
        inner_frames, inner_rows = (
            (max(first - more, 0), min(end - more, size))
            for (first, end), more, size in zip((frames, rows), (front, top), source.shape[2:4])
        )
        places = [
            (2, inner_frames[0] + front - frames[0], inner_frames[1] - inner_frames[0]),
            (3, inner_rows[0] + top - rows[0], inner_rows[1] - inner_rows[0]),
            (4, left, source.shape[4]),
        ]
        parts = [out]
        for place in places:
            parts.append(parts[-1].narrow(*place))
        source.fill(parts.pop(), inner_frames, inner_rows)
        for place in reversed(places):
            self._edges(parts.pop(), *place)

    def _edges(self, x: Tensor, dim: int, before: int, size: int) -> None:
        end = before + size
        for first, count, edge in ((0, before, before), (end, x.shape[dim] - end, end - 1)):
            if count and self.zeros:
                x.narrow(dim, first, count).zero_()
            elif count:
                x.narrow(dim, first, count).copy_(x.narrow(dim, edge, 1))

    def kept(self, first: int, keep: Keep) -> Step:
        *sides, front, back = self.padding
        if first < front or back:
            return super().kept(first, keep)
        return Padded(self.sources[0].kept(first - front, keep), [*sides, 0, 0], self.zeros)


class UsedAgain(RuntimeError):
    """A decoder of another form: it needs what has left it, or has been overwritten."""


class Gone(Step):
    """What has been taken away. It has no values."""


def whole_steps(step: Step) -> Iterator[Whole]:
    if isinstance(step, Whole):
        yield step
    for source in step.sources:
        yield from whole_steps(source)


def _like(step: Step) -> Tensor:
    """A tensor of the type and on the device of what a step gives."""
    found = next(whole_steps(step), None)
    if found is None:
        raise UsedAgain("frames that were taken away are used once more")
    return found.tensor


def window(step: Step, frames: Span, rows: Span, like: Tensor) -> Tensor:
    """A window (B, C, T, H, W), to be read only."""
    if isinstance(step, Whole):
        return step.tensor[:, :, frames[0] : frames[1], rows[0] : rows[1]]
    return _computed(step, frames, rows, like)


def _computed(step: Step, frames: Span, rows: Span, like: Tensor) -> Tensor:
    b, c, _, _, w = step.shape
    out = like.new_empty((b, c, frames[1] - frames[0], rows[1] - rows[0], w))
    step.fill(out, frames, rows)
    return out


class Deferred(torch.Tensor):
    """A tensor (B, C, T, H, W) as ComfyUI sees it, with steps in the place of its values.

    keep: what keeps the frames that ComfyUI clones to carry them to the next chunk; that of `like`, if not given.
    """

    step: Step | None
    keep: Keep

    @staticmethod
    def __new__(cls, step: Step, like: Tensor, keep: Keep | None = None) -> "Deferred":
        made = torch.Tensor._make_wrapper_subclass(cls, step.shape, dtype=like.dtype, device=like.device)
        made.step = step
        made.keep = keep or (like.keep if isinstance(like, Deferred) else Whole)
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        kwargs = kwargs or {}
        if func in NOTED:
            result = NOTED[func](*args, **kwargs)
            if result is not None:
                return result
        args, kwargs = tree_map_only(Deferred, plain, (args, kwargs))
        return func(*args, **kwargs)

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]


def step_of(x: Tensor) -> Step:
    if not isinstance(x, Deferred):
        return Whole(x, ours=False)
    if x.step is None:
        raise UsedAgain("an activation is used once more after a convolution has used up its memory")
    return x.step


def plain(x: Tensor) -> Tensor:
    """All values of x, computed if they are not yet."""
    if not isinstance(x, Deferred):
        return x
    if not isinstance(x.step, Whole):
        x.step = Whole(used_up(x))
    return x.step.tensor


def used_up(x: Tensor, apply: Callable[[Tensor], Tensor] | None = None, channels: int = 0, reach: int = 0) -> Tensor:
    """What `apply` makes of x (of so many channels), or all of x, computed for a few rows at a time; each of its rows
    needs `reach` more of x on both sides. x is not used again: an input that nobody else has lends its memory."""
    step = step_of(x)
    if isinstance(x, Deferred):
        x.step = None
    inputs = [(weakref.ref(each), each.tensor) for each in whole_steps(step) if each.ours]
    like = _like(step)
    step = _twin(step)  # the steps before it are gone now, unless they are somebody's
    free = [tensor for seen, tensor in inputs if seen() is None]
    del inputs
    b, before, frames, height, width = step.shape
    height -= 2 * reach
    count = rows_of(b * (before + (channels or before)) * frames * width * like.element_size(), height)
    out: Tensor | None = None
    ready: Tensor | None = None
    for first in range(0, height, count):
        part = window(step, (0, frames), (first, min(first + count, height) + 2 * reach), like)
        if out is not None and ready is not None:  # the rows that it overwrites have been read by now
            out[:, :, :, first - count : first].copy_(ready)
            ready = None
        if apply is not None:
            part = apply(part)
        if count == height:
            return part
        if out is None:
            shape = (*part.shape[:3], height, part.shape[4])
            out = next((tensor for tensor in free if tensor.shape == shape), None)
            out, free = like.new_empty(shape) if out is None else out, []
        ready = part
        del part
    assert out is not None and ready is not None
    out[:, :, :, height - ready.shape[3] :].copy_(ready)
    return out


def _twin(step: Step) -> Step:
    twin = copy.copy(step)
    twin.sources = tuple(_twin(source) for source in step.sources)
    return twin


def _pad(x: Any, padding: list[int], mode: str = "constant", value: float | None = None) -> Tensor | None:
    edges = mode == "replicate" or (mode == "constant" and not value)
    if not edges or min(padding) < 0 or len(padding) > 6:
        return None
    return Deferred(Padded(step_of(x), [*padding, *[0] * (6 - len(padding))], mode == "constant"), x)


def _cat(tensors: list[Any], dim: int = 0) -> Tensor | None:
    if dim != 2 or any(each.ndim != 5 for each in tensors):
        return None
    return Deferred(Joined(*map(step_of, tensors)), next(each for each in tensors if isinstance(each, Deferred)))


def _slice(x: Any, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1) -> Tensor | None:
    if dim != 2 or step != 1:
        return None
    first, end, _ = slice(start, end).indices(x.shape[2])
    return Deferred(Cut(step_of(x), first, max(first, end)), x)


def _clone(x: Any, memory_format: Any = None) -> Tensor | None:
    return Deferred(step_of(x).kept(0, x.keep), x)


def _enlarge(x: Any, size: Any, factors: Any) -> Tensor | None:
    if factors is None or any(factor != int(factor) for factor in factors):
        return None
    return Deferred(Enlarged(step_of(x), tuple(map(int, factors))), x)


def _silu(x: Any) -> Any:
    return Deferred(Local(lambda out, x: aten.silu.out(x, out=out), x.shape[1], step_of(x)), x)


def _silu_in_place(x: Any) -> Tensor:
    if isinstance(x.step, Whole):
        aten.silu_(x.step.tensor)
    else:
        x.step = _silu(x).step
    return x


def _add(x: Any, y: Any, alpha: float = 1) -> Tensor | None:
    if alpha != 1 or not isinstance(y, Tensor) or x.shape != y.shape or x.dtype != y.dtype:
        return None
    step = Local(lambda out, x, y: torch.add(x, y, out=out), x.shape[1], step_of(x), step_of(y))
    return Deferred(step, x if isinstance(x, Deferred) else y)


def _dropout(x: Any, p: float, train: bool) -> Tensor | None:
    return None if train and p else x


# What is noted, by PyTorch's operator; a function that gives None leaves it to be computed.
NOTED: dict[Any, Callable[..., Tensor | None]] = {
    aten.pad.default: _pad,
    aten.replication_pad3d.default: lambda x, padding: _pad(x, padding, "replicate"),
    aten.cat.default: _cat,
    aten.slice.Tensor: _slice,
    aten.clone.default: _clone,
    aten.upsample_nearest3d.vec: _enlarge,
    aten.silu.default: _silu,
    aten.silu_.default: _silu_in_place,
    aten.add.Tensor: _add,
    aten.dropout.default: _dropout,
    aten.dropout_.default: _dropout,
}
