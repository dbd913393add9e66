"""Checkpoints that demo/train.py has made: the embedded one, and others that what is chosen on it is judged by."""

from pathlib import Path

import comfy.model_management
import comfy.sd
import comfy.supported_models
import torch
from comfy.model_patcher import ModelPatcher
from safetensors.torch import load_file
from skein.demo import MODEL_FOLDER, MODEL_NAME
from skein.demo.networks import Wan

EMBEDDED = MODEL_FOLDER / MODEL_NAME


def load_trained_model(path: Path = EMBEDDED) -> ModelPatcher:
    """HunyuanVideo by ComfyUI's loader; Wan by the configuration that it was trained with, as ComfyUI takes the width
    of its text for that of the released models."""
    state = load_file(path)
    if "head.modulation" not in state:
        return comfy.sd.load_diffusion_model(str(path))
    width = state["head.modulation"].shape[-1]
    config = Wan(width, layers=1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))).config
    device = comfy.model_management.get_torch_device()
    kind = comfy.supported_models.WAN21_T2V(dict(config))
    kind.set_inference_dtype(torch.float32 if device.type == "cpu" else torch.bfloat16, None)
    model = kind.get_model({}, "", device="cpu")
    model.diffusion_model.load_state_dict(state)
    return ModelPatcher(model, load_device=device, offload_device=torch.device("cpu"))
