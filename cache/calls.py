"""Hangs the cache on a model's blocks: what happens before, between and after them in one model call.

Letters: B batch, S image tokens, C channels.
"""

from typing import Any

from torch import Tensor

from ..models import WARM_UP_KEY, Block, ModelCall, RunBlock, RunModel, Values, pass_by
from ..report import add
from ..runs import Call, Run, finite
from ..stopwatch import Stopwatch
from .first_block import Decision, FirstBlockCache, sample_tokens
from .share import Steps
from .streams import Streams


class _State:
    """What the cache knows of one model call in progress."""

    def __init__(self, streams: list[int], sigma: float, step: int, first: Block, last: Block):
        self.streams = streams
        self.sigma = sigma
        self.step = step
        self.first, self.last = first, last  # the blocks that decide, and that end what is reused
        self.signature: Tensor | None = None
        self.after_first: Tensor | None = None  # image after the first block; of a computed call
        self.reused: Tensor | None = None  # image after the last block; of a reused call, until it is put in
        self.record: Call | None = None


class CacheHook:
    """The cache of one run, around its model and its blocks."""

    def __init__(self, cache: FirstBlockCache, run: Run, stopwatch: Stopwatch):
        self.cache = cache
        self.run = run
        self.stopwatch = stopwatch
        self._streams = Streams(cache.forget, cache.total)
        self._calls: dict[ModelCall, _State] = {}  # in progress: several with ComfyUI's MultiGPU

    def around_model(self, call: ModelCall, run: RunModel) -> Any:
        """Opens and closes a call."""
        if WARM_UP_KEY in call.options:
            return run(call)
        sigma = float(call.options["sigmas"].flatten()[0])
        step = self._step(call.options.get("sample_sigmas"), sigma)
        state = _State(self._streams.find(call.options, call.latent, sigma), sigma, step, *_ends(call))
        self._calls[call] = state
        stop = self.stopwatch.start()
        try:
            output = run(call)
        finally:
            del self._calls[call]
        if state.reused is not None:
            output = self._again(call, state, run)
        if state.record is not None:
            stop(state.record)
            add(self.run, state.record, self.stopwatch.look())
        return output

    def _again(self, call: ModelCall, state: _State, run: RunModel) -> Any:
        """Computes a call that was to be reused: another pack has left out the last block, which would have put in what
        is reused."""
        for stream in state.streams:
            self.cache.forget(stream)
        assert state.record is not None
        state.record.reused = False
        return run(call)

    def _step(self, schedule: Tensor | None, sigma: float) -> int:
        """The step that a call at this sigma belongs to. Reads the schedule once, when the device is idle anyway."""
        if schedule is None:
            return 0
        if self.cache.steps is None:
            sigmas = schedule.tolist()[:-1]
            self.run.steps = len(sigmas)
            self.cache.steps = Steps(sigmas, self.cache.start_sigma, self.cache.end_sigma)
        return sum(each > sigma for each in self.cache.steps.sigmas)

    def around_block(self, call: ModelCall, block: Block, values: Values, run: RunBlock) -> Values:
        """The first block decides; on a hit the blocks after it are passed by, and the last one writes its image."""
        state = self._calls.get(call)
        if state is None or block.beside:
            return run(values)
        if block is state.first:
            return self._first_block(call, state, values, run)
        # Without a signature: past end_percent, or another pack has put something in the first block's place.
        if state.signature is None or not state.first.index < block.index <= state.last.index:
            return run(values)
        if block is state.last:
            return self._last_block(call, state, values, run)
        return run(values) if state.reused is None else pass_by(block, values)

    def _first_block(self, call: ModelCall, state: _State, values: Values, run: RunBlock) -> Values:
        if self.cache.ended(state.sigma):
            for stream in state.streams:
                self.cache.forget(stream)
            self._record(state, Decision(False, None, self.cache.config.threshold, admitted=False))
            return run(values)
        # ComfyUI's blocks add in place: what comes after must not change what is kept from before.
        before = sample_tokens(call.image(state.first, values)).clone()
        out = run(values)
        image = call.image(state.first, out)
        state.signature = sample_tokens(image) - before
        decision = self.cache.decide(state.streams, state.signature, state.sigma, state.step)
        self._record(state, decision)
        if decision.reuse:
            state.reused = self.cache.apply(state.streams, image)
        else:
            state.after_first = image.clone()
        return out

    def _last_block(self, call: ModelCall, state: _State, values: Values, run: RunBlock) -> Values:
        """Runs the last block and keeps what the stack changed, or puts in what it would have changed."""
        if state.reused is not None:
            out = pass_by(state.last, values)
            # Written over, not added to: what others added between the blocks (ControlNet) is in the residual.
            call.write_image(state.last, out, state.reused)
            state.reused = None
            return out
        assert state.signature is not None and state.after_first is not None
        out = run(values)
        residual = state.after_first.neg_().add_(call.image(state.last, out))
        self.cache.store(state.streams, state.signature, residual, state.sigma)
        state.after_first = None
        return out

    def _record(self, state: _State, decision: Decision) -> None:
        state.record = Call(
            state.sigma,
            finite(decision.change),
            decision.threshold,
            decision.reuse,
            admitted=decision.admitted,
            parts=state.streams,
            step=state.step,
        )


def _ends(call: ModelCall) -> tuple[Block, Block]:
    """The blocks that decide, and that end what is reused: the first and the last that no other pack has replaced, for
    what it puts around a block sees the image before and after, and those differ on a hit. Where there are not two, the
    first and the last of all."""
    replaced = call.options.get("patches_replace", {}).get("dit", {})
    own = [block for block in call.network.blocks if block.key not in replaced]
    first, *_, last = own if len(own) > 1 else call.network.blocks
    return first, last
