"""The First-Block Cache node."""

from comfy_api.latest import io

from .. import engine
from ..plan import CacheConfig

DEFAULTS = CacheConfig()


class FirstBlockCacheNode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SkeinFirstBlockCache",
            display_name="First-Block Cache (Skein)",
            category="Skein",
            description=(
                "Skips most of the model in steps where its first block barely changes, and adds what the skipped "
                "blocks did in earlier steps instead. Works with every sampler; connect it between the loader and the "
                "sampler. Needs memory for two hidden states (1.5 GB at 720p x 129 frames)."
            ),
            inputs=[
                io.Model.Input("model", tooltip="A HunyuanVideo model."),
                io.Float.Input(
                    "residual_diff_threshold",
                    default=DEFAULTS.threshold,
                    min=0.0,
                    max=1.0,
                    step=0.005,
                    round=0.0001,
                    tooltip="Higher is faster and further from the original. 0 switches the cache off.",
                ),
                io.Float.Input(
                    "start_percent",
                    default=DEFAULTS.start_percent,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Part of sampling from which steps may be reused.",
                ),
                io.Float.Input(
                    "end_percent",
                    default=DEFAULTS.end_percent,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Part of sampling after which every step is computed.",
                ),
                io.Int.Input(
                    "warmup_steps",
                    default=DEFAULTS.warmup_calls,
                    min=0,
                    max=1000,
                    tooltip="Model calls at the start that are always computed.",
                ),
                io.Int.Input(
                    "max_consecutive_hits",
                    default=DEFAULTS.max_consecutive_hits,
                    min=-1,
                    max=1000,
                    tooltip="Compute again after this many reused calls in a row; -1 for no limit.",
                ),
            ],
            outputs=[io.Model.Output()],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls, model, residual_diff_threshold, start_percent, end_percent, warmup_steps, max_consecutive_hits, **advanced
    ) -> io.NodeOutput:
        config = CacheConfig(
            threshold=residual_diff_threshold,
            start_percent=start_percent,
            end_percent=end_percent,
            warmup_calls=warmup_steps,
            max_consecutive_hits=max_consecutive_hits,
            node_id=cls.hidden.unique_id,
            **advanced,
        )
        return io.NodeOutput(engine.edit(model, cache=config))
