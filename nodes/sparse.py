"""The Sparse Attention node."""

from comfy_api.latest import io

from .. import engine
from ..models import KNOWN_MODELS
from ..plan import SPARSE_RULES, SparseConfig
from .inputs import part_of_sampling

DEFAULTS = SparseConfig()


class SparseAttentionNode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SkeinSparseAttention",
            display_name="Sparse Attention (Skein)",
            category="Skein",
            search_aliases=["sparse attention", "sol-attn", "SpargeAttn", "radial attention", "faster video", "faster"],
            description=(
                "Leaves out the parts of attention that change its result least, as many as an error that you choose "
                "allows. It measures that error in every layer while it runs, and the node shows it. For long "
                "sequences, such as 720p video; short ones stay dense."
            ),
            inputs=[
                io.Model.Input("model", tooltip=KNOWN_MODELS + "."),
                io.Float.Input(
                    "max_error",
                    default=DEFAULTS.max_error,
                    optional=True,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    round=0.0001,
                    tooltip=(
                        "The relative error of a layer's attention that you accept. Low 0.05: hardly a pixel changes; "
                        "middle 0.1; high 0.2: fastest, small details change. 0 switches sparse attention off."
                    ),
                ),
                part_of_sampling(
                    "start_percent",
                    DEFAULTS.start_percent,
                    "Part of sampling from which attention is sparse. The first steps decide the composition.",
                ),
                part_of_sampling(
                    "end_percent", DEFAULTS.end_percent, "Part of sampling after which attention is dense again."
                ),
                io.Combo.Input(
                    "rule",
                    options=list(SPARSE_RULES),
                    default=DEFAULTS.rule,
                    optional=True,
                    tooltip=(
                        "max_error computes as little as that error allows; density computes a fixed share of "
                        "attention; tau computes the blocks that score so many standard deviations above the mean."
                    ),
                    advanced=True,
                ),
                io.Float.Input(
                    "density",
                    default=DEFAULTS.density,
                    optional=True,
                    min=0.01,
                    max=1.0,
                    step=0.01,
                    tooltip="Under rule density: the share of attention that is computed in every layer.",
                    advanced=True,
                ),
                io.Float.Input(
                    "tau",
                    default=DEFAULTS.tau,
                    optional=True,
                    min=-10.0,
                    max=10.0,
                    step=0.1,
                    tooltip="Under rule tau: standard deviations. Higher is faster and further from the original.",
                    advanced=True,
                ),
                io.String.Input(
                    "dense_blocks",
                    default=DEFAULTS.dense_blocks,
                    optional=True,
                    tooltip='Numbers of the model\'s blocks that stay dense, such as "0-2, -1"; -1 is the last one.',
                    advanced=True,
                ),
                io.Int.Input(
                    "min_tokens",
                    default=DEFAULTS.min_tokens,
                    optional=True,
                    min=0,
                    max=10_000_000,
                    tooltip=(
                        "Sequences shorter than this stay dense. 0 measures on your GPU where sparse attention is "
                        "faster; with any other number it runs without asking."
                    ),
                    advanced=True,
                ),
                io.Boolean.Input(
                    "tail",
                    default=DEFAULTS.tail,
                    optional=True,
                    tooltip="What is left out still counts, as one mean for each block: a smaller error.",
                    advanced=True,
                ),
            ],
            outputs=[io.Model.Output()],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, model, **settings) -> io.NodeOutput:
        return io.NodeOutput(engine.edit(model, sparse=SparseConfig(**settings, node_id=cls.hidden.unique_id)))
