"""The FP8 text encoder on a CLIP-L with random weights, built by ComfyUI."""

import comfy.model_management
import pytest
import torch
from loras import with_lora
from skein.bench.errors import relative_error
from skein.quantization import quantize_text_encoder as fp8
from skein.quantization.linear import QuantizedLinear
from small_models import random_clip

TEXT = "a red circle moves left over sand"
LAYER = "clip_l.transformer.text_model.encoder.layers.3.mlp.fc1"


@pytest.fixture(scope="module")
def clip():
    return random_clip()


def test_it_encodes_in_less_memory_and_leaves_the_original_alone(clip):
    stock, size = clip.encode(TEXT), clip.patcher.model_size()
    quantized = fp8(clip)
    on = quantized.encode(TEXT)
    assert 0.001 < relative_error(on, stock) < 0.1  # 12 layers of random weights
    layers = [m for m in quantized.cond_stage_model.modules() if isinstance(m, QuantizedLinear)]
    wide = clip.cond_stage_model.get_submodule(LAYER).weight.element_size()
    saved = sum((wide - 1) * layer.weight.numel() - 4 * layer.out_features for layer in layers)
    assert len(layers) == 12 * 6 and quantized.patcher.model_size() == size - saved < 0.75 * size
    assert not any(isinstance(m, QuantizedLinear) for m in clip.cond_stage_model.modules())
    assert torch.equal(clip.encode(TEXT), stock)
    assert torch.equal(quantized.encode(TEXT), on)
    assert torch.equal(quantized.clone().encode(TEXT), on)


def test_lora_before_is_merged_and_lora_after_works(clip):
    lora = with_lora(clip, 1.0, [LAYER])
    stock = lora.encode(TEXT)
    plain, before, after = fp8(clip), fp8(lora), with_lora(fp8(clip), 1.0, [LAYER])
    assert relative_error(clip.encode(TEXT), stock) > 0.2
    without = plain.encode(TEXT)
    assert relative_error(before.encode(TEXT), stock) < 0.1 and relative_error(after.encode(TEXT), stock) < 0.1
    assert relative_error(without, after.encode(TEXT)) > 0.2
    taken_off = after.clone()
    taken_off.patcher.patches = {}
    taken_off.patcher.patches_uuid = None
    assert torch.equal(taken_off.encode(TEXT), without)


def test_a_scheduled_lora_is_right_each_time(clip):
    """ComfyUI must not keep the weights that a hook's LoRA gives, which have no scale, for its next turn."""
    from comfy.hooks import create_hook_lora
    from comfy_extras.nodes_hooks import SetClipHooks

    name = "lora_te1_text_model_encoder_layers_3_mlp_fc1"
    generator = torch.Generator().manual_seed(0)
    lora = {
        f"{name}.lora_up.weight": torch.randn(3072, 4, generator=generator) / 8,
        f"{name}.lora_down.weight": torch.randn(4, 768, generator=generator) / 8,
    }

    def scheduled(clip):
        return SetClipHooks().apply_hooks(clip, False, False, create_hook_lora(lora, 0.0, 1.0))[0]

    stock, quantized = scheduled(clip), scheduled(fp8(clip))
    expected = stock.encode(TEXT)
    assert relative_error(clip.encode(TEXT), expected) > 0.2
    first = quantized.encode(TEXT)
    assert relative_error(first, expected) < 0.1
    assert torch.equal(quantized.encode(TEXT), first)


def test_two_results_of_the_node_do_not_share_weights(clip):
    first, second = fp8(with_lora(clip, 1.0, [LAYER])), fp8(with_lora(clip, -1.0, [LAYER]))
    one = first.encode(TEXT)
    assert relative_error(second.encode(TEXT), one) > 0.2
    comfy.model_management.unload_all_models()
    assert torch.equal(first.encode(TEXT), one)


def test_twice_is_once(clip):
    once = fp8(clip)
    assert fp8(once) is once


def test_torchao_missing(clip, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torchao.quantization", None)
    with pytest.raises(ValueError, match="python -m pip install torchao"):
        fp8(clip)
