"""Regional compilation: the blocks are compiled, the rest of the model runs as it is.

All blocks of a kind share one compiled graph, because weights are inputs of the graph. What would compile it anew is
kept away from the blocks: they get only those transformer_options that they use, and rotary factors go to the attention
in plain torch, where the compiler joins them to the norms before it.
"""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from .. import live
from ..attention import ATTENDED_KEY, BLOCK_KEY, OTHER_KEY, PART_KEY, ROPE_KEY, enter_block, override
from ..models import (
    OPTIONS,
    OVERRIDE,
    WARM_UP_KEY,
    Block,
    Forward,
    ModelCall,
    RunBlock,
    RunModel,
    Stack,
    Values,
    pass_by,
    passed_by,
)
from ..out_of_memory import is_out_of_memory
from ..plan import CompileConfig
from .errors import is_compilers, reason, root_of
from .graphs import BlockGraphs

logger = logging.getLogger("skein")

DYNAMIC = {"auto": None, "on": True, "off": False}
RECOMPILE_LIMIT = 64  # graphs of one kind of block: sizes x batch sizes x types x FP8 modes, over a session

FUNCTIONS = "weight_function", "bias_function"  # of ComfyUI's layers: what patches them in each call
PATCHED = (
    "blocks that are not wholly on the GPU run uncompiled, because ComfyUI puts the LoRA on them in each call; add "
    "FP8 Quantize, which makes the model smaller and merges the LoRA"
)


def compile_settings(config: CompileConfig) -> dict[str, Any]:
    """Arguments of torch.compile. Raises ValueError where this PyTorch cannot do it.

    Inductor's own settings stay as they are: the ones that torchao would set autotune every matrix product, which
    took 313 s on an H100 and gained nothing.
    """
    if not hasattr(torch.compiler, "set_stance"):
        raise ValueError(
            f"Compiled blocks need PyTorch 2.6 or newer, this is {torch.__version__}; update it or remove the node."
        )
    return {
        "backend": "inductor",
        "mode": "max-autotune-no-cudagraphs" if config.mode.startswith("max-autotune") else None,  # see graphs.py
        "dynamic": DYNAMIC[config.dynamic],
        "fullgraph": True,
    }


