"""ComfyUI's own decoder, computing a strip of the frame as part of the whole, and faster.

No forward is copied: the layers of ComfyUI's decoder get, for the duration of a decode and each on itself,

- convolutions: the neighbours' columns in the place of padding, temporal carries included, because the input that a
  convolution is given holds them. Who pads it differs (the caller in HunyuanVideo, the convolution itself in Wan);
- GroupNorm: mean and variance over all strips, by reductions that fill a GPU. PyTorch's own kernel for them uses one
  block a group, 32 of 132 multiprocessors, and takes a fifth of a decode;
- attention of the middle block: keys and values of all strips, and plain products of matrices, a few thousand queries
  at a time, where a head is wider than the fast kernels take (256): 2.7 times as fast as PyTorch's kernel for these.

RMS norms go over channels, and upsampling and channel-to-space stay inside of a strip: they are right as they are.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import comfy.ops
import torch
from torch import Tensor, nn

from ..attributes import changed
from .strip import Strip

FAST_HEAD = 256  # channels of a head, at most, for the attention kernels that are faster than plain products
SCORES = 1 << 29  # attention scores that are held at once: more is no faster
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
FLOAT32_PRODUCT = hasattr(torch.ops.aten.bmm, "dtype")  # bmm of 16 bits into 32, on CUDA


Changes = Iterator[tuple[Any, str, Any]]


@contextmanager
def computing(
    decoder: nn.Module, strip: Strip, before: Callable[[], None], frames: Callable[[int], None]
) -> Iterator[None]:
    """Within: the decoder decodes this strip. before: called before every convolution, and may raise; frames: told how
    many more frames have been decoded."""
    with changed(
        [*_convolutions(decoder, strip, before, frames), *_norms(decoder, strip), *attentions(decoder, strip)]
    ):
        yield


def refusal(decoder: nn.Module) -> str | None:
    """Why a decoder's frame cannot be cut into strips, or None: a layer of a form that is not among those above."""
    for name, module in decoder.named_modules():
        if isinstance(module, CONVOLUTIONS):
            reach = max(module.kernel_size[-2:]) // 2
            plain = set(module.stride) | set(module.dilation) == {1} and module.padding_mode == "zeros"
            if not plain or reach > 1 or any(padding not in (0, size // 2) for padding, size in _sides(module)):
                return f"{name} is a convolution of another form"
        elif isinstance(module, nn.modules.batchnorm._NormBase):
            return f"{name} is a {type(module).__name__}"
    return None


def _sides(module: Any) -> list[tuple[int, int]]:
    """Padding and kernel size of a convolution in both dimensions of the frame."""
    return list(zip(module.padding[-2:], module.kernel_size[-2:]))


def _convolutions(decoder: nn.Module, strip: Strip, before: Callable, frames: Callable) -> Changes:
    modules: list[Any] = [module for module in decoder.modules() if isinstance(module, CONVOLUTIONS)]
    for module in modules:
        reach, padding = module.kernel_size[strip.dim] // 2, list(module.padding)
        pads = bool(reach and padding[strip.dim] and strip.world > 1)
        if pads:  # what it pads with is told by the strip, so it pads no more
            padding[strip.dim] = 0
            yield module, "padding", tuple(padding)
        last = frames if module is modules[-1] else None
        yield module, "_conv_forward", _convolution(module._conv_forward, strip, reach, pads, before, last)


def _convolution(
    original: Callable, strip: Strip, reach: int, pads: bool, before: Callable, frames: Callable | None
) -> Callable:
    def convolve(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        before()
        if strip.world > 1 and reach and pads:
            x = strip.extended(x, reach)
        elif strip.world > 1 and reach:
            strip.overwrite_edges(x, reach)  # the caller has made x by padding: nobody else has it
        out = original(x, *args, **kwargs)
        if frames:
            frames(out.shape[2])
        return out

    return convolve


def _norms(decoder: nn.Module, strip: Strip) -> Changes:
    for module in decoder.modules():
        if isinstance(module, nn.GroupNorm):
            yield module, "forward", _group_norm(module, strip)


def _group_norm(module: Any, strip: Strip) -> Callable[[Tensor], Tensor]:
    def normalize(x: Tensor) -> Tensor:
        scale, shift = scale_and_shift(module, x, strip)
        # In float32 and rounded once, as PyTorch's own kernel does it.
        return torch.addcmul(shift, x, scale, out=torch.empty_like(x))

    return normalize


def scale_and_shift(module: Any, x: Tensor, strip: Strip) -> tuple[Tensor, Tensor]:
    """What a GroupNorm multiplies x (B, C, ...) by, and adds then: (B, C, 1 ...) each, float32."""
    mean, variance = strip.moments(*moments(x, module.num_groups))
    weight, bias = comfy.ops.cast_bias_weight(module, x)  # wherever ComfyUI keeps them
    each = x.shape[1] // module.num_groups
    scale = (variance + module.eps).rsqrt().repeat_interleave(each, 1) * weight.float()
    shift = bias.float() - mean.repeat_interleave(each, 1) * scale
    one = [1] * (x.ndim - 2)
    return scale.view(*x.shape[:2], *one), shift.view(*x.shape[:2], *one)


def moments(x: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Mean and variance of each group of channels of x (B, C, ...): (B, G) each, float32."""
    rows = x.reshape(x.shape[0], groups, -1)
    if x.dtype == torch.float32:
        variance, mean = torch.var_mean(rows, -1, correction=0)
        return mean, variance
    # These two read 16 bits and add in 32; var_mean would round what it returns.
    mean = rows.sum(-1, dtype=torch.float32) / rows.shape[-1]
    square = torch.linalg.vector_norm(rows, dim=-1, dtype=torch.float32) ** 2 / rows.shape[-1]
    return mean, (square - mean**2).clamp(min=0)


def attentions(decoder: nn.Module, strip: Strip) -> Changes:
    for module in decoder.modules():
        attend = vars(module).get("optimized_attention")
        if attend is not None:
            yield module, "optimized_attention", _attend(attend, strip)


def _attend(original: Callable, strip: Strip) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if strip.world == 1 and (q.shape[1] <= FAST_HEAD or q.device.type != "cuda"):
            return original(q, k, v)
        k, v = strip.gather(torch.stack([k, v]))
        return attention(q, k, v)

    return attend


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of one head as wide as there are channels: q (B, C, ...) over k, v (B, C, ...), as q. Scores and
    softmax are float32 where the device can."""
    shape, channels = q.shape, q.shape[1]
    q = q.flatten(2).transpose(1, 2) * channels**-0.5
    k, v = k.flatten(2), v.flatten(2).transpose(1, 2)
    out = torch.empty_like(q)
    rows = max(SCORES // (shape[0] * k.shape[2]), 16)
    for first in range(0, q.shape[1], rows):
        part = q[:, first : first + rows]
        if FLOAT32_PRODUCT and part.is_cuda and part.dtype != torch.float32:
            scores = torch.bmm(part, k, out_dtype=torch.float32)
        else:
            scores = torch.bmm(part, k)
        out[:, first : first + rows] = torch.bmm(scores.softmax(-1).to(v.dtype), v)
    return out.transpose(1, 2).reshape(shape)
