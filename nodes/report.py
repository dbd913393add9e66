"""The Cache Report node: a run under the First-Block Cache as a picture and as numbers."""

import json

import numpy as np
import torch
from comfy_api.latest import io

from .. import engine
from ..picture import draw_run
from ..report import recent_runs
from ..runs import Run


class CacheReportNode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SkeinCacheReport",
            display_name="Cache Report (Skein)",
            category="Skein",
            search_aliases=["cache curve", "cache statistics", "residual plot", "speedup"],
            description=(
                "The last run of a model's First-Block Cache as a picture (the change of each model call, the "
                "threshold, what was reused) and as JSON. The latent makes it wait for the sampler."
            ),
            inputs=[
                io.Model.Input("model", tooltip="The model that was sampled, with First-Block Cache on it."),
                io.Latent.Input("latent", tooltip="What the sampler made of it; only waited for."),
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
        run = last_run(model)
        pixels = np.asarray(draw_run(run, width, height), dtype=np.float32) / 255
        return io.NodeOutput(torch.from_numpy(pixels).unsqueeze(0), json.dumps(run.as_dict(), indent=2))


def last_run(model) -> Run:
    """The last run of the First-Block Cache on this model. Raises ValueError if there is none."""
    cache = engine.plan_of(model).cache
    if cache is None or cache.threshold == 0:
        raise ValueError(
            "There is no First-Block Cache on this model, or its threshold is 0; connect the model that comes out of "
            "the cache's node."
        )
    for run in reversed(recent_runs()):
        if run.node_id == cache.node_id and run.calls:
            return run
    raise ValueError("This model's First-Block Cache has not run yet; connect the latent of the sampler that uses it.")
