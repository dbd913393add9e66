"""Compiled blocks as CUDA graphs, where a block is so small that starting its kernels takes longer than they run.

torch.compile's own way, mode "reduce-overhead", fails in a thread that Python has started, such as ComfyUI's, in all
but the newest PyTorchs (https://github.com/pytorch/pytorch/issues/123177). Here each block is recorded once a run. Its
inputs are copied to where its graph reads them, and its outputs from where the graph leaves them to memory of their
own. All graphs of a run share these places and the memory in between, and so take what one block takes.
"""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import FunctionType, NoneType
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from ..models import Block, Values

logger = logging.getLogger("skein")

MOST_VALUES = 1 << 25  # of a block's image tokens: above, the GPU computes longer than the host starts kernels
MOST_KINDS = 8  # of inputs that one block is recorded for in a run: those of a model that is called in turns
PLAIN = (int, float, str, NoneType, FunctionType)

Compute = Callable[[Values], Values]
Replay = Callable[[], None]


class CudaRecorder:
    """Records what a function starts on one GPU, on a stream of its own."""

    _streams: dict[torch.device, torch.cuda.Stream] = {}  # kept: cuBLAS keeps memory for each stream that it has seen

    def __init__(self, device: torch.device):
        self.device = device
        self.stream = self._streams.get(device) or self._streams.setdefault(device, torch.cuda.Stream(device))
        self.pool = torch.cuda.graph_pool_handle()

    def wait(self) -> None:
        """Until the GPU has computed all."""
        torch.cuda.synchronize(self.device)

    def seconds(self, replay: Replay) -> float:
        """How long the GPU takes for a graph."""
        self.wait()
        started = time.perf_counter()
        replay()
        self.wait()
        return time.perf_counter() - started

    def prepare(self, compute: Callable[[], Values]) -> Values:
        """Run on that stream, so that libraries take there, outside of graphs, the memory that they keep."""
        outer = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(outer)
        with torch.cuda.stream(self.stream):
            out = compute()
        outer.wait_stream(self.stream)
        return out

    def record(self, compute: Callable[[], None]) -> Replay:
        """What runs the kernels that `compute` starts; now none runs. Raises what CUDA raises."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self.stream):
            # Not torch.cuda.graph, which in older PyTorchs collects garbage first: 0.1 s a block.
            graph.capture_begin(self.pool, capture_error_mode="thread_local")
            try:
                compute()
            finally:
                graph.capture_end()
        return graph.replay


RECORDERS: dict[str, Callable[[torch.device], Any]] = {"cuda": CudaRecorder}  # by type of device


class Given:
    """The values that a block is given. kind: equal where the same graph computes them. plain: no tensors may be hidden
    in objects, as Chroma, FLUX.2 and LTX-2 have them: a graph would go on reading those of its recording."""

    def __init__(self, values: Values):
        self.leaves, self.form = tree_flatten(values)
        self.tensors = [leaf for leaf in self.leaves if isinstance(leaf, Tensor)]
        others = tuple(leaf for leaf in self.leaves if not isinstance(leaf, Tensor))
        self.plain = all(isinstance(leaf, PLAIN) for leaf in others)
        layouts = tuple((each.shape, each.stride(), each.dtype, each.device) for each in self.tensors)
        self.kind = str(self.form), others, layouts


@dataclass
class Recorded:
    """One block's graph. weights: where its parameters were when it was recorded."""

    weights: tuple[int, ...]
    inputs: Sequence[Tensor]
    outputs: Values
    replay: Replay

    def run(self, given: Given) -> Values:
        for place, tensor in zip(self.inputs, given.tensors, strict=True):
            place.copy_(tensor)
        self.replay()
        return tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, self.outputs)


def supported() -> bool:
    """Whether graphs can be had in this process. Under cudaMallocAsync, which ComfyUI takes by default, CUDA refuses
    kernels on memory that is allocated while it records, and the process ends."""
    if not torch.cuda.is_available():
        return True  # nothing is on a GPU then
    return torch.version.hip is None and torch.cuda.get_allocator_backend() == "native"


@dataclass
class Trial:
    """What is known of blocks of one kind with values of one kind.

    host_s: seconds that the host takes to start the kernels of one; None until measured. pays: whether the GPU is done
    with them sooner, so that it would wait.
    """

    host_s: float | None = None
    pays: bool | None = None


