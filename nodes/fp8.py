"""The FP8 nodes: for the model, and for its text encoder."""

import logging

from comfy_api.latest import io

from .. import engine
from ..plan import FP8_MODES, FP8Config
from ..quantization import quantized_text_encoder
from ..report import show

logger = logging.getLogger("skein")

DEFAULTS = FP8Config()


class FP8QuantizeNode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SkeinFP8Quantize",
            display_name="FP8 Quantize (Skein)",
            category="Skein",
            description=(
                "Holds the blocks' linear layers in FP8: half the memory, and on GPUs from Ada and Hopper on faster "
                "matrix products. LoRAs are merged first, before or after this node. The first run quantizes."
            ),
            inputs=[
                io.Model.Input("model", tooltip="A HunyuanVideo model in bf16 or fp16."),
                io.Combo.Input(
                    "mode",
                    options=list(FP8_MODES),
                    default=DEFAULTS.mode,
                    tooltip=(
                        "per_tensor, per_row: FP8 products with one scale a tensor or a row. weight_only: FP8 storage, "
                        "products as before."
                    ),
                ),
                io.Boolean.Input(
                    "modulation",
                    default=DEFAULTS.modulation,
                    tooltip="Store the modulation layers in FP8 too: 3.4 GB less on HunyuanVideo.",
                    advanced=True,
                ),
            ],
            outputs=[io.Model.Output()],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, model, mode: str, modulation: bool) -> io.NodeOutput:
        config = FP8Config(mode, modulation, cls.hidden.unique_id)
        return io.NodeOutput(engine.edit(engine.whole(model), fp8=config))


class FP8TextEncoderNode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SkeinFP8TextEncoder",
            display_name="FP8 Text Encoder (Skein)",
            category="Skein",
            description="Holds a text encoder's linear layers in FP8: half the memory. Its arithmetic stays as it was.",
            inputs=[io.Clip.Input("clip", tooltip="A text encoder in bf16 or fp16.")],
            outputs=[io.Clip.Output()],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, clip) -> io.NodeOutput:
        result, sentence = quantized_text_encoder(clip)
        logger.info("Skein %s", sentence)
        show(cls.hidden.unique_id, sentence)
        return io.NodeOutput(result)
