"""What other nodes and other checkpoints bring: kept, left alone, or refused with a sentence."""

import copy
import functools
import json
from types import MethodType, SimpleNamespace

import comfy.hooks
import comfy.model_management
import comfy.sd
import pytest
import torch
from comfy.patcher_extension import PatcherInjection
from safetensors.torch import save_file
from skein import engine
from skein.bench.errors import relative_error
from skein.demo.sampling import conditioning, sample
from skein.patchers import TWIN_KEY, plain, unload
from skein.plan import FP8Config
from skein.quantization.linear import QuantizedLinear
from skein.quantization.run import quantized
from small_models import around_each_call, random_hunyuan_video

SMALL = dict(shape=(1, 16, 3, 8, 8), steps=3)
PROMPT = "a red circle moves left"
QKV = "diffusion_model.double_blocks.0.img_attn.qkv"


@pytest.fixture
def model():
    return random_hunyuan_video()


def fp8(model, mode="per_row", **settings):
    return engine.edit(model, fp8=FP8Config(mode=mode, **settings))


@pytest.mark.parametrize("path", [QKV, "diffusion_model.double_blocks.0", f"{QKV}.forward"])
def test_a_replaced_layer_is_refused(model, path):
    source = model.clone()
    source.add_object_patch(path, torch.nn.Identity())
    with pytest.raises(ValueError, match="Another node has replaced"):
        sample(fp8(source), PROMPT, **SMALL)


def test_a_replacement_that_holds_the_models_own_modules_is_refused(model):
    source = model.clone()
    forward = model.model.diffusion_model._forward
    source.add_object_patch("diffusion_model._forward", lambda *args, **kwargs: forward(*args, **kwargs))
    source.add_object_patch("diffusion_model.txt_in.forward", model.model.diffusion_model.txt_in.forward)
    source.add_object_patch("another", torch.nn.Sequential(torch.nn.Identity()))  # holds nothing of the model
    stock = sample(source, PROMPT, **SMALL)
    for _ in range(2):  # with the patches on the model, and without
        with pytest.raises(ValueError, match=r"Another node has replaced diffusion_model\.txt_in\.forward"):
            sample(fp8(source), PROMPT, **SMALL)
        comfy.model_management.unload_all_models()
    assert "_forward" in vars(model.model.diffusion_model)  # ComfyUI puts the model's own back, on the model itself
    assert 0 < relative_error(sample(fp8(model), PROMPT, **SMALL), stock) < 0.1


def test_a_method_that_another_pack_has_put_on_the_model_is_refused(model):
    """As guiders that change a model's forward do while they sample: a twin made then would run the source for ever."""
    network = model.model.diffusion_model
    network.forward = MethodType(lambda self, *args, **kwargs: type(self).forward(self, *args, **kwargs), network)
    with pytest.raises(ValueError, match="Another node has replaced the forward of the model's HunyuanVideo"):
        sample(fp8(model), PROMPT, **SMALL)
    del network.forward
    assert 0 < relative_error(sample(fp8(model), PROMPT, **SMALL), sample(model, PROMPT, **SMALL)) < 0.1


@pytest.mark.parametrize("name", ["double_blocks", "forward_orig"])
def test_what_another_pack_puts_on_the_model_around_each_call_is_refused(model, name):
    """As TeaCache and WaveSpeed's cache do, on the model that they were given: the twin runs without it."""
    source = model.clone()
    source.set_model_unet_function_wrapper(around_each_call(model.model.diffusion_model, name))
    with pytest.raises(ValueError, match=r"changes the model's own code while it samples .* FP8 Quantize cannot work"):
        sample(fp8(source), PROMPT, **SMALL)
    assert torch.isfinite(sample(fp8(model), PROMPT, **SMALL)).all()


