"""The VAE decode node."""

from comfy_api.latest import io

from ..plan import DECODE_MODES, DecodeConfig
from ..vae.decode import check, decode
from .inputs import check_devices_here, devices_input

DEFAULTS = DecodeConfig()


def _size(name: str, least: int, step: int, tooltip: str) -> io.Int.Input:
    """A size as ComfyUI's VAE Decode (Tiled) has it."""
    limits = dict(default=getattr(DEFAULTS, name), min=least, max=4096, step=step)
    return io.Int.Input(name, **limits, tooltip=tooltip, optional=True, advanced=True)


class VAEDecodeNode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SkeinVAEDecodeParallel",
            display_name="VAE Decode, Parallel (Skein)",
            category="Skein",
            search_aliases=["decode", "decode latent", "multi GPU", "tiled VAE", "latent to image"],
            description=(
                "Decodes a latent on all GPUs at once: each decodes a strip of the frame, to the same pixels as one "
                "GPU. On one GPU it is VAE Decode with a progress bar and an interrupt, faster for HunyuanVideo, "
                "and in less memory where that is short."
            ),
            inputs=[
                io.Latent.Input("samples", tooltip="The latent to decode.", lazy=True),  # see check_lazy_status
                io.Vae.Input(
                    "vae", tooltip="Of HunyuanVideo, HunyuanVideo 1.5 or Wan. With other video VAEs GPUs share tiles."
                ),
                io.Combo.Input(
                    "mode",
                    options=list(DECODE_MODES),
                    default=DEFAULTS.mode,
                    optional=True,
                    tooltip=(
                        "whole: the same pixels as VAE Decode, in slices if memory is short. tiled: less memory. "
                        "auto: whole if it fits."
                    ),
                ),
                devices_input(DEFAULTS.devices),
                _size("tile_size", 64, 32, "Side of a tile, in pixels."),
                _size("overlap", 0, 32, "Pixels that neighbouring tiles share."),
                _size("temporal_size", 8, 4, "Frames in a tile."),
                _size("temporal_overlap", 4, 4, "Frames that neighbouring tiles share."),
            ],
            outputs=[io.Image.Output()],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, devices: str | None = None) -> bool | str:
        """When the prompt is queued: whether the devices are there. None: they come by a link."""
        return check_devices_here(devices)

    @classmethod
    def check_lazy_status(cls, vae, samples: dict | None = None, **settings) -> list[str]:
        """ComfyUI asks which lazy inputs to compute once it has the others: what the VAE alone tells is refused here,
        before the sampling."""
        check(vae, DecodeConfig(**settings, node_id=None))
        return ["samples"]

    @classmethod
    def execute(cls, samples: dict, vae, **settings) -> io.NodeOutput:
        frames = decode(vae, samples["samples"], DecodeConfig(**settings, node_id=cls.hidden.unique_id))
        return io.NodeOutput(frames.flatten(0, 1) if frames.ndim == 5 else frames)
