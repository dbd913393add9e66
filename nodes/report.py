"""The Cache Report node: a run under the First-Block Cache as a picture and as numbers."""

import json

import numpy as np
import torch
from comfy_api.latest import io

from .. import engine
from ..picture import draw_run
from ..report import run_of


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
                io.Int.Input(
                    "width", default=960, min=256, max=4096, step=8, tooltip="Of the picture, in pixels.", advanced=True
                ),
                io.Int.Input(
                    "height",
                    default=480,
                    min=192,
                    max=4096,
                    step=8,
                    tooltip="Of the picture, in pixels.",
                    advanced=True,
                ),
            ],
            outputs=[
                io.Image.Output("picture", tooltip="One RGB image."),
                io.String.Output("numbers", tooltip="JSON: every model call, and the sums of the run."),
            ],
        )

    @classmethod
    def execute(cls, model, latent: dict, width: int, height: int) -> io.NodeOutput:
        run = run_of(latent["samples"], engine.plan_of(model).cache)
        pixels = np.asarray(draw_run(run, width, height), dtype=np.float32) / 255
        return io.NodeOutput(torch.from_numpy(pixels).unsqueeze(0), json.dumps(run.as_dict(), indent=2))
