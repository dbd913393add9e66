"""Hangs the attention on a model: around each model call and block, and in place of ComfyUI's attention function.

Letters: B batch, H heads, S tokens, D head dim.
"""

import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..host import origin_of
from ..models import OPTIONS, OVERRIDE, WARM_UP_KEY, Block, ModelCall, Options, Place, RunBlock, RunModel, Values
from .op import Attend, active, current_options, enter_block
from .parts import attend
from .selection import Selection
from .sparse import SparseAttention
from .text import without_padding

Around = Callable[[Attend, bool, Place | None], Attend]
# In transformer_options:
BLOCK_KEY = "skein_block"  # these are a block's, with its attention for the operator
ROPE_KEY = "skein_rope"  # rotary factors that a block has left to its attention
OTHER_KEY = "skein_other_attention"  # another node's attention function, which ours stands before
INSIDE_KEY = "skein_inside_attention"  # ours has called ComfyUI's or another node's: not again

OURS = "_skein_override"  # attribute of our functions
OTHER_RUNS = "another node's attention runs ({})"
OTHER_SPARSE = "in the blocks Skein's sparse attention runs in place of another node's attention ({})"
OTHER_LEFT = (
    "in the blocks Skein's attention runs in place of another node's ({}); choose kernel stock to run the other one"
)
NONE = "this model's attention cannot be replaced, and stays ComfyUI's own"
ALL_EXACT = "nothing is computed in 8 bits: exact_steps is {exact} at both ends, and there are {steps} steps"


class AttentionHook:
    """The attention of one run: its kernels, and whether padded text is cut."""

    def __init__(
        self, selection: Selection, trim_text: bool, around: Around | None = None, sparse: SparseAttention | None = None
    ):
        """around: the exchange with other processes that stands around the kernels; told whether they are exact in this
        call, and where the attention is. sparse: stands before the kernels, inside of it."""
        self.selection = selection
        self.trim_text = trim_text
        self.around = around
        self.sparse = sparse
        self._now = threading.local()  # its place: of the block in progress on a thread
        self._reached: set[str] = set()  # paths of blocks of which one has: a CUDA graph is counted when it is recorded
        self._looked: tuple[Tensor | None, bool] = None, False  # a mask, and whether it hides anything

    def around_model(self, call: ModelCall, run: RunModel) -> Any:
        """Cuts padded text, and makes this run's kernels the thread's."""
        self.put_on(call.options)
        exact = not self.selection.config.allow_8bit or self._is_exact(call.options)
        with active(partial(self._attend, exact), call.options):
            padding = call.network.architecture.padding if self.trim_text else ""
            if not padding:
                return run(call)
            return without_padding(lambda arguments: run(call.changed(**arguments)), call.arguments, padding)

    def _attend(self, exact: bool, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        place: Place | None = getattr(self._now, "place", None)
        if place is not None:
            place.attentions += 1
        attend: Attend = partial(self.selection.attend, exact=exact)
        if self.sparse is not None:
            attend = self.sparse.around(attend, place)
        if self.around is not None:
            attend = self.around(attend, exact, place)
        return attend(q, k, v, mask)

    def around_block(self, call: ModelCall, block: Block, values: Values, run: RunBlock) -> Values:
        """Marks the block's options, for what is outside of blocks, such as a refiner of the text, has ComfyUI's own
        attention. Raises ValueError if a block that is shared has not asked for this one: its result would be wrong."""
        if isinstance(values.get(OPTIONS), dict):
            values = {**values, OPTIONS: {**values[OPTIONS], BLOCK_KEY: True}}
        self._now.place = place = Place(call, block)
        try:
            out = run(self._without_empty_masks(block, values))
        finally:
            self._now.place = None
        if place.attentions:
            self._reached.add(block.path)
        elif WARM_UP_KEY not in call.options:
            if self.around is not None:
                raise ValueError(f"Context Parallel cannot share {block}, because {NONE}; remove Context Parallel.")
            if block.path not in self._reached:
                self.selection.say(NONE)
        return out

    def _without_empty_masks(self, block: Block, values: Values) -> Values:
        """Without a mask that hides nothing, which no fast kernel takes. Looked at once for all blocks of a call."""
        for name in (each.name for each in block.stack.tokens if each.of == "mask"):
            mask = values.get(name)
            if not isinstance(mask, Tensor):
                continue
            looked = self._looked
            if looked[0] is not mask:
                looked = self._looked = mask, bool(mask.any())
            if not looked[1]:
                values = {**values, name: None}
        return values

    def put_on(self, options: Options) -> None:
        """Have Skein's attention in a run's options, or a call's: some nodes set theirs again in each step. Always the
        same one runs: Skein's in the blocks, but with kernel stock the other node's."""
        other = options.get(OVERRIDE)
        if other is None:
            options[OVERRIDE] = override
        elif not is_ours(other):
            options[OVERRIDE], options[OTHER_KEY] = _before(other), other
            if self.sparse is not None:
                self.sparse.say(OTHER_SPARSE.format(origin_of(other)))
            else:
                says = OTHER_RUNS if self.selection.config.kernel == "stock" else OTHER_LEFT
                self.selection.say(says.format(origin_of(other)))

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


def is_ours(function: object) -> bool:
    """Whether an override is Skein's."""
    return hasattr(function, OURS)


def _before(other: Callable) -> Callable:
    """Skein's override with another node's behind it, for what Skein's leaves alone."""

    def both(func: Callable, *args: Any, **kwargs: Any) -> Tensor:
        warming_up = WARM_UP_KEY in (kwargs.get("transformer_options") or {})
        return override(func if warming_up else partial(other, func), *args, **kwargs)

    vars(both)[OURS] = True
    return both


def override(func: Callable, q: Tensor, k: Tensor, v: Tensor, heads: int, mask=None, **kwargs: Any) -> Tensor:
    """ComfyUI's optimized_attention_override: the operator wherever it computes the same as `func`.

    That is inside a block, without a scale of its own. Without keys, as Wan's attention to an image that was not given
    has them, the result is zeros. q, k and v: (B, H, S, D) with skip_reshape, else (B, S, H * D).
    One function for all runs, so that compiled blocks, which guard on it, stay valid.
    """
    options = kwargs.get("transformer_options") or {}
    if INSIDE_KEY in options:
        return func(q, k, v, heads, mask=mask, **kwargs)
    if not torch.compiler.is_compiling():
        enter_block(options)
    rope = options.get(ROPE_KEY)
    if rope is not None:
        q, k = apply_rope(q, rope), apply_rope(k, rope)
    if BLOCK_KEY not in options or kwargs.get("scale") is not None:
        return func(q, k, v, heads, mask=mask, **kwargs)
    if not kwargs.get("skip_reshape", False):
        head_dim = q.shape[-1] // heads  # SD3 has values (B, S, H, D) beside flat queries and keys
        q, k, v = (x.flatten(2).unflatten(2, (-1, head_dim)).transpose(1, 2) for x in (q, k, v))
    if k.shape[1] != q.shape[1]:  # fewer heads of keys and values than of queries
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    out = attend(options, q, k, v, mask) if k.shape[2] else q.new_zeros(q.shape).transpose(1, 2).flatten(2)
    return out.unflatten(2, (heads, -1)).transpose(1, 2) if kwargs.get("skip_output_reshape", False) else out


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
