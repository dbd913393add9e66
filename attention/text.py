"""Mask-free text: padded text tokens are cut before the model sees them, and their mask is dropped.

Without a mask the fast kernels run, and no bias as long as the sequence exists. The result is the model's on
conditioning without its padding. Samples whose texts differ in length are run in groups of one length.

A mask with holes, or one that weighs tokens, is no padding: it stays, and ComfyUI's own attention honours it.

Letters: B batch, L text tokens, C channels.
"""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..models import Options, Values

logger = logging.getLogger("skein")

MASKED_OUT = -1e4  # an additive mask's value from which on no weight is left, in every type


def without_padding(run: Callable[[Values], Tensor], arguments: Values, padding: str = "any") -> Tensor:
    """`run(arguments)` on text without padding: the output (B, ...) in the order of the batch.

    Reads context (B, L, C) and attention_mask (B, L), integers, booleans or an additive float mask; changes no argument
    in place. padding: "right" if only that at the end may be cut. Raises ValueError if mask and context do not fit.
    """
    context, mask = arguments["context"], arguments.get("attention_mask")
    if mask is None:
        return run(arguments)
    batch, tokens = context.shape[:2]
    rows = mask.reshape(-1, mask.shape[-1])
    if rows.shape[1] != tokens or rows.shape[0] not in (1, batch):
        raise ValueError(
            f"The text has {batch} x {tokens} tokens, but its attention mask is {tuple(mask.shape)}; take both from "
            "one text encoder node."
        )
    kept = kept_ranges(rows)
    if kept is None or (padding == "right" and any(first for first, _ in kept)):
        logger.warning("Skein attention: the text mask is not a padding mask; ComfyUI's own attention honours it.")
        return run(arguments)
    if len(set(kept)) == 1:
        return run(_trimmed(arguments, kept[0]))
    return _in_groups(run, arguments, kept * (batch // len(kept)))


def kept_ranges(mask: Tensor) -> list[tuple[int, int]] | None:
    """The tokens (first, last + 1) that each row of a mask (B, L) keeps; None if it is not a padding mask."""
    if mask.is_floating_point():
        keep, cut = mask == 0, mask <= MASKED_OUT
        if not bool((keep | cut).all()):
            return None
    else:
        keep = mask != 0
    ranges = []
    for row in keep.tolist():
        length = sum(row)
        first = row.index(True) if length else 0
        if not length or not all(row[first : first + length]):
            return None
        ranges.append((first, first + length))
    return ranges


def _trimmed(arguments: Values, kept: tuple[int, int]) -> Values:
    return {**arguments, "context": arguments["context"][:, kept[0] : kept[1]], "attention_mask": None}


def _in_groups(run: Callable[[Values], Tensor], arguments: Values, kept: Sequence[tuple[int, int]]) -> Tensor:
    batch = len(kept)
    output: Tensor | None = None
    for length in dict.fromkeys(kept):
        members = [i for i in range(batch) if kept[i] == length]
        part = {name: _select(value, members, batch) for name, value in arguments.items()}
        part["transformer_options"] = _select_options(arguments["transformer_options"], members, batch)
        result = run(_trimmed(part, length))
        if output is None:
            output = result.new_empty((batch, *result.shape[1:]))
        output[members] = result
    assert output is not None
    return output


def _select(value: Any, members: list[int], batch: int) -> Any:
    """The members of a batch, in tensors and in lists and dicts of them (ControlNet's)."""
    if isinstance(value, Tensor):
        return value[members] if value.ndim and value.shape[0] == batch else value
    if isinstance(value, list):
        return [_select(item, members, batch) for item in value]
    if isinstance(value, dict):
        return {key: _select(item, members, batch) for key, item in value.items()}
    return value


def _select_options(options: Options, members: list[int], batch: int) -> Options:
    """transformer_options of some members: ComfyUI labels a batch by equal chunks, one a conditioning."""
    selected = dict(options)
    chunks = len(options.get("cond_or_uncond") or [None])
    size = batch // chunks
    whole = [c for c in range(chunks) if all(c * size + i in members for i in range(size))]
    if len(whole) * size == len(members):
        labels: list[tuple[int, int | None]] = [(c, None) for c in whole]
    else:  # samples of one chunk differ: each becomes a chunk of its own, told apart by its place
        labels = [(i // size, i % size) for i in members]
    if "cond_or_uncond" in options:
        selected["cond_or_uncond"] = [options["cond_or_uncond"][chunk] for chunk, _ in labels]
    if "uuids" in options:
        ids = options["uuids"]
        selected["uuids"] = [ids[chunk] if place is None else (ids[chunk], place) for chunk, place in labels]
    sigmas = options.get("sigmas")
    if isinstance(sigmas, torch.Tensor) and sigmas.ndim and sigmas.shape[0] == batch:
        selected["sigmas"] = sigmas[members]
    return selected