class BlockGraphs:
    """The recorded blocks of one run."""

    def __init__(self) -> None:
        self.off = not supported()
        self._recorder: Any = None
        self._recorded: dict[str, dict[tuple, Recorded]] = {}  # path of a block -> kind of its values -> its graph
        self._trials: dict[tuple, Trial] = {}  # kind of a block, kind of its values
        self._places: dict[tuple, Tensor] = {}
        self._blocks: dict[str, tuple[tuple, list[dict]]] = {}  # path -> its kind and its layers' parameters

    def suit(self, block: Block, values: Values) -> bool:
        """Whether a block with such values is small enough to gain by a graph."""
        images = [each for each in tree_flatten(values.get(block.stack.image))[0] if isinstance(each, Tensor)]
        small = sum(each.numel() for each in images) <= MOST_VALUES
        return small and not self.off and all(each.device.type in RECORDERS for each in images)

    def run(self, block: Block, values: Values, compute: Compute) -> Values:
        """What `compute` returns for these values: by the block's graph, or by calling it where there is none yet, none
        can be, or none pays."""
        given = Given(values)
        if not given.plain:
            return compute(values)
        block_kind, weights = self._known(block)
        trial = self._trials.get((block_kind, given.kind))
        if trial is not None and trial.pays is False:
            return compute(values)
        addresses = tuple(weight.data_ptr() for weight in weights)
        recorded = self._recorded.setdefault(block.path, {})
        if given.kind in recorded and recorded[given.kind].weights == addresses:
            return recorded[given.kind].run(given)
        if len(recorded) >= MOST_KINDS or not _recordable([*given.tensors, *weights]):
            return compute(values)
        self._recorder = self._recorder or RECORDERS[given.tensors[0].device.type](given.tensors[0].device)
        if trial is None or trial.host_s is None:
            return self._try(block_kind, given, lambda: compute(values))
        try:
            recorded[given.kind] = self._record(given, compute, addresses)
        except Exception as error:
            # Nothing of it has run. If memory is short, the block may still run without a graph.
            why = str(error).partition("\n")[0]
            logger.warning("Skein compile: %s runs without a CUDA graph, as do the others (%s)", block, why)
            self.clear()
            self.off = True
            return compute(values)
        out = recorded[given.kind].run(given)
        if trial.pays is None:
            self._judge(trial, block, recorded[given.kind].replay)
        return out

    def _known(self, block: Block) -> tuple[tuple, list[Tensor]]:
        """A block's kind and its parameters, which may be others in each call."""
        if block.path not in self._blocks:
            self._blocks[block.path] = block.kind, [layer._parameters for layer in block.module.modules()]
        kind, layers = self._blocks[block.path]
        return kind, [weight for layer in layers for weight in layer.values() if weight is not None]

    def _try(self, block_kind: tuple, given: Given, compute: Callable[[], Values]) -> Values:
        """The first block of a kind is run as it will be recorded, the second is timed."""
        trial = self._trials.get((block_kind, given.kind))
        if trial is None:
            out = self._recorder.prepare(compute)
            self._in_places("out", tree_flatten(out)[0])  # made now: what is made while CUDA records may be a graph's
            self._trials[block_kind, given.kind] = Trial()
            return out
        self._recorder.wait()  # a host that is far ahead would wait for the GPU in between
        started = time.perf_counter()
        out = compute()
        trial.host_s = time.perf_counter() - started
        return out

    def _judge(self, trial: Trial, block: Block, replay: Replay) -> None:
        """Find out whether graphs pay for blocks of this kind, by the first of them."""
        seconds = self._recorder.seconds(replay)
        assert trial.host_s is not None
        trial.pays = seconds < trial.host_s
        logger.info(
            "Skein compile: blocks like %s %s CUDA graphs: the GPU takes %.2f ms, the host %.2f ms to start it",
            block, "run as" if trial.pays else "gain nothing by", 1000 * seconds, 1000 * trial.host_s,
        )  # fmt: skip
        if not trial.pays:
            self._recorded[block.path].clear()
            if not any(self._recorded.values()):
                self._recorder = None  # CUDA gives the memory of graphs back with the last of them

    def _record(self, given: Given, compute: Compute, addresses: tuple[int, ...]) -> Recorded:
        inputs, outputs = self._in_places("in", given.leaves), Values()

        def run() -> None:
            out, out_form = tree_flatten(compute(tree_unflatten(inputs, given.form)))
            kept = self._in_places("out", out)
            for place, leaf in zip(kept, out):
                if isinstance(leaf, Tensor):
                    place.copy_(leaf)
            outputs.update(tree_unflatten(kept, out_form))

        replay = self._recorder.record(run)
        return Recorded(addresses, [place for place in inputs if isinstance(place, Tensor)], outputs, replay)

    def _in_places(self, of: str, leaves: list) -> list:
        """The same with the places of its tensors, which all blocks share, instead of them."""
        found = list(leaves)
        for i, leaf in enumerate(leaves):
            if isinstance(leaf, Tensor):
                key = of, i, leaf.shape, leaf.stride(), leaf.dtype
                found[i] = self._places.get(key)
                if found[i] is None:
                    found[i] = self._places[key] = torch.empty_like(leaf)
        return found

    def clear(self) -> None:
        """Give the memory back."""
        for held in (self._recorded, self._trials, self._places, self._blocks):
            held.clear()
        self._recorder = None


def _recordable(tensors: Sequence[Tensor]) -> bool:
    """Whether all are on one device, and copies of them would have their strides, which a block is compiled for."""
    dense = all(torch.empty_like(each, device="meta").stride() == each.stride() for each in tensors)
    return dense and len({each.device for each in tensors}) == 1
