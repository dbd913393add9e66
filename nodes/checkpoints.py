"""Load Diffusers Transformer: a model in diffusers' format, in shards or not, which ComfyUI's loader cannot read."""

from comfy_api.latest import io

from ..checkpoints.folder import find
from ..checkpoints.listing import names, path_of
from ..checkpoints.loading import WEIGHT_TYPES, load_diffusers


class DiffusersTransformerNode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SkeinLoadDiffusersTransformer",
            display_name="Load Diffusers Transformer (Skein)",
            category="Skein",
            search_aliases=["diffusers", "load diffusers model", "huggingface", "shards", "safetensors index", "unet"],
            description="Loads a diffusion transformer from a folder in diffusers' format, in one file or in shards: "
            "HunyuanVideo, and others that Load Diffusion Model cannot read.",
            inputs=[
                io.Combo.Input(
                    "model_name",
                    options=names(),
                    tooltip="A folder in models/diffusers or models/diffusion_models: a pipeline, its transformer "
                    "alone, or a repository of the Hugging Face cache.",
                ),
                io.Combo.Input(
                    "weight_dtype",
                    options=list(WEIGHT_TYPES),
                    default="default",
                    optional=True,
                    advanced=True,
                    tooltip="The type that weights are stored in, as in Load Diffusion Model.",
                ),
            ],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def fingerprint_inputs(cls, model_name: str, weight_dtype: str = "default") -> list[tuple]:
        """Another one where a file of the folder is another, or has been written to."""
        try:
            stats = [(str(file), file.stat()) for file in find(path_of(model_name)).files]
        except (ValueError, OSError) as error:
            return [(str(error),)]
        return [(path, stat.st_size, stat.st_mtime_ns) for path, stat in stats]

    @classmethod
    def execute(cls, model_name: str, weight_dtype: str = "default") -> io.NodeOutput:
        return io.NodeOutput(load_diffusers(str(path_of(model_name)), dict(WEIGHT_TYPES[weight_dtype])))