class CompiledBlocks:
    """The compiled blocks of one run: arguments that keep graphs valid, warm-up, and the way back to eager.

    Stands next to the blocks' own forwards, inside of everything else. say: shows a line of status to the user.
    same_kernels: whether a block starts the same attention kernels in each call. moves: whether a block's weights are
    elsewhere in each call.
    """

    def __init__(
        self,
        config: CompileConfig,
        say: Callable[[str], None],
        same_kernels: bool = False,
        moves: Callable[[Block], bool] = lambda block: False,
    ):
        self.config = config
        self.moves = moves
        self.same_kernels = same_kernels and not config.mode.endswith("no-cudagraphs")
        self.graphs = BlockGraphs()
        self.say = say
        self.arguments = compile_settings(config)
        self._compiled: dict[str, Callable] = {}  # path of a block -> its forward, compiled
        self._layers: dict[str, list[Any]] = {}  # path of a block -> its layers that ComfyUI may patch in each call
        self.failed = False
        self.patched = False  # whether a block has run as PATCHED says
        self._warm: set[tuple] = set()  # input shapes

    @contextmanager
    def settings(self) -> Iterator[None]:
        """Within: PyTorch's compiler settings of this run."""
        limit = "recompile_limit" if hasattr(torch._dynamo.config, "recompile_limit") else "cache_size_limit"
        try:
            with torch._dynamo.config.patch({limit: RECOMPILE_LIMIT}):
                yield
        finally:
            self.graphs.clear()

    def around_model(self, call: ModelCall, run: RunModel) -> Any:
        """Before the first call of a size, one block of each kind runs to be compiled."""
        shapes = tuple(tuple(a.shape) for a in call.arguments.values() if isinstance(a, torch.Tensor))
        if self.config.warm_up and not self.failed and shapes not in self._warm:
            self._warm.add(shapes)
            kinds: dict[tuple, str] = {}  # of block, and the path of the one that runs
            self._warm_up(lambda: run(call.changed(**{OPTIONS: {**call.options, WARM_UP_KEY: kinds}})))
        return run(call)

    def _warm_up(self, run: Callable[[], Any]) -> None:
        self.say("compiling blocks; the first time this takes about half a minute")
        started, graphs = time.perf_counter(), _graphs()
        with live.activity("Compiling the blocks"):
            run()
        made = _graphs() - graphs
        if not self.failed and not self.patched:
            seconds = time.perf_counter() - started
            self.say(f"compiled {made} graphs in {seconds:.1f} s" if made else "compiled before")

    def around_block(self, call: ModelCall, block: Block, values: Values, run: RunBlock) -> Values:
        """The block compiled, or as it is where that fails."""
        assert isinstance(run, Forward)
        if WARM_UP_KEY in call.options:
            call.options[WARM_UP_KEY].setdefault(block.kind, block.path)
        if passed_by(call, block):
            return pass_by(block, values)
        if not self.failed and not self._patches_as_it_runs(block):
            enter_block(values.get(OPTIONS) or call.options)
            try:
                return self._run_compiled(call, block, values, run)
            except Exception as error:
                self._handle(error, block, run)
        # The graph is whole or absent, so nothing has run yet and `values` are as they were.
        with torch.compiler.set_stance("force_eager"):
            return run(values)

    def _patches_as_it_runs(self, block: Block) -> bool:
        """Whether ComfyUI puts a LoRA on layers of a block in each call, because they are not on the device. What it
        does that with is another in each layer and would make another graph of each block."""
        if block.path not in self._layers:
            layers = block.module.modules()
            self._layers[block.path] = [each for each in layers if any(hasattr(each, name) for name in FUNCTIONS)]
        patches = any(getattr(layer, name, None) for layer in self._layers[block.path] for name in FUNCTIONS)
        if patches and not self.patched:
            self.patched = True
            logger.warning("Skein compile: %s", PATCHED)
            self.say(PATCHED)
        return patches

    def _run_compiled(self, call: ModelCall, block: Block, values: Values, run: Forward) -> Values:
        started, graphs = time.perf_counter(), _graphs()
        if block.path not in self._compiled:
            self._compiled[block.path] = torch.compile(run.forward, **self.arguments)
        compute, values = partial(run.by, self._compiled[block.path]), self._stable(block, values)
        steady = self._is_steady(call) and not self.moves(block) and PART_KEY not in values.get(OPTIONS, {})
        if steady and self.graphs.suit(block, values):
            compute = partial(self.graphs.run, block, compute=compute)
        out = compute(values)
        if _graphs() > graphs:
            logger.info("Skein compile: %s in %.1f s", block, time.perf_counter() - started)
        return out

    def _is_steady(self, call: ModelCall) -> bool:
        """Whether blocks start the same kernels in each call. Another node's attention may not; nor is a warm-up one of
        many calls."""
        return self.same_kernels and OTHER_KEY not in call.options and WARM_UP_KEY not in call.options

    def _stable(self, block: Block, values: Values) -> Values:
        """Arguments that keep graphs valid: only the options that a block uses, rotary factors for the attention to
        apply, sizes that depend on the text marked as variable, and no views, as the first block's image may be."""
        stack = block.stack
        stable = dict(values)
        for name in (stack.image, stack.text):
            if isinstance(stable.get(name), torch.Tensor):
                stable[name] = stable[name].contiguous()
        if self.config.dynamic == "auto":
            for name, dim in _text_dimensions(stack):
                _mark_dynamic(stable.get(name), dim)
        # block_index: one number for all, or each block would be compiled for its own.
        needed: dict[str, Any] = {OVERRIDE: override, BLOCK_KEY: True, "block_index": 0}
        needed |= {key: values[OPTIONS][key] for key in (PART_KEY, ATTENDED_KEY) if key in values.get(OPTIONS, {})}
        if self.config.dynamic == "auto":
            _mark_dynamic(needed.get(ATTENDED_KEY), 1)
        if stack.rope and stable.get(stack.rope) is not None:
            needed[ROPE_KEY], stable[stack.rope] = stable[stack.rope], None
        return {**stable, OPTIONS: needed} if OPTIONS in stable else stable

    def _handle(self, error: Exception, block: Block, run: Forward) -> None:
        """Compile nothing more in this run, and say why; but an error that is not the compiler's is raised again."""
        root = root_of(error)
        if isinstance(root, Exception) and is_out_of_memory(root):
            raise root from error
        if block.path in self._compiled and not is_compilers(error):
            raise error
        self.failed = True
        why = reason(error, block.module, run.forward)
        logger.warning("Skein compile: %s failed, this run goes on uncompiled (%s)", block, why)
        logger.debug("Skein compile: the compiler said", exc_info=error)
        self.say(f"uncompiled: {block} could not be compiled ({why})")


def _text_dimensions(stack: Stack) -> list[tuple[str, int]]:
    """Parameters of a block and their dimensions that count the text's tokens."""
    found = [(each.name, each.dim) for each in stack.tokens if each.of in ("sequence", "text", "mask")]
    if stack.text:
        found.append((stack.text, 1))
    elif stack.order:
        found.append((stack.image, 1))
    return found


def _mark_dynamic(value: Any, dim: int) -> None:
    for each in value if isinstance(value, (tuple, list)) else (value,):
        if isinstance(each, torch.Tensor):
            torch._dynamo.maybe_mark_dynamic(each, dim)


def _graphs() -> int:
    """How many graphs this process has compiled."""
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"]
