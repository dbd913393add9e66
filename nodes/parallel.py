"""The context parallel nodes: the workers of a model, and their release."""

from comfy_api.latest import io

from .. import engine
from ..models import KNOWN_MODELS
from ..plan import ParallelConfig
from ..workers import release
from .inputs import devices_input

DEFAULTS = ParallelConfig()


class ContextParallelNode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SkeinContextParallel",
            display_name="Context Parallel (Skein)",
            category="Skein",
            search_aliases=["multi GPU", "multigpu", "ulysses", "ring attention", "xDiT", "Raylight", "distributed"],
            description=(
                "Samples on several GPUs at once: one worker process for each GPU computes a part of the video. Works "
                "with every sampler, with previews and interrupts; connect it between the loader and the sampler."
            ),
            inputs=[
                io.Model.Input("model", tooltip=f"{KNOWN_MODELS}, from Load Diffusion Model or Load Checkpoint."),
                devices_input(DEFAULTS.devices),
                io.Int.Input(
                    "ulysses_degree",
                    default=DEFAULTS.ulysses_degree,
                    optional=True,
                    min=0,
                    max=64,
                    tooltip="How many devices exchange attention heads; fastest over NVLink. 0: automatic.",
                    advanced=True,
                ),
                io.Int.Input(
                    "ring_degree",
                    default=DEFAULTS.ring_degree,
                    optional=True,
                    min=0,
                    max=64,
                    tooltip="How many groups of them pass keys and values on in a ring; for slow links. 0: automatic.",
                    advanced=True,
                ),
                io.Boolean.Input(
                    "keep_warm",
                    default=DEFAULTS.keep_warm,
                    optional=True,
                    tooltip="The workers stay for the next run, with the model in memory.",
                ),
            ],
            outputs=[io.Model.Output()],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, model, **settings) -> io.NodeOutput:
        return io.NodeOutput(engine.edit(model, parallel=ParallelConfig(**settings, node_id=cls.hidden.unique_id)))


class ReleaseWorkersNode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SkeinReleaseWorkers",
            display_name="Release Workers (Skein)",
            category="Skein",
            search_aliases=["free GPUs", "unload workers", "multi GPU"],
            description=(
                "Ends the worker processes of Context Parallel when the latent arrives, so that their GPU memory is "
                "free for what comes after. Edit > Unload Models in ComfyUI's menu does it too (not with "
                "--disable-smart-memory)."
            ),
            inputs=[io.Latent.Input("latent", tooltip="The sampled latent. It is passed on unchanged.")],
            outputs=[io.Latent.Output()],
        )

    @classmethod
    def execute(cls, latent) -> io.NodeOutput:
        release()
        return io.NodeOutput(latent)