def test_what_comfyui_puts_on_the_model_and_takes_off_is_not_refused(model):
    """Object patches that are on the source when the run begins, and no longer when the source has been unloaded."""
    source, network = model.clone(), model.model.diffusion_model
    source.add_object_patch("diffusion_model._forward", functools.partial(network._forward))
    source.add_object_patch("diffusion_model.vector_in", copy.deepcopy(network.vector_in))
    seen = []

    def unload_source(call, given):
        seen.append("partial" in repr(vars(network).get("_forward")))
        unload(source)
        return call(given["input"], given["timestep"], **given["c"])

    last = fp8(source)
    last.set_model_unet_function_wrapper(unload_source)
    for _ in range(2):  # the first makes the twin, and unloads the source for that
        sample(source, PROMPT, **SMALL)
        assert torch.isfinite(sample(last, PROMPT, **SMALL)).all()
    assert seen == [False] * 3 + [True, False, False]


def test_nothing_is_asked_of_the_models_config_that_it_does_not_have(model, caplog):
    """ComfyUI warns of it in the log, and tells users to fix their code."""
    sample(fp8(model), PROMPT, **SMALL)
    assert "model config" not in caplog.text


def test_injected_layers_are_refused(model):
    """As a LoRA in bypass mode: a twin would be without them."""
    source = model.clone()
    source.set_injections("bypass", [PatcherInjection(inject=lambda patcher: None, eject=lambda patcher: None)])
    with pytest.raises(ValueError, match="puts into the model while it samples"):
        sample(fp8(source), PROMPT, **SMALL)


def test_devices_without_eight_bit_floats_are_named(model, monkeypatch):
    """Apple's, which cannot be here: PyTorch raises this there."""
    empty = torch.empty

    def on_mps(*size, dtype=None, **options):
        if dtype == torch.float8_e4m3fn:
            raise TypeError("Trying to convert Float8_e4m3fn to the MPS backend but it does not have support for that")
        return empty(*size, dtype=dtype, **options)

    monkeypatch.setattr(torch, "empty", on_mps)
    with pytest.raises(ValueError, match="cannot store FP8 weights"):
        sample(fp8(model), PROMPT, **SMALL)


def test_other_object_patches_are_kept(model):
    from comfy_extras.nodes_model_advanced import ModelSamplingSD3

    shifted = ModelSamplingSD3().patch(model, 3.0)[0]
    stock, on = sample(shifted, PROMPT, **SMALL), sample(fp8(shifted), PROMPT, **SMALL)
    errors = relative_error(on, stock), relative_error(sample(fp8(model), PROMPT, **SMALL), stock)
    assert 0 < errors[0] < 0.1 and errors[1] > 2 * errors[0], errors


def test_weight_wrappers_on_quantized_layers_are_kept(model):
    source = model.clone()
    source.add_weight_wrapper(f"{QKV}.weight", lambda weight: weight * 0)
    stock, on = sample(source, PROMPT, **SMALL), sample(fp8(source), PROMPT, **SMALL)
    assert 0 < relative_error(on, stock) < 0.1
    assert not torch.equal(on, sample(fp8(model), PROMPT, **SMALL))


def test_a_scheduled_lora_on_quantized_layers_is_refused_and_on_others_kept(model):
    def scheduled(key):
        weight = model.get_model_object(f"{key}.weight")
        patches = {f"{key}.weight": ("diff", (torch.ones_like(weight) / 50,))}
        hooks = comfy.hooks.create_hook_model_as_lora({}, {}, 1.0, 1.0)
        hook = hooks.hooks[0]
        hook.weights, hook.need_weight_init = patches, False
        return dict(positive=conditioning(PROMPT, hooks=hooks), **SMALL)

    with pytest.raises(ValueError, match="scheduled LoRA"):
        sample(fp8(model), **scheduled(QKV))
    other = scheduled("diffusion_model.time_in.in_layer")
    assert 0 < relative_error(sample(fp8(model), **other), sample(model, **other)) < 0.1


