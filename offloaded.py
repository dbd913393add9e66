"""Weights that ComfyUI has left off the device: a block's are on it for as long as the block runs, and come while the
block before it runs.

The copies are made by a thread, on a stream of their own. So neither the host nor the device waits for them, as long as
a block computes for longer than its weights travel. What ComfyUI has pinned is sent off before the block is started;
what it has not, after that, because CUDA may make such copies at once and hold up who starts kernels meanwhile. All
memory is of the stream that computes: that waits for the copies before it reads them, or gives their memory to others.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any

import comfy.model_management as memory
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor, nn

from .attributes import changed
from .models import Block, ModelCall, Network, RunBlock, RunModel, Values, first_tensor, passed_by
from .out_of_memory import is_out_of_memory
from .patchers import take_off_weights
from .quantization import is_plain
from .units import bytes_text

logger = logging.getLogger("skein")

# Of ComfyUI's layers: whether they cast their weights in each call; and that, as it was before they were left off the
# device, where they are.
CASTS, CAST = "comfy_cast_weights", "prev_comfy_cast_weights"
Parameters = dict[str, nn.Parameter | None]  # of one layer

RAN_OUT = "memory ran out; all weights leave the GPU, and this call is made once more"
COMES = "{} of the blocks' {} of weights stay in the computer's memory; each block's come while the one before it runs"


class CudaCopies:
    """Copies to a device on a stream of their own."""

    def __init__(self, device: torch.device):
        self.device, self.stream = device, torch.cuda.Stream(device)

    def now(self) -> Any:
        """What the computing stream has come to."""
        return torch.cuda.current_stream(self.device).record_event()

    def copy(self, pairs: Iterable[tuple[Tensor, Tensor]], ready: Any) -> Any:
        """Copy (target, source) once the device is `ready`; tells when that is done."""
        with torch.cuda.device(self.device), torch.cuda.stream(self.stream):
            self.stream.wait_event(ready)
            for target, source in pairs:
                copy(target, source)
            return self.stream.record_event()

    def wait(self, done: Any) -> None:
        """Have the computing stream wait."""
        torch.cuda.current_stream(self.device).wait_event(done)


SMALL = 1 << 16  # bytes that CUDA takes with the call, pinned or not
COPIES: dict[str, Callable[[torch.device], Any]] = {"cuda": CudaCopies}  # by type of device; others copy when they need


class OffloadedBlocks:
    """A run's blocks, whose weights come to the device as they run. Stands outside of what computes a block, compiled
    or in slices. say: shows a line to the user. patcher: the model's, whose weights may be taken off the device when
    memory runs out; None: they may not."""

    def __init__(self, say: Callable[[str], None], patcher: ModelPatcher | None = None):
        self.say, self.patcher = say, patcher
        self._layers: dict[nn.Module, list[Any]] = {}  # of each block, those that can be fetched
        self._came: set[nn.Module] = set()
        self._coming: dict[nn.Module, _Coming] = {}
        self._copies: dict[torch.device, Any] = {}
        self._thread = ThreadPoolExecutor(1, "skein-weights")
        self._told = False

    @contextmanager
    def on(self) -> Iterator[None]:
        """The run."""
        try:
            yield
        finally:
            self._thread.shutdown()

    def came(self, block: Block) -> bool:
        """Whether a block's weights were brought: they are elsewhere in each call."""
        return block.module in self._came

    def around_model(self, call: ModelCall, run: RunModel) -> Any:
        """Within: the first block's weights are on their way; after it: no weights are."""
        self._tell(call)
        self._ahead(call, call.network.blocks[0], call.latent.device).begin()
        try:
            return run(call)
        finally:
            self._drop(call)

    def around_call(self, call: ModelCall, run: RunModel) -> Any:
        """A call for which memory runs out is made once more with all weights off the device: how much the allocator
        makes of free memory is known to nobody beforehand."""
        try:
            return run(call)
        except Exception as error:
            if not is_out_of_memory(error) or not self._has_weights_there(call):
                raise
        # What the call had in memory has gone with the exception.
        self._drop(call)
        take_off_weights(self.patcher)
        logger.warning("Skein: %s", RAN_OUT)
        self._told = False
        self._tell(call)
        return run(call)

    def _has_weights_there(self, call: ModelCall) -> bool:
        """Whether the device has weights that may be taken off."""
        patcher = self.patcher
        return (
            patcher is not None and call.network.module is patcher.model.diffusion_model and patcher.loaded_size() > 0
        )

    def _drop(self, call: ModelCall) -> None:
        """No weights are on their way any more."""
        for coming in [self._coming.pop(block.module, NOTHING) for block in call.network.blocks]:
            coming.drop()

    def around_block(self, call: ModelCall, block: Block, values: Values, run: RunBlock) -> Values:
        """A block beside its weights."""
        if passed_by(call, block):
            return run(values)
        device = first_tensor((values[block.stack.image],)).device
        coming = self._coming.pop(block.module, None) or self._send_for(block, device)
        weights, following = coming.arrived(), NOTHING
        if not block.beside and block is not call.network.blocks[-1]:
            following = self._ahead(call, call.network.blocks[block.index + 1], device)
        if following.quick:
            following.begin()
        with changed(_set(weights)):
            out = run(values)
        following.begin()
        return out

    def _ahead(self, call: ModelCall, block: Block, device: torch.device) -> "_Coming":
        """The weights of a block that is still to run, where that takes nobody's time or memory."""
        if passed_by(call, block) or device.type not in COPIES:
            return NOTHING
        try:
            coming = self._coming.get(block.module) or self._send_for(block, device)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            return NOTHING
        if coming is not NOTHING:
            self._coming[block.module] = coming
        return coming

    def _send_for(self, block: Block, device: torch.device) -> "_Coming":
        """What is not on the device of a block's weights, to be copied there."""
        layers = self._offloaded(block, device)
        if not layers:
            return NOTHING
        if device.type in COPIES and device not in self._copies:
            self._copies[device] = COPIES[device.type](device)
        self._came.add(block.module)
        return _Coming(layers, device, self._copies.get(device), self._thread)

    def _offloaded(self, block: Block, device: torch.device) -> list[Any]:
        """A block's layers with weights elsewhere. Layers under ComfyUI's dynamic VRAM, and weights of other types than
        PyTorch's own, have ways of their own."""
        if block.module not in self._layers:
            layers = [layer for layer in block.module.modules() if layer._parameters and not hasattr(layer, "_v")]
            self._layers[block.module] = layers
        away = [layer for layer in self._layers[block.module] if _is_away(layer, device)]
        return [layer for layer in away if all(map(is_plain, _weights(layer)))]

    def _tell(self, call: ModelCall) -> None:
        """How much of the weights is to come."""
        if self._told:
            return
        self._told, device = True, call.latent.device
        away = [w for each in call.network.blocks for layer in self._offloaded(each, device) for w in _weights(layer)]
        size = sum(weight.nbytes for weight in away if weight.device != device)
        if size:
            whole = sum(weight.nbytes for each in call.network.blocks for weight in each.module.parameters())
            text = COMES.format(bytes_text(size), bytes_text(whole))
            logger.info("Skein: %s", text)
            self.say(text)


