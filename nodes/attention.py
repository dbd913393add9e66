"""The attention node."""

from comfy_api.latest import io

from .. import engine
from ..models import KNOWN_MODELS
from ..plan import KERNELS, AttentionConfig

DEFAULTS = AttentionConfig()


class AttentionNode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SkeinAttention",
            display_name="Attention, Flash/Sage (Skein)",
            category="Skein",
            search_aliases=["flash attention", "sage attention", "cudnn", "attention kernel", "faster", "speed up"],
            description=(
                "Computes attention with the fastest exact kernel that this GPU has. It also cuts the padding from the "
                "text, so that no attention mask is needed. The node shows which kernel runs and why."
            ),
            inputs=[
                io.Model.Input("model", tooltip=KNOWN_MODELS + "."),
                io.Combo.Input(
                    "kernel",
                    options=list(KERNELS),
                    default=DEFAULTS.kernel,
                    optional=True,
                    tooltip="auto measures the kernels that can run and takes the fastest. stock is ComfyUI's own "
                    "attention.",
                ),
                io.Boolean.Input(
                    "trim_text",
                    default=DEFAULTS.trim_text,
                    optional=True,
                    tooltip=(
                        "Cut the padding from the text tokens, so that no attention mask is needed. Fast kernels "
                        "cannot run with a mask."
                    ),
                ),
                io.Boolean.Input(
                    "allow_8bit",
                    default=DEFAULTS.allow_8bit,
                    optional=True,
                    tooltip="auto may also take kernels that compute in 8 bits: faster, but no longer exact.",
                ),
                io.Int.Input(
                    "exact_steps",
                    default=DEFAULTS.exact_steps,
                    optional=True,
                    min=0,
                    max=1000,
                    tooltip="With allow_8bit: this many steps at the start and at the end are computed exactly.",
                    advanced=True,
                ),
            ],
            outputs=[io.Model.Output()],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, model, **settings) -> io.NodeOutput:
        return io.NodeOutput(engine.edit(model, attention=AttentionConfig(**settings, node_id=cls.hidden.unique_id)))
