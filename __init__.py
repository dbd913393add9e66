"""Skein: fast HunyuanVideo for ComfyUI."""

import comfy.model_management
from comfy_api.latest import ComfyExtension, io

from . import demo, processes, routes
from .nodes.attention import AttentionNode
from .nodes.cache import FirstBlockCacheNode
from .nodes.checkpoints import DiffusersTransformerNode
from .nodes.compile import CompileNode
from .nodes.demo import DemoModelNode, DemoPromptNode
from .nodes.fp8 import FP8QuantizeNode, FP8TextEncoderNode
from .nodes.parallel import ContextParallelNode, ReleaseWorkersNode
from .nodes.preview import LatentVideoPreviewNode
from .nodes.report import CacheReportNode
from .nodes.sparse import SparseAttentionNode
from .nodes.speed_up import SpeedUpNode
from .nodes.vae import VAEDecodeNode
from .workers import in_use, release

WEB_DIRECTORY = "./web"


class SkeinExtension(ComfyExtension):
    async def on_load(self) -> None:
        demo.accept_old_prompts()
        routes.register(release, in_use)
        processes.own.device = str(comfy.model_management.get_torch_device())

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [
            SpeedUpNode,
            FirstBlockCacheNode,
            AttentionNode,
            SparseAttentionNode,
            FP8QuantizeNode,
            FP8TextEncoderNode,
            CompileNode,
            ContextParallelNode,
            ReleaseWorkersNode,
            VAEDecodeNode,
            DiffusersTransformerNode,
            DemoModelNode,
            DemoPromptNode,
            LatentVideoPreviewNode,
            CacheReportNode,
        ]


async def comfy_entrypoint() -> SkeinExtension:
    return SkeinExtension()
