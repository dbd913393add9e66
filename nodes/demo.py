"""Load Demo Model and Demo Prompt: the embedded model, and text conditioning for it."""

import comfy.sd
from comfy_api.latest import io

from ..demo import LOADER, MODEL_FOLDER, MODEL_NAME
from ..demo.prompt import PromptEncoder, pad


class DemoModelNode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id=LOADER,
            display_name="Load Demo Model (Skein)",
            category="Skein/demo",
            search_aliases=["demo model", "skein demo"],
            description="Loads the embedded demo model, a trained miniature HunyuanVideo that runs on a CPU.",
            inputs=[],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        return io.NodeOutput(comfy.sd.load_diffusion_model(str(MODEL_FOLDER / MODEL_NAME)))


class DemoPromptNode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SkeinDemoPrompt",
            display_name="Demo Prompt (Skein)",
            category="Skein/demo",
            search_aliases=["demo prompt", "skein demo"],
            description="Encodes a prompt for the small demo model of this pack, which knows 24 words.",
            inputs=[
                io.String.Input(
                    "text",
                    multiline=True,
                    default="a red circle moves left",
                    tooltip='For example "a small blue square moves up over sand". An empty prompt is allowed.',
                ),
                io.Boolean.Input(
                    "padded",
                    default=False,
                    optional=True,
                    tooltip="Pad the text to 256 tokens with an attention mask, as text encoders of other models do.",
                ),
            ],
            outputs=[io.Conditioning.Output()],
        )

    @classmethod
    def execute(cls, text: str, padded: bool = False) -> io.NodeOutput:
        tokens, pooled = PromptEncoder().encode(text)
        extra = {"pooled_output": pooled}
        if padded:
            tokens, extra["attention_mask"] = pad(tokens)
        return io.NodeOutput([[tokens, extra]])
