"""Regional compilation: the blocks are compiled, the rest of the model runs as it is.

All blocks of a kind share one compiled graph, because weights are inputs of the graph. What would compile it anew is
kept away from the blocks: they get only those transformer_options that they use, and rotary factors go to the attention
in plain torch, where the compiler joins them to the norms before it.

The functions take ComfyUI's block arguments as plain dicts, so nothing of ComfyUI is imported.
"""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..attention import ROPE_KEY, enter_block, override
from ..models import OVERRIDE, WARM_UP_KEY, BlockKey, call_options
from ..out_of_memory import is_out_of_memory
from ..plan import CompileConfig
from .errors import is_compilers, reason, root_of

logger = logging.getLogger("skein")

DYNAMIC = {"auto": None, "on": True, "off": False}
RECOMPILE_LIMIT = 64  # graphs of one kind of block: sizes x batch sizes x types x FP8 modes, over a session

PATCHED = (
    "blocks that are not wholly on the GPU run uncompiled, because ComfyUI puts the LoRA on them in each call; FP8 "
    "makes the model smaller and merges the LoRA"
)

Block = Callable[[dict], dict]


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
        "mode": None if config.mode == "default" else config.mode,
        "dynamic": DYNAMIC[config.dynamic],
        "fullgraph": True,
    }


class CompiledBlocks:
    """The compiled blocks of one run: arguments that keep graphs valid, warm-up, and the way back to eager.

    say: shows a line of status to the user.
    """

    def __init__(self, config: CompileConfig, say: Callable[[str], None]):
        self.config = config
        self.say = say
        self.failed = False
        self.patched = False  # whether a block has run as PATCHED says
        self._warm: set[tuple] = set()  # input shapes

    @contextmanager
    def settings(self) -> Iterator[None]:
        """Within: PyTorch's compiler settings of this run."""
        limit = "recompile_limit" if hasattr(torch._dynamo.config, "recompile_limit") else "cache_size_limit"
        with torch._dynamo.config.patch({limit: RECOMPILE_LIMIT}):
            yield

    def around_model(self, execute: Callable, *args: Any, **kwargs: Any) -> Any:
        """DIFFUSION_MODEL wrapper: before the first call of a size, one block of each kind runs to be compiled."""
        shapes = tuple(tuple(a.shape) for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor))
        if self.config.warm_up and not self.failed and shapes not in self._warm:
            self._warm.add(shapes)
            options = call_options(args, kwargs)
            warm = {**options, WARM_UP_KEY: set()}  # the kinds of block that have run
            self._warm_up(
                lambda: execute(
                    *(warm if a is options else a for a in args),
                    **{name: warm if a is options else a for name, a in kwargs.items()},
                )
            )
        return execute(*args, **kwargs)

    def _warm_up(self, run: Callable[[], Any]) -> None:
        self.say("compiling blocks; the first time this takes about half a minute")
        started, graphs = time.perf_counter(), _graphs()
        run()
        made = _graphs() - graphs
        if not self.failed and not self.patched:
            seconds = time.perf_counter() - started
            self.say(f"compiled {made} graphs in {seconds:.1f} s" if made else "compiled before")

    def around_block(self, key: BlockKey, module: nn.Module) -> Callable[[dict, Block], dict]:
        """A wrapper (args, block) for one block, with nothing of another pack's between it and the block.

        module: the block, as ComfyUI loads and patches it.
        """

        def run(args: dict, block: Block) -> dict:
            warmed = args["transformer_options"].get(WARM_UP_KEY)
            if warmed is not None:
                if key[0] in warmed:
                    return {name: args[name] for name in ("img", "txt") if name in args}
                warmed.add(key[0])
            if not self.failed and not self._patches_as_it_runs(module):
                enter_block(args["transformer_options"])
                try:
                    return self._run_compiled(key, args, block)
                except Exception as error:
                    self._handle(error, key, module)
            # The graph is whole or absent, so nothing has run yet and `args` are as they were.
            with torch.compiler.set_stance("force_eager"):
                return block(args)

        return run

    def _patches_as_it_runs(self, module: nn.Module) -> bool:
        """Whether ComfyUI puts a LoRA on layers of a block in each call, because they are not on the device. What it
        does that with is another in each layer and would make another graph of each block."""
        patches = any(
            getattr(layer, name, None) for layer in module.modules() for name in ("weight_function", "bias_function")
        )
        if patches and not self.patched:
            self.patched = True
            logger.warning("Skein compile: %s", PATCHED)
            self.say(PATCHED)
        return patches

    def _run_compiled(self, key: BlockKey, args: dict, block: Block) -> dict:
        started, graphs = time.perf_counter(), _graphs()
        out = block(self._stable(args))
        if _graphs() > graphs:
            logger.info("Skein compile: %s %d in %.1f s", *key, time.perf_counter() - started)
        return out

    def _stable(self, args: dict) -> dict:
        """Arguments that keep graphs valid: only the options that a block uses, rotary factors for the attention to
        apply, sizes that depend on the text marked as variable."""
        if self.config.dynamic == "auto":
            text = "txt" if "txt" in args else "img"
            torch._dynamo.maybe_mark_dynamic(args[text], 1)
            if args["pe"] is not None:
                torch._dynamo.maybe_mark_dynamic(args["pe"], 2)
        # block_index: one number for all, or each block would be compiled for its own.
        needed = {OVERRIDE: override, "block_index": 0, ROPE_KEY: args["pe"]}
        return {**args, "pe": None, "transformer_options": needed}

    def _handle(self, error: Exception, key: BlockKey, module: nn.Module) -> None:
        """Note a failure of the compiler; anything else is raised again."""
        root = root_of(error)
        if isinstance(root, Exception) and is_out_of_memory(root):
            raise root from error
        if not is_compilers(error):
            raise error
        self.give_up(f"{key[0]} {key[1]}", error, module)

    def give_up(self, block: str, error: Exception, module: nn.Module) -> None:
        """Compile nothing more in this run, and say why."""
        self.failed = True
        why = reason(error, module)
        logger.warning("Skein compile: %s failed, this run goes on uncompiled (%s)", block, why)
        logger.debug("Skein compile: the compiler said", exc_info=error)
        self.say(f"uncompiled: {block} could not be compiled ({why})")


def _graphs() -> int:
    """How many graphs this process has compiled."""
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"]
