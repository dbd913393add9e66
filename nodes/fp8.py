"""The FP8 nodes: for the model, and for its text encoder."""

from comfy_api.latest import io

from .. import engine
from ..models import KNOWN_MODELS
from ..plan import FP8_MODES, FP8Config
from ..quantization import quantize_text_encoder

DEFAULTS = FP8Config()


class FP8QuantizeNode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SkeinFP8Quantize",
            display_name="FP8 Quantize (Skein)",
            category="Skein",
            search_aliases=["quantize", "8-bit", "float8", "torchao", "low VRAM", "VRAM", "OOM", "out of memory"],
            description=(
                "Stores the weights of the model's blocks in 8-bit floating point: about half the memory. Newer NVIDIA "
                "GPUs also compute with them in 8 bits. LoRA is merged before the weights are quantized, wherever its "
                "node stands. Works with every sampler; connect it between the loader and the sampler."
            ),
            inputs=[
                io.Model.Input("model", tooltip=f"{KNOWN_MODELS}, in 16 bits; one in scaled FP8 is left as it is."),
                io.Combo.Input(
                    "mode",
                    options=list(FP8_MODES),
                    default=DEFAULTS.mode,
                    optional=True,
                    tooltip=(
                        "per_row: one scale for each row and token, closer to the original. per_tensor: one scale for "
                        "a whole weight. weight_only: 8-bit storage, 16-bit computation, not faster."
                    ),
                ),
                io.Boolean.Input(
                    "modulation",
                    default=DEFAULTS.modulation,
                    optional=True,
                    tooltip=(
                        "Also store the layers that process the timestep in FP8: a quarter of HunyuanVideo's weights."
                    ),
                    advanced=True,
                ),
            ],
            outputs=[io.Model.Output()],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, model, **settings) -> io.NodeOutput:
        return io.NodeOutput(engine.edit(model, fp8=FP8Config(**settings, node_id=cls.hidden.unique_id)))


class FP8TextEncoderNode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SkeinFP8TextEncoder",
            display_name="FP8 Text Encoder (Skein)",
            category="Skein",
            search_aliases=["quantize CLIP", "8-bit text encoder", "float8", "low VRAM", "VRAM", "OOM"],
            description=(
                "Stores the text encoder's weights in 8-bit floating point: about half the memory. It is not faster. "
                "Connect it between the loader and the text encode nodes."
            ),
            inputs=[io.Clip.Input("clip", tooltip="Any text encoder.")],
            outputs=[io.Clip.Output()],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, clip) -> io.NodeOutput:
        return io.NodeOutput(quantize_text_encoder(clip, cls.hidden.unique_id))
