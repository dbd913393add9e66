"""The Cache Report node: a run under the First-Block Cache or under sparse attention as a picture and as numbers."""

import json

import numpy as np
import torch
from comfy_api.latest import io

from .. import engine
from ..map_picture import draw_map
from ..picture import HEIGHT, WIDTH, draw_run
from ..report import runs_of


def _side(name: str, default: int, limits: tuple[int, int]) -> io.Int.Input:
    tooltip = f"The picture's {name} in pixels."
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
            search_aliases=["cache curve", "cache statistics", "residual plot", "sparse attention map"],
            description=(
                "Draws the run that made a latent, and gives its numbers as JSON. With First-Block Cache the picture "
                "shows the change of each model call, the threshold and what was reused. With Sparse Attention alone "
                "it shows how much attention each head of each layer computed."
            ),
            inputs=[
                io.Model.Input(
                    "model", tooltip="The model that was sampled, with First-Block Cache or Sparse Attention on it."
                ),
                io.Latent.Input("latent", tooltip="The sampler's own latent. It tells which run is shown."),
                _side("width", 960, WIDTH),
                _side("height", 480, HEIGHT),
            ],
            outputs=[
                io.Image.Output("picture", tooltip="One RGB image."),
                io.String.Output(
                    "numbers",
                    tooltip="JSON: each model call and the run's sums; with Sparse Attention also sparse_attention.",
                ),
            ],
        )

    @classmethod
    def execute(cls, model, latent: dict, width: int = 960, height: int = 480) -> io.NodeOutput:
        plan = engine.wanted_of(model)
        run, sparse = runs_of(latent["samples"], plan)
        if run is not None:
            picture = draw_run(run, width, height)
        else:
            assert sparse is not None  # else runs_of() has raised
            picture = draw_map(sparse, width, height)
        numbers = {} if run is None else run.as_dict()
        if "sparse" in plan.techniques:
            numbers["sparse_attention"] = None if sparse is None else sparse.as_dict()
        pixels = np.asarray(picture, dtype=np.float32) / 255
        return io.NodeOutput(torch.from_numpy(pixels).unsqueeze(0), json.dumps(numbers, indent=2))
