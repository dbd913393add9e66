"""LTX-Video."""

from collections.abc import Mapping
from typing import Any

from ..keys import KeyMap, Weights, under

ATTENTION: Weights = {
    "to_q": "to_q",
    "to_k": "to_k",
    "to_v": "to_v",
    "to_out.0": "to_out.0",
    "q_norm": "norm_q",
    "k_norm": "norm_k",
}
BLOCK: Weights = {
    "scale_shift_table": "scale_shift_table",
    **under("attn1", "attn1", ATTENTION),
    **under("attn2", "attn2", ATTENTION),
    "ff.net.0.proj": "ff.net.0.proj",
    "ff.net.2": "ff.net.2",
}
TIME: Weights = {
    "emb.timestep_embedder.linear_1": "emb.timestep_embedder.linear_1",
    "emb.timestep_embedder.linear_2": "emb.timestep_embedder.linear_2",
    "linear": "linear",
}
AROUND: Weights = {
    "patchify_proj": "proj_in",
    **under("adaln_single", "time_embed", TIME),
    "caption_projection.linear_1": "caption_projection.linear_1",
    "caption_projection.linear_2": "caption_projection.linear_2",
    **under("transformer_blocks.*", "transformer_blocks.*", BLOCK),
    "scale_shift_table": "scale_shift_table",
    "proj_out": "proj_out",
}


def settings(_config: Mapping[str, Any], pipeline: str) -> dict[str, Any]:
    """See SETTINGS. From 0.9.5 on, the first latent frame is one frame; only the pipeline's class tells."""
    return {"causal_temporal_positioning": True} if pipeline == "LTXConditionPipeline" else {}


LTX_VIDEO = KeyMap(
    classes=("LTXVideoTransformer3DModel",), weights=AROUND, blocks={"num_layers": "transformer_blocks.*"}
)
