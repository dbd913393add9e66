"""ComfyUI's decoder computing all of the frame, its layers a few rows at a time: the same pixels in less memory.

As in layers.py, instances of ComfyUI's layers are changed for the duration of a decode. Norms and convolutions of one
place only are noted (deferred.py), other convolutions compute what has been noted for a few rows at a time, over their
input where nobody else has it. What stays in memory is what goes into a block, what its convolution makes of it, and
the frames that all convolutions carry to the next chunk.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..attributes import changed
from .deferred import Away, Deferred, Gone, Keep, Local, Padded, Step, Whole, plain, step_of, used_up
from .layers import CONVOLUTIONS, Changes, attentions, scale_and_shift
from .strip import Strip

WHOLE = Strip(-1, (1,))


@contextmanager
def computing_in_slices(
    decoder: nn.Module,
    before: Callable[[], None],
    take: Callable[[Tensor], None] | None = None,
    keep: Keep = Whole,
) -> Iterator[None]:
    """Within: the decoder decodes in slices. before: called before every convolution, and may raise. take: given each
    chunk of decoded frames (B, C, T, H, W), so that the decoder's own result has no values. keep: what keeps the frames
    that a convolution carries to the next chunk."""
    with changed([*_convolutions(decoder, before, take, keep), *_norms(decoder, keep), *attentions(decoder, WHOLE)]):
        yield


class Carried:
    """Keeps carried frames on the device as far as there is room (bytes), the others in the host's memory, which each
    convolution's next ones use again."""

    def __init__(self, room: int):
        self.room = room
        self._unused: list[Tensor] = []  # of the host's memory

    def __call__(self, frames: Tensor) -> Step:
        size = frames.nbytes
        if size > self.room:
            step: Step = Away(frames, host := self._host(frames))
            weakref.finalize(step, self._unused.append, host)
            return step
        step = Whole(frames)
        self.room -= size
        weakref.finalize(step, self._gone, size)
        return step

    def _host(self, frames: Tensor) -> Tensor:
        """Memory for frames like these."""
        for i, host in enumerate(self._unused):
            if host.shape == frames.shape and host.dtype == frames.dtype:
                return self._unused.pop(i)
        device = None if frames.is_meta else "cpu"
        return torch.empty_like(frames, device=device, pin_memory=frames.is_cuda)

    def _gone(self, size: int) -> None:
        self.room += size


def _convolutions(
    decoder: nn.Module, before: Callable[[], None], take: Callable[[Tensor], None] | None, keep: Keep
) -> Changes:
    modules: list[Any] = [module for module in decoder.modules() if isinstance(module, CONVOLUTIONS)]
    for module in modules:
        if not isinstance(module, nn.Conv3d):
            yield module, "_conv_forward", _as_ever(module._conv_forward, before)
            continue
        pads = int(module.padding[1])
        if pads:  # with rows, which it is given then
            yield module, "padding", (module.padding[0], 0, module.padding[2])
        last = take if module is modules[-1] else None
        yield module, "_conv_forward", _convolution(module, module._conv_forward, pads, before, last, keep)


def _as_ever(original: Callable, before: Callable[[], None]) -> Callable:
    def convolve(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        before()
        return original(plain(x), *args, **kwargs)

    return convolve


def _convolution(
    module: Any,
    original: Callable,
    pads: int,
    before: Callable[[], None],
    take: Callable[[Tensor], None] | None,
    keep: Keep,
) -> Callable:
    reach, channels = module.kernel_size[1] // 2, module.out_channels

    def here(x: Tensor, weight: Tensor, bias: Tensor | None, **kwargs: Any) -> Tensor:
        # Used later, when ComfyUI may have put other weights where these are.
        own = weight.clone(), None if bias is None else bias.clone()
        step = Local(lambda out, x: out.copy_(original(x, *own, **kwargs)), channels, step_of(x))
        return Deferred(step, x, keep)

    def convolve(x: Tensor, *weights: Any, **kwargs: Any) -> Tensor:
        def apply(rows: Tensor) -> Tensor:
            before()
            return original(rows, *weights, **kwargs)

        if pads:
            x = Deferred(Padded(step_of(x), [0, 0, pads, pads, 0, 0], zeros=True), x)
        out = used_up(x, apply, channels, reach)
        if take is None:
            return Deferred(Whole(out), out, keep)
        take(out)
        return Deferred(Gone(out.shape), out)

    return here if set(module.kernel_size) == {1} else convolve


def _norms(decoder: nn.Module, keep: Keep) -> Changes:
    for module in decoder.modules():
        if isinstance(module, nn.GroupNorm):
            yield module, "forward", _group_norm(module, keep)
        elif type(module).__name__ == "RMS_norm":
            yield module, "forward", _rms_norm(module.forward, keep)


def _group_norm(module: Any, keep: Keep) -> Callable[[Tensor], Tensor]:
    def normalize(x: Tensor) -> Tensor:
        scale, shift = scale_and_shift(module, plain(x), WHOLE)
        return _noted(lambda out, x: torch.addcmul(shift, x, scale, out=out), x, keep)

    return normalize


def _rms_norm(original: Callable[[Tensor], Tensor], keep: Keep) -> Callable[[Tensor], Tensor]:
    def normalize(x: Tensor) -> Tensor:
        plain(x)  # once for what follows
        return _noted(lambda out, x: out.copy_(original(x)), x, keep)

    return normalize


def _noted(function: Callable[..., object], x: Tensor, keep: Keep) -> Tensor:
    if x.ndim == 5:
        return Deferred(Local(function, x.shape[1], step_of(x)), x, keep)
    out = torch.empty_like(x := plain(x))
    function(out, x)
    return out
