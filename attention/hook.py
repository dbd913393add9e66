"""Hangs the attention on a model: around each model call, and in place of ComfyUI's attention function.

The functions take ComfyUI's arguments as they come, so nothing of ComfyUI is imported.

Letters: B batch, H heads, S tokens, D head dim.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..models import OVERRIDE, WARM_UP_KEY, Options, named_arguments
from .op import Attend, active, current_options, enter_block
from .op import attention as attention_op
from .selection import Selection
from .text import without_padding

Around = Callable[[Attend, bool], Attend]
# In transformer_options:
ROPE_KEY = "skein_rope"  # rotary factors that a block has left to its attention
OTHER_KEY = "skein_other_attention"  # another node's attention function, which ours stands before
INSIDE_KEY = "skein_inside_attention"  # ours has called ComfyUI's or another node's: not again

OURS = "_skein_override"  # attribute of our functions
OTHER_RUNS = "another node has set an attention of its own: it runs"
OTHER_LEFT = "another node has set an attention of its own: Skein's runs in the blocks, kernel stock would leave it"
ALL_EXACT = "nothing is computed in 8 bits: exact_steps is {exact} at both ends, and there are {steps} steps"


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
        options = call.arguments["transformer_options"]
        self.put_on(options)
        exact = not config.allow_8bit or self._is_exact(options)

        def run(arguments: dict) -> Tensor:
            call.arguments.update(arguments)
            return execute(*call.args, **call.kwargs)

        with active(self.around(partial(self.selection.attend, exact=exact), exact), options):
            if self.trim_text:
                return without_padding(run, dict(call.arguments))
            return execute(*args, **kwargs)

    def put_on(self, options: Options) -> None:
        """Have Skein's attention in a run's options, or a call's: some nodes set theirs again in each step. Always the
        same one runs: Skein's in the blocks, but with kernel stock the other node's."""
        other = options.get(OVERRIDE)
        if other is None:
            options[OVERRIDE] = override
        elif not hasattr(other, OURS):
            options[OVERRIDE], options[OTHER_KEY] = _before(other), other
            self.selection.say(OTHER_RUNS if self.selection.config.kernel == "stock" else OTHER_LEFT)

    def _is_exact(self, options: Options) -> bool:
        config, schedule = self.selection.config, options.get("sample_sigmas")
        if schedule is not None and len(schedule) - 1 <= 2 * config.exact_steps:
            self.selection.say(ALL_EXACT.format(steps=len(schedule) - 1, exact=config.exact_steps))
        return is_exact_step(options, config.exact_steps)


def stock(attention: Callable, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """The attention that would run without Skein, of (B, H, S, D) as (B, S, H, D): another node's, or `attention`,
    ComfyUI's own. It is told of the call and the block that it runs in."""
    options = {name: value for name, value in current_options().items() if name != OVERRIDE}
    other = options.pop(OTHER_KEY, None)
    if other is not None and WARM_UP_KEY not in options:  # theirs may keep count of its calls
        options |= {OVERRIDE: other, INSIDE_KEY: True}
    out = attention(q, k, v, q.shape[1], mask=mask, skip_reshape=True, transformer_options=options)
    return out.unflatten(2, (q.shape[1], -1))


def _before(other: Callable) -> Callable:
    """Skein's override with another node's behind it, for what Skein's leaves alone."""

    def both(func: Callable, *args: Any, **kwargs: Any) -> Tensor:
        warming_up = WARM_UP_KEY in (kwargs.get("transformer_options") or {})
        return override(func if warming_up else partial(other, func), *args, **kwargs)

    vars(both)[OURS] = True
    return both


def override(func: Callable, q: Tensor, k: Tensor, v: Tensor, heads: int, mask=None, **kwargs: Any) -> Tensor:
    """ComfyUI's optimized_attention_override: the operator wherever it computes the same as `func`.

    That is inside a block, with q, k and v as (B, H, S, D), without a scale of its own. One function for all
    runs, so that compiled blocks, which guard on it, stay valid.
    """
    options = kwargs.get("transformer_options") or {}
    if INSIDE_KEY in options:
        return func(q, k, v, heads, mask=mask, **kwargs)
    if not torch.compiler.is_compiling():
        enter_block(options)
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


vars(override)[OURS] = True


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
