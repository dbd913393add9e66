"""LoRAs put on as ComfyUI's LoRA nodes do."""

import comfy.lora
import comfy.utils
import torch


def with_lora(model, strength, keys, seed=0, scale=1 / 8, bias=False):
    """A clone of a ModelPatcher or CLIP with a random LoRA of rank 4 on the layers `keys`; scale: of its factors."""
    network = model.model if hasattr(model, "model") else model.cond_stage_model
    generator = torch.Generator().manual_seed(seed)
    file = {}
    for key in keys:
        rows, columns = comfy.utils.get_attr(network, f"{key}.weight").shape
        file[f"{key}.lora_up.weight"] = scale * torch.randn(rows, 4, generator=generator)
        file[f"{key}.lora_down.weight"] = scale * torch.randn(4, columns, generator=generator)
        if bias:
            file[f"{key}.diff_b"] = scale * torch.randn(rows, generator=generator)
    patches = comfy.lora.load_lora(file, {key: f"{key}.weight" for key in keys})
    clone = model.clone()
    assert len(clone.add_patches(patches, strength)) == len(keys) * (2 if bias else 1)
    return clone
