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
                "Skips the parts of attention that change its result least. You set how large the error may be; the "
                "node measures it in every layer while it runs, and shows it. For long sequences, such as 720p "
                "video; short ones are computed in full (dense)."
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
                        "The relative error of a layer's attention that you accept. 0.05: hardly a pixel changes. 0.1: "
                        "the default. 0.2: fastest, small details change. 0: off."
                    ),
                ),
                part_of_sampling(
                    "start_percent",
                    DEFAULTS.start_percent,
                    "Attention is sparse from this share of sampling on (0 to 1). The first steps decide the "
                    "composition.",
                ),
                part_of_sampling(
                    "end_percent",
                    DEFAULTS.end_percent,
                    "After this share of sampling (0 to 1) attention is dense again.",
                ),
                io.Combo.Input(
                    "rule",
                    options=list(SPARSE_RULES),
                    default=DEFAULTS.rule,
                    optional=True,
                    tooltip=(
                        "max_error: skip as much as that error allows. density: compute a fixed share in every layer. "
                        "tau: compute the parts that score this many standard deviations above the mean."
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
                    tooltip="With rule density: the share of attention that is computed in every layer.",
                    advanced=True,
                ),
                io.Float.Input(
                    "tau",
                    default=DEFAULTS.tau,
                    optional=True,
                    min=-10.0,
                    max=10.0,
                    step=0.1,
                    tooltip="With rule tau: standard deviations. Higher is faster and changes the result more.",
                    advanced=True,
                ),
                io.String.Input(
                    "dense_blocks",
                    default=DEFAULTS.dense_blocks,
                    optional=True,
                    tooltip='Numbers of the model\'s blocks that stay dense, such as "0-2, -1". -1 is the last block.',
                    advanced=True,
                ),
                io.Int.Input(
                    "min_tokens",
                    default=DEFAULTS.min_tokens,
                    optional=True,
                    min=0,
                    max=10_000_000,
                    tooltip=(
                        "Sequences with fewer tokens stay dense. 0: the node measures whether sparse attention is "
                        "faster on your GPU. Any other number is used without measuring."
                    ),
                    advanced=True,
                ),
                io.Boolean.Input(
                    "tail",
                    default=DEFAULTS.tail,
                    optional=True,
                    tooltip="Each skipped part still counts with its mean: a smaller error.",
                    advanced=True,
                ),
            ],
            outputs=[io.Model.Output()],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, model, **settings) -> io.NodeOutput:
        return io.NodeOutput(engine.edit(model, sparse=SparseConfig(**settings, node_id=cls.hidden.unique_id)))
