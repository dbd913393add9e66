"""The attention of a run as one operator of torch, so that compiled blocks hold a call and not a choice.

Which kernel runs is decided when the operator runs, from what `active` holds on this thread at that moment: it may
change between two calls (first and last steps exact, a kernel that fails, another run) without a new compilation. So
are the options of the call and the block, which another node's attention reads and compiled blocks do not get.

Letters: B batch, H heads, S tokens, D head dim.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]  # q, k, v (B, H, S, D), mask to (B, S, H, D)
NAME = "skein::attention"
PART_KEY = "skein_part"  # in the options of a part of a block (parts.py)
ATTEND, OPTIONS = "skein_attend", "skein_options"  # attributes of a thread: two copies of the pack share the operator


@contextmanager
def active(attend: Attend, options: dict | None = None) -> Iterator[None]:
    """Within: skein::attention computes by `attend` on this thread, in a call with these transformer_options."""
    thread = threading.current_thread()
    before = {name: getattr(thread, name, None) for name in (ATTEND, OPTIONS)}
    vars(thread).update({ATTEND: attend, OPTIONS: options or {}})
    try:
        yield
    finally:
        vars(thread).update(before)


def enter_block(options: dict) -> None:
    """From here on the options of the call in progress are these, which ComfyUI gives a block, with its index."""
    if PART_KEY not in options:  # a part's hold tensors, and it is one of the block that was entered
        setattr(threading.current_thread(), OPTIONS, options)


def current_options() -> dict:
    """The transformer_options of the call, and of the block, in progress on this thread."""
    return getattr(threading.current_thread(), OPTIONS)


def _attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    attend = getattr(threading.current_thread(), ATTEND, None)
    assert attend is not None, "skein::attention runs inside of a model call only"
    return attend(q, k, v, mask).flatten(2).contiguous()


def _shape(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    batch, heads, tokens, head_dim = q.shape
    return q.new_empty(batch, tokens, heads * head_dim)


def _operator() -> Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]:
    """Attention of (B, H, S, D) queries, keys and values as (B, S, H * D); mask: added to the scores.

    Registered by the plain interface, once in a process: custom_op would take the operator from under another copy of
    the pack, and its own dispatch (PyTorch 2.14) fails now and then with "vector::reserve".
    """
    if not hasattr(torch.ops.skein, "attention"):
        schema = "(Tensor q, Tensor k, Tensor v, Tensor? mask=None) -> Tensor"
        torch.library.define(NAME, schema, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.impl(NAME, "default", _attention)
        torch.library.register_fake(NAME, _shape)
    return torch.ops.skein.attention.default


attention = _operator()
