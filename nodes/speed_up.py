"""The Speed Up node: one preset instead of a node for each technique."""

from comfy_api.latest import io

from .. import engine
from ..models import KNOWN_MODELS
from ..plan import PRESETS, PresetConfig
from .inputs import check_devices_here, devices_input

DEFAULTS = PresetConfig()


class SpeedUpNode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SkeinSpeedUp",
            display_name="Speed Up (Skein)",
            category="Skein",
            search_aliases=[
                "faster",
                "speed up",
                "accelerate",
                "hunyuan",
                "hunyuan video",
                "wan",
                "flux",
                "low vram",
                "vram",
                "oom",
                "multi gpu",
            ],
            description=(
                "Makes sampling faster with one node: it chooses among Skein's techniques what this model, this size "
                "and this machine can use, and shows what it has chosen and how long the run will take. Other Skein "
                "nodes on the same model, before or after it, override its choice."
            ),
            inputs=[
                io.Model.Input("model", tooltip=KNOWN_MODELS + "."),
                io.Combo.Input(
                    "preset",
                    options=list(PRESETS),
                    default=DEFAULTS.preset,
                    optional=True,
                    tooltip=(
                        "balanced: differences are hard to see. exact: the same result, up to rounding. fastest: small "
                        "details change. low memory: the model takes half of the memory."
                    ),
                ),
                devices_input(DEFAULTS.devices, advanced=True),
            ],
            outputs=[io.Model.Output()],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, devices: str | None = None) -> bool | str:
        """When the prompt is queued: whether the devices are there. None: they come by a link."""
        return check_devices_here(devices)

    @classmethod
    def execute(cls, model, **settings) -> io.NodeOutput:
        return io.NodeOutput(engine.edit(model, preset=PresetConfig(**settings, node_id=cls.hidden.unique_id)))
