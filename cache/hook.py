"""Hangs the cache on a model's blocks: what happens before, between and after them in one model call.

The functions take ComfyUI's block arguments as plain dicts, so nothing of ComfyUI is imported.

Letters: B batch, S image tokens, C channels.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..models import WARM_UP_KEY, call_input, call_options
from ..report import add
from ..runs import Call, Run, finite
from ..stopwatch import Stopwatch
from .first_block import Decision, FirstBlockCache, sample_tokens
from .streams import Streams

CALL_KEY = "skein_cache_call"  # where the call in progress travels, in transformer_options
Block = Callable[[dict], dict]


class _ModelCall:
    """One model call in progress. Lives in transformer_options, so that calls on several threads stay apart."""

    def __init__(self, streams: list[int], sigma: float):
        self.streams = streams
        self.sigma = sigma
        self.image_tokens = 0
        self.signature: Tensor | None = None
        self.after_first: Tensor | None = None  # image after the first block; of a computed call
        self.reused: Tensor | None = None  # image after the last block; of a reused call
        self.record: Call | None = None
        self.step = 0


class CacheHook:
    """The cache of one run, as wrappers around its model and its blocks."""

    def __init__(self, cache: FirstBlockCache, run: Run, stopwatch: Stopwatch):
        self.cache = cache
        self.run = run
        self.stopwatch = stopwatch
        self._streams = Streams(cache.forget, cache.total)
        self._schedule: list[float] | None = None  # the sampler's sigmas

    def around_model(self, execute: Callable, *args: Any, **kwargs: Any) -> Any:
        """DIFFUSION_MODEL wrapper: opens and closes a call."""
        options = call_options(args, kwargs)
        if WARM_UP_KEY in options:
            return execute(*args, **kwargs)
        sigma = float(options["sigmas"].flatten()[0])
        call = _ModelCall(self._streams.find(options, call_input(args, kwargs), sigma), sigma)
        call.step = self._step(options.get("sample_sigmas"), call.sigma)
        options[CALL_KEY] = call
        stop = self.stopwatch.start()
        try:
            output = execute(*args, **kwargs)
        finally:
            options.pop(CALL_KEY, None)
        if call.record is not None:
            stop(call.record)
            add(self.run, call.record, self.stopwatch.look())
        return output

    def _step(self, schedule: Tensor | None, sigma: float) -> int:
        """The step that a call at this sigma belongs to. Reads the schedule once, when the device is idle anyway."""
        if schedule is None:
            return 0
        if self._schedule is None:
            self._schedule = schedule.tolist()
            self.run.steps = len(self._schedule) - 1
        return sum(each > sigma for each in self._schedule[:-1])

    def first_block(self, args: dict, block: Block) -> dict:
        """Runs the first block and decides from what it changed."""
        call = _current(args)
        if call is None:
            return block(args)
        if self.cache.ended(call.sigma):
            for stream in call.streams:
                self.cache.forget(stream)
            self._record(call, Decision(reuse=False, change=None, admitted=False))
            return block(args)
        # ComfyUI's blocks add in place: what comes after must not change what is kept from before.
        before = sample_tokens(args["img"]).clone()
        out = block(args)
        image = out["img"]
        call.image_tokens = image.shape[1]
        call.signature = sample_tokens(image) - before
        decision = self.cache.decide(call.streams, call.signature, call.sigma)
        self._record(call, decision)
        if decision.reuse:
            call.reused = self.cache.apply(call.streams, image)
        else:
            call.after_first = image.clone()
        return out

    def _record(self, call: _ModelCall, decision: Decision) -> None:
        call.record = Call(
            call.sigma,
            finite(decision.change),
            self.cache.config.threshold,
            decision.reuse,
            admitted=decision.admitted,
            parts=call.streams,
            step=call.step,
        )

    def middle_block(self, args: dict, block: Block) -> dict:
        call = _current(args)
        if call is None or call.reused is None:
            return block(args)
        return {key: args[key] for key in ("img", "txt") if key in args}

    def last_block(self, args: dict, block: Block) -> dict:
        """Runs the last block and keeps what the stack changed, or puts in what it would have changed."""
        call = _current(args)
        # Without a signature: past end_percent, or another pack has put something in the first block's place.
        if call is None or call.signature is None:
            return block(args)
        if call.reused is not None:
            out = {key: args[key] for key in ("img", "txt") if key in args}
            # Written over, not added to: what others added between the blocks (ControlNet) is in the residual.
            _image_part(out["img"], call).copy_(call.reused)
            return out
        assert call.after_first is not None
        out = block(args)
        residual = call.after_first.neg_().add_(_image_part(out["img"], call))
        self.cache.store(call.streams, call.signature, residual, call.sigma)
        call.after_first = None
        return out


def _current(args: dict) -> _ModelCall | None:
    """The call in progress; None if the blocks are run by something else than the model's own forward."""
    return args["transformer_options"].get(CALL_KEY)


def _image_part(hidden: Tensor, call: _ModelCall) -> Tensor:
    """The image tokens of a hidden state: all of a double block's, the last ones of a single block's."""
    return hidden[:, hidden.shape[1] - call.image_tokens :]