class _Coming:
    """Weights of a block's layers, to come to the device. copies: what the thread makes them with; None: they are made
    when they are asked for."""

    def __init__(self, layers: Sequence[Any], device: torch.device, copies: Any, thread: ThreadPoolExecutor | None):
        """Takes their memory on the device; raises what that raises."""
        self.pairs: list[tuple[Tensor, Tensor]] = []
        self.weights: list[tuple[Any, Parameters]] = []
        for layer in layers:
            self.weights.append((layer, {name: self._place(device, w) for name, w in layer._parameters.items()}))
        self._copies, self._thread = copies, thread
        self._ready = None if copies is None else copies.now()
        self._done: Future | None = None

    def _place(self, device: torch.device, weight: Tensor | None) -> Any:
        if weight is None or weight.device == device:
            return weight
        place = torch.empty_like(weight, device=device)
        self.pairs.append((place, weight))
        return nn.Parameter(place, requires_grad=False)

    @property
    def quick(self) -> bool:
        """Whether CUDA takes the copies without making them at once."""
        return all(source.nbytes <= SMALL or source.is_pinned() for _, source in self.pairs)

    def begin(self) -> None:
        """Have the thread copy them, once the device has come to where their memory was taken."""
        if self._thread is not None and self._copies is not None and self._done is None:
            self._done = self._thread.submit(self._copy)

    def _copy(self) -> Any:
        with torch.inference_mode():
            return self._copies.copy(self.pairs, self._ready)

    def arrived(self) -> list[tuple[Any, Parameters]]:
        """Each layer and its parameters, to be used from here on. Raises what copying them raised."""
        self.begin()
        if self._done is not None:
            self._copies.wait(self._done.result())
        else:
            for target, source in self.pairs:
                copy(target, source)
        return self.weights

    def drop(self) -> None:
        """Nobody has asked for them: their memory is given back when nothing writes there any more."""
        if self._done is not None:
            with suppress(Exception):
                self._copies.wait(self._done.result())


NOTHING = _Coming((), torch.device("cpu"), None, None)


def copy(target: Tensor, source: Tensor) -> None:
    """A weight to its place on the device."""
    target.copy_(source, non_blocking=memory.device_supports_non_blocking(target.device))


def ahead_bytes(network: Network) -> int:
    """Bytes of the weights of two blocks: the one that runs, and the next."""
    return 2 * max(sum(weight.nbytes for weight in block.module.parameters()) for block in network.blocks)


def _set(weights: "list[tuple[Any, Parameters]]") -> Iterator[tuple[Any, str, Any]]:
    """Changes (attributes.py) that put weights into their layers, which ComfyUI then need not cast: a compiled block
    would have another graph for each set of such layers."""
    for layer, parameters in weights:
        yield layer, "_parameters", parameters
        if hasattr(layer, CAST):
            yield layer, CASTS, getattr(layer, CAST)


def _is_away(layer: Any, device: torch.device) -> bool:
    return hasattr(layer, CAST) or any(weight.device != device for weight in _weights(layer))


def _weights(layer: Any) -> list[Tensor]:
    return [weight for weight in layer._parameters.values() if weight is not None]
