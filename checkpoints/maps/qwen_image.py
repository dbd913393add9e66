"""Qwen-Image. Its weights have diffusers' keys in ComfyUI too; a config says more than they do."""

from collections.abc import Mapping
from typing import Any


def settings(config: Mapping[str, Any], _pipeline: str) -> dict[str, Any]:
    """See SETTINGS. Edit 2511 sees its reference images at timestep 0."""
    return {"default_ref_method": "index_timestep_zero"} if config.get("zero_cond_t") else {}
