"""Sparse attention in one run: where it runs, by which kernel, and what it did.

It stands between the exchange with other processes and the dense kernels: it sees whole sequences, and some heads of
them where several processes share a run. These choose as one: they sum up what each has measured of its heads.

Letters: B batch, h heads of this process, S tokens, D head dim.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...models import WARM_UP_KEY, ModelCall, Place, RunModel
from ...out_of_memory import is_out_of_memory
from ...plan import SparseConfig
from ...sparse_runs import SparseCall, SparseLayer, SparseRun
from ...stopwatch import Stopwatch
from ..kernels import Problem
from ..op import Attend
from .cost import MEASURED, NO_KERNEL, Cost, measure
from .selection import ALONE, Chosen, Heads, choose, parts_for

logger = logging.getLogger("skein")

PATIENCE = 4  # calls in which an attention stays dense after one in which it was not worth while
MASKED = "attention with a mask runs dense"
FASTER = "dense attention is faster at {tokens} tokens"
DENSE = "attention of {tokens} tokens is dense: {why}"
ELSEWHERE = "the kernel failed in another process, and attention is dense from here on"
RING = "all attention is dense, because the devices form a ring; set ring_degree to 1"


@dataclass
class _Layer:
    """An attention of a block over the run. waits: calls that it stays dense."""

    density: float | None = None
    waits: int = 0


@dataclass
class _Call:
    """A model call in progress. chosen: of attentions whose blocks were chosen, by block and place in it: density and
    errors (B, h) and error (B,), on the device; the same attentions in all processes. attentions: all."""

    record: SparseCall
    sparse: bool
    chosen: dict[tuple[str, int], tuple[Tensor, Tensor, Tensor]] = field(default_factory=dict)
    attentions: set[tuple[str, int]] = field(default_factory=set)


@dataclass
class Together:
    """Other processes that share a run. heads: this process's among all, of the attention in progress. largest: of
    each number on all processes."""

    heads: Callable[[], Heads] = lambda: ALONE
    largest: Callable[[list[float]], list[float]] = lambda values: values


class SparseAttention:
    """The sparse attention of one run.

    sigmas: between which it is sparse. told: the record, after each call. say: told what a user should know.
    """

    def __init__(
        self, config: SparseConfig, sigmas: tuple[float, float], device: torch.device, together: Together,
        told: Callable[[SparseRun], None], say: Callable[[str], None],
    ):  # fmt: skip
        self.config, self.sigmas, self.together = config, sigmas, together
        self.record = SparseRun(config.max_error if config.rule == "max_error" else None, config.node_id)
        self._told, self._tell = told, say
        self._stopwatch = Stopwatch(device)
        self._layers: dict[tuple[str, int], _Layer] = {}
        self._calls: dict[ModelCall, _Call] = {}  # in progress: several with ComfyUI's MultiGPU
        self._costs: dict[tuple, Cost] = {}
        self._failed = False  # here; and in any of the processes that share the run, from the call's end on
        self._off = False
        self._turn = 0
        self.reasons: list[str] = []

    def around_model(self, call: ModelCall, run: RunModel) -> Any:
        """Opens and closes a call."""
        if WARM_UP_KEY in call.options:
            return run(call)
        sigma = float(call.options["sigmas"].flatten()[0])
        start, end = self.sigmas
        record = SparseCall(self._step(call.options.get("sample_sigmas"), sigma), sigma)
        self._calls[call] = _Call(record, end <= sigma <= start)
        try:
            output = run(call)
            self._close(self._calls[call])
        finally:
            del self._calls[call]
        self._stopwatch.look()
        self._told(self.record)
        return output

    def _step(self, schedule: Tensor | None, sigma: float) -> int:
        if schedule is None:
            return 0
        sigmas = schedule.tolist()
        self.record.steps = len(sigmas) - 1
        return sum(each > sigma for each in sigmas[:-1])

    def around(self, dense: Attend, place: Place | None) -> Attend:
        """The attention at a place of the model, by the one that computes it in full."""
        call = None if place is None else self._calls.get(place.call)
        if place is None or call is None:
            return dense
        return partial(self._attend, dense, place, call)

    def _attend(
        self, dense: Attend, place: Place, call: _Call, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None
    ) -> Tensor:
        text = self._text(place, q, k)
        if text is None:
            return dense(q, k, v, mask)
        key = place.block.path, place.attentions
        call.attentions.add(key)
        stop = self._stopwatch.start()
        try:
            if not call.sparse or self.config.stays_dense(place.block.index, len(place.call.network.blocks)):
                return dense(q, k, v, mask)
            if mask is not None:
                self.say(MASKED)
                return dense(q, k, v, mask)
            return self._sparse(dense, key, call, q, k, v, text)
        finally:
            stop(_Span(call.record))

    def _text(self, place: Place, q: Tensor, k: Tensor) -> range | None:
        """The text in the sequence; None where the attention is not of the image's tokens to themselves."""
        tokens, image, stack = q.shape[2], place.call.all_tokens, place.block.stack
        text = tokens - image
        if place.block.beside or place.goes_over == "cross" or tokens != k.shape[2] or text < 0:
            return None
        if not text:
            return range(0)
        if not stack.order:
            return None
        return range(image, tokens) if stack.order == "image text" else range(text)

    def _sparse(
        self, dense: Attend, key: tuple[str, int], call: _Call, q: Tensor, k: Tensor, v: Tensor, text: range
    ) -> Tensor:
        layer = self._layers.setdefault(key, _Layer())
        if q.shape[2] < self.config.min_tokens or layer.waits or self._off:
            layer.waits = max(layer.waits - 1, 0)
            return dense(q, k, v, None)
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
        self._turn += 1
        pick = partial(choose, q, k, v, text, self.config, self._turn)
        cost = self._cost(q, k, v, lambda: dense(q, k, v, None), pick)
        # Processes that share a run decide this as one; a kernel may fail in one of them alone.
        if cost.whole == NO_KERNEL or not self._pays(cost, layer.density or 0.0):
            layer.waits, layer.density = PATIENCE, None
            return dense(q, k, v, None)
        assert cost.kernel is not None
        heads = self.together.heads()
        with self._giving_up("choosing blocks", alone=heads is ALONE):
            chosen = pick(heads)
            call.chosen[key] = chosen.density, chosen.errors, chosen.error
        if not self._failed:
            with self._giving_up(cost.kernel.label):
                out, lse = cost.kernel.run(q, k, v, chosen.kept)
                return self._with_tail(q, out, lse, chosen)
        return dense(q, k, v, None)

    @contextmanager
    def _giving_up(self, what: str, alone: bool = True) -> Iterator[None]:
        """Within: what is raised ends sparse attention; a package may raise anything. Out of memory is raised again; so
        is all where other processes wait for what they do together."""
        try:
            yield
        except Exception as error:
            if is_out_of_memory(error) or not alone:
                raise
            self._failed = True
            self.say(f"{what} failed, and attention is dense from here on ({error})", logging.WARNING)

    def _pays(self, cost: Cost, density: float) -> bool:
        return bool(self.config.min_tokens) or cost.pays(density)

    def _with_tail(self, q: Tensor, out: Tensor, lse: Tensor, chosen: Chosen) -> Tensor:
        if not self.config.tail:
            return out
        k, v = chosen.k, chosen.v
        return parts_for(q.device).add_tail(out, lse, q, k.means, v.means, k.counts, chosen.kept)

    def _cost(self, q: Tensor, k: Tensor, v: Tensor, dense: Callable[[], Tensor], pick: Callable[[], Chosen]) -> Cost:
        """Of an attention of this size; asked of all processes at the same time."""
        anyway = bool(self.config.min_tokens)
        key = (Problem.of(q), q.shape[0], self.config.tail, self.config.rule, anyway)
        if key in self._costs:
            return self._costs[key]
        reasons: list[str] = []
        if key not in MEASURED:
            MEASURED[key] = measure(q, k, v, dense, pick, partial(self._with_tail, q), reasons.append, anyway)
        cost = self._costs[key] = MEASURED[key].agreed(self.together.largest)
        self.record.dense_ms = cost.dense
        if cost.kernel is None:
            self.say(DENSE.format(tokens=q.shape[2], why="; ".join(reasons) or "another process has no kernel for it"))
        elif not self._pays(cost, 0.0):
            self.say(FASTER.format(tokens=q.shape[2]))
        else:
            self.record.kernel = cost.kernel.label
            self.say(
                f"{cost.kernel.label} runs: {cost.whole:.1f} ms for all blocks and {cost.fixed:.1f} ms to choose them, "
                f"dense attention {cost.dense:.1f} ms"
            )
        return cost

    def _close(self, call: _Call) -> None:
        """Read what was chosen in a call: once, when its last attention has been issued."""
        record, gather = call.record, self.together.heads().gather
        if not self._off and self.together.largest([float(self._failed)])[0]:
            self._off = True
            if not self._failed:
                self.say(ELSEWHERE, logging.WARNING)
        self.record.calls.append(record)
        record.attentions = len(call.attentions)
        tables = [gather(torch.stack(each[:2], dim=-1)).mean(dim=0) for each in call.chosen.values()]  # (H, 2)
        if tables and not self._off:
            record.sparse = len(tables)
            known = torch.cat([table.flatten() for table in tables]).tolist()
            record.error = float(torch.stack([each[2].amax() for each in call.chosen.values()]).mean())
            densities = []
            for (path, n), table in zip(call.chosen, tables):
                of_layer, known = known[: table.numel()], known[table.numel() :]
                densities.append(sum(of_layer[::2]) / len(table))
                self._layers[path, n].density = densities[-1]
                self._add(path if n == 1 else f"{path} ({n})", of_layer[::2], of_layer[1::2])
            record.density = (sum(densities) + record.attentions - record.sparse) / record.attentions

    def _add(self, path: str, density: list[float], errors: list[float]) -> None:
        for layer in self.record.layers:
            if layer.path == path:
                return layer.add(density, errors)
        self.record.layers.append(SparseLayer(path, density, errors))

    def end(self) -> SparseRun:
        """The record, with all times. Waits for the device."""
        self._stopwatch.read()
        self.record.ended = True
        return self.record

    def say(self, reason: str, level: int = logging.INFO) -> None:
        """Tell the user what was found out, once a run."""
        if reason not in self.reasons:
            self.reasons.append(reason)
            self._tell("; ".join(self.reasons))
            logger.log(level, "Skein sparse attention: %s", reason)


class _Span:
    """A span of a call: its time adds to the call's."""

    def __init__(self, record: SparseCall):
        self._record = record
        self._ms: float | None = None

    @property
    def ms(self) -> float | None:
        return self._ms

    @ms.setter
    def ms(self, value: float | None) -> None:
        self._ms = value
        self._record.ms = (self._record.ms or 0.0) + (value or 0.0)
