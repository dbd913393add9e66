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
                "Holds the blocks' weights in 8-bit floating point, about half the memory, and multiplies in it, with "
                "scales that follow the activations. LoRA is merged before the weights are quantized, wherever its "
                "node stands. Works with every sampler; connect it between the loader and the sampler."
            ),
            inputs=[
                io.Model.Input("model", tooltip=f"{KNOWN_MODELS}, in 16 bits; one in scaled FP8 is left as it is."),
                io.Combo.Input(
                    "mode",
                    options=list(FP8_MODES),
                    default=DEFAULTS.mode,
                    optional=True,
                    tooltip="One scale per tensor or per row (token), or 8-bit storage with exact arithmetic.",
                ),
                io.Boolean.Input(
                    "modulation",
                    default=DEFAULTS.modulation,
                    optional=True,
                    tooltip="Store the modulation layers in FP8 too: a quarter of HunyuanVideo's weights.",
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
                "Holds the text encoder's Linear weights in 8-bit floating point, about half the memory; it computes "
                "as before. Connect it between the loader and the text encode nodes."
            ),
            inputs=[io.Clip.Input("clip", tooltip="Any text encoder.")],
            outputs=[io.Clip.Output()],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, clip) -> io.NodeOutput:
        return io.NodeOutput(quantize_text_encoder(clip, cls.hidden.unique_id))
