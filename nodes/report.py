"""The Cache Report node: a run under the First-Block Cache as a picture and as numbers."""

import json

import numpy as np
import torch
from comfy_api.latest import io

from .. import engine
from ..picture import HEIGHT, WIDTH, draw_run
from ..report import run_of


def _side(name: str, default: int, limits: tuple[int, int]) -> io.Int.Input:
    tooltip = "Of the picture, in pixels."
    return io.Int.Input(
        name, default=default, min=limits[0], max=limits[1], step=8, tooltip=tooltip, optional=True, advanced=True
    )


class CacheReportNode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SkeinCacheReport",
            display_name="Cache Report (Skein)",
            category="Skein",
            search_aliases=["cache curve", "cache statistics", "residual plot", "speedup"],
            description=(
                "A run of a model's First-Block Cache as a picture (the change of each model call, the threshold, what "
                "was reused) and as JSON: the run that made the latent."
            ),
            inputs=[
                io.Model.Input("model", tooltip="The model that was sampled, with First-Block Cache on it."),
                io.Latent.Input("latent", tooltip="The sampler's own latent; tells which run is shown."),
                _side("width", 960, WIDTH),
                _side("height", 480, HEIGHT),
            ],
            outputs=[
                io.Image.Output("picture", tooltip="One RGB image."),
                io.String.Output("numbers", tooltip="JSON: every model call, and the sums of the run."),
            ],
        )

    @classmethod
    def execute(cls, model, latent: dict, width: int = 960, height: int = 480) -> io.NodeOutput:
        run = run_of(latent["samples"], engine.plan_of(model).cache)
        pixels = np.asarray(draw_run(run, width, height), dtype=np.float32) / 255
        return io.NodeOutput(torch.from_numpy(pixels).unsqueeze(0), json.dumps(run.as_dict(), indent=2))
