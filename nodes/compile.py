"""The compile node."""

from comfy_api.latest import io

from .. import engine
from ..models import KNOWN_MODELS
from ..plan import COMPILE_MODES, DYNAMIC_SHAPES, CompileConfig

DEFAULTS = CompileConfig()


class CompileNode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SkeinCompile",
            display_name="Compile Blocks (Skein)",
            category="Skein",
            search_aliases=["torch.compile", "torch compile", "inductor", "faster", "speed up"],
            description=(
                "Compiles each kind of transformer block once with torch.compile. The first run takes about half a "
                "minute longer; later ones, also with other prompts and LoRA strengths, do not compile again."
            ),
            inputs=[
                io.Model.Input("model", tooltip=KNOWN_MODELS + "."),
                io.Combo.Input(
                    "mode",
                    options=list(COMPILE_MODES),
                    default=DEFAULTS.mode,
                    optional=True,
                    tooltip=(
                        "default is right for almost everyone. max-autotune compiles for minutes and gains a few "
                        "percent at most. Names with no-cudagraphs switch CUDA graphs off."
                    ),
                ),
                io.Combo.Input(
                    "dynamic",
                    options=list(DYNAMIC_SHAPES),
                    default=DEFAULTS.dynamic,
                    optional=True,
                    tooltip=(
                        "auto: any length of text; the first change of size compiles once more, later ones do not. "
                        "on: any size from the start. off: compile again for every size and every length of text."
                    ),
                    advanced=True,
                ),
                io.Boolean.Input(
                    "warm_up",
                    default=DEFAULTS.warm_up,
                    optional=True,
                    tooltip="Compile before the first step and say so on the node, instead of during the step.",
                    advanced=True,
                ),
                # Workflows of version 0.1 have a fourth value, cache_folder: a new widget must not stand here.
            ],
            outputs=[io.Model.Output()],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        model,
        mode: str = DEFAULTS.mode,
        dynamic: str = DEFAULTS.dynamic,
        warm_up: bool = DEFAULTS.warm_up,
        cache_folder: object = None,
    ) -> io.NodeOutput:
        """cache_folder: ignored, of version 0.1. What compiled code is run must not be a workflow's choice."""
        config = CompileConfig(mode, dynamic, warm_up, cls.hidden.unique_id)
        return io.NodeOutput(engine.edit(model, compile=config))