def test_a_model_that_cannot_be_loaded_without_dynamic_vram_is_refused(model, monkeypatch):
    patcher = model.clone()
    monkeypatch.setattr(patcher, "is_dynamic", lambda: True)
    patcher.cached_patcher_init = None
    with pytest.raises(ValueError, match="dynamic VRAM"), plain(SimpleNamespace(model_patcher=patcher)):
        pass


def state_of(model):
    return {key.removeprefix("diffusion_model."): value.clone() for key, value in model.model.state_dict().items()
            if key.startswith("diffusion_model.")}  # fmt: skip


def load(state, path, **options):
    save_file(state, str(path))
    return comfy.sd.load_diffusion_model(str(path), model_options=options)


def block_weights(state):
    return [key for key in state if "_blocks." in key and key.endswith("weight") and state[key].dim() == 2]


def test_a_checkpoint_stored_in_plain_float8_is_quantized(model, tmp_path):
    stored = load(state_of(model), tmp_path / "model.safetensors", dtype=torch.float8_e4m3fn)
    assert stored.get_model_object(f"{QKV}.weight").dtype == torch.float8_e4m3fn
    planned = fp8(stored)
    stock, on = sample(stored, PROMPT, **SMALL), sample(planned, PROMPT, **SMALL)
    assert 0 < relative_error(on, stock) < 0.1
    layer = planned.get_attachment(TWIN_KEY).value.model.get_submodule(QKV)
    assert isinstance(layer, QuantizedLinear)
    assert torch.equal(sample(stored, PROMPT, **SMALL), stock)


def scaled_by_weight(state):
    """The weights of blocks in ComfyUI's FP8 with a scale each."""
    for key in block_weights(state):
        scale = state[key].abs().max() / 448
        state[key] = (state[key] / scale).to(torch.float8_e4m3fn)
        state[f"{key}_scale"] = scale.float()
        marker = json.dumps({"format": "float8_e4m3fn"}).encode()
        state[f"{key.removesuffix('.weight')}.comfy_quant"] = torch.tensor(list(marker), dtype=torch.uint8)
    return state


def test_a_scaled_float8_checkpoint_keeps_its_values(model, tmp_path):
    """In memory of the twin's own; and nothing happens to the model."""
    scaled = load(scaled_by_weight(state_of(model)), tmp_path / "model.safetensors")
    weight = scaled.get_model_object(f"{QKV}.weight")
    assert type(weight.data) is not torch.Tensor, "ComfyUI's own quantized tensor is what this test is about"
    stock, planned = sample(scaled, PROMPT, **SMALL), fp8(scaled)
    assert 0 < relative_error(sample(planned, PROMPT, **SMALL), stock) < 0.05
    layer = planned.get_attachment(TWIN_KEY).value.model.get_submodule(QKV)
    assert torch.equal(layer.weight.float(), weight._qdata.float())
    assert (layer.weight_scale == weight._params.scale).all() and layer.weight_scale.shape == (768, 1)
    assert layer.weight.data_ptr() != weight._qdata.data_ptr()
    assert torch.equal(sample(scaled, PROMPT, **SMALL), stock)


def test_a_quantized_block_compiles_as_one_graph(model, monkeypatch):
    from comfy.ldm.modules.attention import attention_pytorch

    monkeypatch.setattr("comfy.ldm.flux.math.optimized_attention", attention_pytorch)  # that of CPUs does not trace
    with quantized(model, FP8Config("per_tensor")) as patcher:
        block = patcher.model.diffusion_model.single_blocks[0]
        img, vec = torch.randn(1, 20, 256), torch.randn(1, 256)
        arguments = dict(vec=vec, pe=torch.eye(2).expand(1, 1, 20, 64, 2, 2))
        eager = block(img.clone(), **arguments)
        torch.compiler.reset()
        compiled = torch.compile(block, fullgraph=True, backend="aot_eager")(img.clone(), **arguments)
        assert relative_error(compiled, eager) < 0.01
