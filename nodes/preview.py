"""The Latent Video Preview node: a look at a video latent without its VAE."""

from comfy_api.latest import io

from ..preview import SCALE, latent_to_frames


class LatentVideoPreviewNode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SkeinLatentVideoPreview",
            display_name="Latent Video Preview (Skein)",
            category="Skein",
            search_aliases=["latent2rgb", "latent to rgb", "preview without VAE"],
            description=(
                "Turns a latent video into small RGB frames without a VAE, for a quick look. One frame for each latent "
                "frame."
            ),
            inputs=[
                io.Model.Input(
                    "model", tooltip="The model that made the latent. It has the factors that turn a latent into RGB."
                ),
                io.Latent.Input("samples", tooltip="The latent to look at. Each of its frames becomes one image."),
                io.Int.Input(
                    "scale",
                    default=1,
                    min=SCALE[0],
                    max=SCALE[1],
                    optional=True,
                    tooltip=(
                        "Enlarge each latent pixel to this many pixels. 8 is the size of HunyuanVideo's decoded video "
                        "(16 for 1.5)."
                    ),
                ),
            ],
            outputs=[io.Image.Output()],
        )

    @classmethod
    def execute(cls, model, samples: dict, scale: int = 1) -> io.NodeOutput:
        return io.NodeOutput(latent_to_frames(samples["samples"], model.model.latent_format, scale))
