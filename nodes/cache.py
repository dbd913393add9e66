"""The First-Block Cache node."""

from comfy_api.latest import io

from .. import engine
from ..models import KNOWN_MODELS
from ..plan import LARGEST_SHARE, MODEL_DEFAULT, PREDICTORS, CacheConfig
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
                "Skips most of the model in the steps in which little changes, and predicts what the skipped blocks "
                "would have added. Works with every sampler; connect it between the loader and the sampler. Needs GPU "
                "memory for three hidden states (2.2 GB at 720p x 129 frames; 0.7 GB with predict_order 0)."
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
                        "Higher is faster and changes the result more. 0: the cache is off. -1: the model's default, "
                        "which the node's help lists."
                    ),
                ),
                part_of_sampling(
                    "start_percent",
                    DEFAULTS.start_percent,
                    "Calls may be reused from this share of sampling on (0 to 1).",
                ),
                part_of_sampling(
                    "end_percent", DEFAULTS.end_percent, "After this share of sampling (0 to 1) every call is computed."
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
                    tooltip="After this many reused calls in a row one is computed. -1: no limit.",
                ),
                io.Int.Input(
                    "predict_order",
                    default=DEFAULTS.order,
                    optional=True,
                    min=0,
                    max=2,
                    tooltip=(
                        "How many computed calls the prediction uses: 0 the last one, 1 the last two, 2 the last three."
                    ),
                    advanced=True,
                ),
                io.Combo.Input(
                    "predictor",
                    options=list(PREDICTORS),
                    default=DEFAULTS.predictor,
                    optional=True,
                    tooltip=(
                        "How orders 1 and 2 predict: fit matches what the first block shows now, taylor extrapolates "
                        "over sigma."
                    ),
                    advanced=True,
                ),
                io.Boolean.Input(
                    "accumulate",
                    default=DEFAULTS.accumulate,
                    optional=True,
                    tooltip=(
                        "Compare the sum of all changes since the last computed call, instead of the prediction's "
                        "error."
                    ),
                    advanced=True,
                ),
                # Last, so that the values of saved workflows keep their places.
                io.Float.Input(
                    "reuse_share",
                    default=DEFAULTS.reuse_share,
                    optional=True,
                    min=0.0,
                    max=LARGEST_SHARE,
                    step=0.05,
                    round=0.01,
                    tooltip=(
                        "The share of model calls to reuse: 0.5 reuses half of them, on every model and with every "
                        "number of steps. 0: residual_diff_threshold decides."
                    ),
                ),
            ],
            outputs=[io.Model.Output()],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, model, **settings) -> io.NodeOutput:
        named = {FIELDS.get(name, name): value for name, value in settings.items()}
        return io.NodeOutput(engine.edit(model, cache=CacheConfig(**named, node_id=cls.hidden.unique_id)))
