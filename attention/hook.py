"""Hangs the attention on a model: around each model call, and in place of ComfyUI's attention function.

The functions take ComfyUI's arguments as they come, so nothing of ComfyUI is imported.

Letters: B batch, H heads, S tokens, D head dim.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from ..models import named_arguments
from .op import Attend, active
from .op import attention as attention_op
from .selection import Selection
from .text import without_padding

Around = Callable[[Attend, bool], Attend]
ROPE_KEY = "skein_rope"  # rotary factors that a block has left to its attention, in transformer_options


class AttentionHook:
    """The attention of one run: its kernels, and whether padded text is cut."""

    def __init__(self, selection: Selection, trim_text: bool, around: Around = lambda attend, exact: attend):
        """around: what stands around the kernels, such as an exchange with other processes. It is told whether they are
        exact in this call."""
        self.selection = selection
        self.trim_text = trim_text
        self.around = around

    def around_model(self, execute: Callable, *args: Any, **kwargs: Any) -> Any:
        """DIFFUSION_MODEL wrapper: cuts padded text, and makes this run's kernels the thread's."""
        call, config = named_arguments(execute, args, kwargs), self.selection.config
        exact = not config.allow_8bit or is_exact_step(call.arguments["transformer_options"], config.exact_steps)

        def run(arguments: dict) -> Tensor:
            call.arguments.update(arguments)
            return execute(*call.args, **call.kwargs)

        with active(self.around(partial(self.selection.attend, exact=exact), exact)):
            if self.trim_text:
                return without_padding(run, dict(call.arguments))
            return execute(*args, **kwargs)


def override(func: Callable, q: Tensor, k: Tensor, v: Tensor, heads: int, mask=None, **kwargs: Any) -> Tensor:
    """ComfyUI's optimized_attention_override: the operator wherever it computes the same as `func`.

    That is inside a block, with q, k and v as (B, H, S, D), without a scale of its own. One function for all
    runs, so that compiled blocks, which guard on it, stay valid.
    """
    options = kwargs.get("transformer_options") or {}
    rope = options.get(ROPE_KEY)
    if rope is not None:
        q, k = apply_rope(q, rope), apply_rope(k, rope)
    plain = (
        "block_index" in options
        and kwargs.get("skip_reshape", False)
        and not kwargs.get("skip_output_reshape", False)
        and kwargs.get("scale") is None
        and q.shape[1] == k.shape[1]
    )
    if not plain:
        return func(q, k, v, heads, mask=mask, **kwargs)
    return attention_op(q, k, v, mask)


def apply_rope(x: Tensor, factors: Tensor) -> Tensor:
    """Rotary position embedding of (B, H, S, D) by ComfyUI's factors (B, 1, S, D / 2, 2, 2), in plain torch, so that
    the compiler joins it to what stands before. Su et al., arxiv.org/abs/2104.09864."""
    pairs = x.to(factors.dtype).unflatten(-1, (-1, 1, 2))
    return (factors[..., 0] * pairs[..., 0] + factors[..., 1] * pairs[..., 1]).reshape(x.shape).type_as(x)


def is_exact_step(options: dict, exact_steps: int) -> bool:
    """Whether a call's sigma is one of the first or last steps of the schedule. Calls between two steps (Heun,
    DPM) count to the step before them."""
    schedule, sigmas = options.get("sample_sigmas"), options.get("sigmas")
    if schedule is None or sigmas is None:
        return True
    step = int((schedule[:-1] >= sigmas.flatten()[0] - 1e-6).sum()) - 1
    return step < exact_steps or step >= len(schedule) - 1 - exact_steps
