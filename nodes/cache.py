"""The First-Block Cache node."""

from comfy_api.latest import io

from .. import engine
from ..models import KNOWN_MODELS
from ..plan import MODEL_DEFAULT, PREDICTORS, CacheConfig
from .inputs import part_of_sampling

DEFAULTS = CacheConfig()
# Inputs that have another name in CacheConfig.
FIELDS = {"residual_diff_threshold": "threshold", "warmup_steps": "warmup_calls", "predict_order": "order"}


class FirstBlockCacheNode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SkeinFirstBlockCache",
            display_name="First-Block Cache (Skein)",
            category="Skein",
            search_aliases=[
                *("first block cache", "FBCache", "TeaCache", "WaveSpeed", "faster", "speed up"),
                *("HunyuanVideo", "Hunyuan Video", "Wan", "FLUX"),
            ],
            description=(
                "Skips most of the model in steps where its first block barely changes, and adds what the skipped "
                "blocks did in earlier steps instead. Works with every sampler; connect it between the loader and the "
                "sampler. Needs memory for three hidden states (2.2 GB at 720p x 129 frames; one with predict_order 0)."
            ),
            inputs=[
                io.Model.Input("model", tooltip=KNOWN_MODELS + "."),
                io.Float.Input(
                    "residual_diff_threshold",
                    default=DEFAULTS.threshold,
                    optional=True,
                    min=MODEL_DEFAULT,
                    max=1.0,
                    step=0.005,
                    round=0.0001,
                    tooltip=(
                        "Higher is faster and further from the original. 0 switches the cache off; -1 takes the "
                        "model's default, which the node's help lists."
                    ),
                ),
                part_of_sampling(
                    "start_percent", DEFAULTS.start_percent, "Part of sampling from which steps may be reused."
                ),
                part_of_sampling(
                    "end_percent", DEFAULTS.end_percent, "Part of sampling after which every step is computed."
                ),
                io.Int.Input(
                    "warmup_steps",
                    default=DEFAULTS.warmup_calls,
                    optional=True,
                    min=0,
                    max=1000,
                    tooltip="Model calls at the start that are always computed.",
                ),
                io.Int.Input(
                    "max_consecutive_hits",
                    default=DEFAULTS.max_consecutive_hits,
                    optional=True,
                    min=-1,
                    max=1000,
                    tooltip="Compute again after this many reused calls in a row; -1 for no limit.",
                ),
                io.Int.Input(
                    "predict_order",
                    default=DEFAULTS.order,
                    optional=True,
                    min=0,
                    max=2,
                    tooltip="0 reuses the last computed call; 1 and 2 extrapolate from the last two or three.",
                    advanced=True,
                ),
                io.Combo.Input(
                    "predictor",
                    options=list(PREDICTORS),
                    default=DEFAULTS.predictor,
                    optional=True,
                    tooltip="How orders 1 and 2 extrapolate: fit to what the first block shows, or taylor over sigma.",
                    advanced=True,
                ),
                io.Boolean.Input(
                    "accumulate",
                    default=DEFAULTS.accumulate,
                    optional=True,
                    tooltip="Compare the change summed since the last computed call, not the prediction's error.",
                    advanced=True,
                ),
            ],
            outputs=[io.Model.Output()],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, model, **settings) -> io.NodeOutput:
        named = {FIELDS.get(name, name): value for name, value in settings.items()}
        return io.NodeOutput(engine.edit(model, cache=CacheConfig(**named, node_id=cls.hidden.unique_id)))
