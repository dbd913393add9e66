"""What a run puts around a network's forward and around each of its blocks: the seam that all techniques share.

A forward is set on the instance for one call of the model, and taken off again. So it stands inside of what other nodes
put around the call and around blocks (ComfyUI's wrappers and patches_replace), and outside of an object patch on
the forward itself. Arguments come by the names of the class's own forward.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from torch import Tensor, nn

from ..attributes import changed
from .call import OPTIONS, ModelCall, Values
from .network import Block, Network

RunModel = Callable[[ModelCall], Any]
AroundModel = Callable[[ModelCall, RunModel], Any]
RunBlock = Callable[[Values], Values]
AroundBlock = Callable[[ModelCall, Block, Values, RunBlock], Values]


class Seam:
    """What stands around the model's calls in one run, outermost first. A wrapper calls what it is handed."""

    def __init__(self) -> None:
        self.models: list[AroundModel] = []
        self.blocks: list[AroundBlock] = []
        self.within: Callable[[Forward], Callable] | None = None  # what stands in the place of a block's own forward
        self.after: Callable[[Tensor], Tensor] | None = None  # what the image goes through before Architecture.after

    @contextmanager
    def on(self, module: nn.Module) -> Iterator[None]:
        """Within: a diffusion model's calls run inside of this run's wrappers."""
        network = Network(module)
        current: list[ModelCall] = []  # the call in progress is the last
        changes: list[tuple[Any, str, Any]] = [(module, entry_of(module), self._network_forward(network, current))]
        for block in [*network.blocks, *network.beside] if self.blocks else ():
            changes.append((block.module, "forward", self._block_forward(block, current)))
        if self.after is not None and network.architecture.after:
            after = module.get_submodule(network.architecture.after)
            changes.append((after, "forward", _of_first(self.after, after.forward)))
        with changed(changes):
            yield

    def _network_forward(self, network: Network, current: list[ModelCall]) -> Callable:
        entry = entry_of(network.module)
        names, forward = parameters_of(network.module, entry), getattr(network.module, entry)

        def run(call: ModelCall) -> Any:
            current.append(call)
            try:
                return forward(**call.arguments)
            finally:
                current.pop()

        def around(*args: Any, **kwargs: Any) -> Any:
            assert len(args) <= len(names)
            arguments = {**dict(zip(names, args)), **kwargs}
            arguments[OPTIONS] = arguments.get(OPTIONS) or {}
            return _inside(self.models, run)(ModelCall(network, arguments))

        return around

    def _block_forward(self, block: Block, current: list[ModelCall]) -> Callable:
        own = Forward(block)
        if self.within is not None:
            own.forward = self.within(own)

        def around(*args: Any, **kwargs: Any) -> Any:
            if not current:  # by another's hand, outside of a call
                return own.forward(*args, **kwargs)
            call = current[-1]
            values = own.named(args, kwargs)
            call.enter(block, values)
            run: RunBlock = own
            for wrapper in reversed(self.blocks):
                run = _bound(wrapper, call, block, run)
            return own.returned(run(values))

        return around


def _inside(wrappers: list[AroundModel], run: RunModel) -> RunModel:
    for wrapper in reversed(wrappers):
        run = _around(wrapper, run)
    return run


def _around(wrapper: AroundModel, run: RunModel) -> RunModel:
    return lambda call: wrapper(call, run)


def _bound(wrapper: AroundBlock, call: ModelCall, block: Block, run: RunBlock) -> RunBlock:
    return lambda values: wrapper(call, block, values, run)


def _of_first(change: Callable[[Tensor], Tensor], forward: Callable) -> Callable:
    return lambda first, *args, **kwargs: forward(change(first), *args, **kwargs)


class Forward:
    """A block's forward, called with values by name and returning such."""

    def __init__(self, block: Block):
        self.block, self.stack = block, block.stack
        self.names = self.stack.parameters or self._names(block.module)
        self.forward = block.module.forward
        self.positional = 0  # as many as its network calls it with

    def _names(self, module: nn.Module) -> tuple[str, ...]:
        """Of the forward's positional parameters; those of the block itself where a module around it (a compiled one)
        does not name them."""
        named = (parameters_of(each, "forward") for each in module.modules())
        return next((names for names in named if self.stack.image in names), ())

    def __call__(self, values: Values) -> Values:
        return self.by(self.forward, values)

    def by(self, forward: Callable, values: Values) -> Values:
        """The same by another function in the forward's place."""
        given = dict(values)
        first = [given.pop(name) for name in self.names[: self.positional]]
        out = forward(*first, **given)
        return dict(zip(self.stack.outputs, out if len(self.stack.outputs) > 1 else (out,)))

    def named(self, args: tuple, kwargs: dict) -> Values:
        """A call's arguments by name. Raises ValueError if they are not those of the page."""
        self.positional = len(args)
        values = {**dict(zip(self.names, args)), **kwargs}
        if len(args) > len(self.names) or self.stack.image not in values:
            raise ValueError(
                f"Skein does not know the arguments of {self.block} of this model; remove the node that replaced it, "
                "or the Skein nodes."
            )
        return values

    def returned(self, values: Values) -> Any:
        """What forward returns, from values by name."""
        out = tuple(values[name] for name in self.stack.outputs)
        return out if len(out) > 1 else out[0]


def entry_of(network: nn.Module) -> str:
    """The name of the function of a network that is inside of ComfyUI's DIFFUSION_MODEL wrappers, where it has them."""
    return "_forward" if hasattr(type(network), "_forward") else "forward"


def parameters_of(module: nn.Module, function: str) -> tuple[str, ...]:
    """Names of the positional parameters of a method of a module's class."""
    return _parameters_of(getattr(type(module), function))


@cache
def _parameters_of(function: Callable) -> tuple[str, ...]:
    named = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(function).parameters.values()
    return tuple(each.name for each in parameters if each.kind in named)[1:]
