"""FP8 on real ComfyUI models: LoRA, loading, undo. Layers are compared with FP8 of what ComfyUI would have run."""

import gc
import weakref

import comfy.model_management
import comfy.sd
import pytest
import torch
from safetensors.torch import save_file
from skein import engine
from skein.demo.sampling import sample
from skein.plan import CacheConfig, FP8Config
from skein.quantization import QuantizedLinear, quantized
from skein.quantization.twin import _twins
from skein.report import recent_runs
from small_models import random_hunyuan_video

SMALL = dict(shape=(1, 16, 3, 8, 8), steps=4)
FP8 = dict(fp8=FP8Config("per_row"))
BLOCK_KEYS = ("double_blocks.0.img_attn.qkv", "double_blocks.1.txt_mlp.2", "single_blocks.1.linear2")
MODULATION_KEY = "double_blocks.1.img_mod.lin"


@pytest.fixture
def model():
    return random_hunyuan_video()


def error(a, b):
    return float((a - b).norm() / b.norm())


def differences(model, names, seed):
    """A full-rank patch for each of some layers, as ComfyUI's LoRA loader makes them."""
    generator = torch.Generator().manual_seed(seed)
    state = model.model.state_dict()
    keys = [f"diffusion_model.{name}.weight" for name in names]
    return {key: ("diff", (0.05 * torch.randn(state[key].shape, generator=generator),)) for key in keys}


def with_patches(model, patches, strength=1.0):
    patched = model.clone()
    assert len(patched.add_patches(patches, strength)) == len(patches)
    return patched


def with_weights(model, patches, strength=1.0):
    """A model whose checkpoint holds the patched weights."""
    other = random_hunyuan_video()
    for key, (_, (value,)) in patches.items():
        parameter = comfy.utils.get_attr(other.model, key)
        parameter.copy_(parameter + strength * value)
    return other


def run(model, **plan):
    return sample(engine.edit(model, **plan), "a red circle", **SMALL)


@pytest.mark.parametrize(("mode", "bound"), [("per_row", 0.1), ("per_tensor", 0.1), ("weight_only", 0.06)])
def test_error_against_the_exact_model(model, mode, bound):
    stock = run(model)
    assert 1e-4 < error(run(model, fp8=FP8Config(mode)), stock) < bound


def test_the_error_of_one_block_is_small_and_rows_are_not_worse():
    """One double block on Gaussian states in bfloat16: at most 4 %, per row not above per tensor."""
    model = random_hunyuan_video(dtype=torch.bfloat16)
    network = model.model.diffusion_model
    torch.manual_seed(1)
    img, txt = torch.randn(1, 96, 256, dtype=torch.bfloat16), torch.randn(1, 9, 256, dtype=torch.bfloat16)
    vec = torch.randn(1, 256, dtype=torch.bfloat16)

    def output(block):
        return block(img=img.clone(), txt=txt.clone(), vec=vec, pe=None)[0].float()

    block = network.double_blocks[0]
    exact, errors = output(block), {}
    names = [name for name, m in block.named_modules() if isinstance(m, torch.nn.Linear) and "mod" not in name]
    for mode in ("per_row", "per_tensor"):
        layers = {f"diffusion_model.double_blocks.0.{name}": mode for name in names}
        twin, _ = quantized(model, layers)
        errors[mode] = error(output(twin.model.diffusion_model.double_blocks[0]), exact)
    assert errors["per_row"] <= 0.04 and errors["per_row"] <= errors["per_tensor"]


@pytest.mark.parametrize("names", [BLOCK_KEYS, (MODULATION_KEY,), (*BLOCK_KEYS, MODULATION_KEY, "img_in.proj")])
@pytest.mark.parametrize("modulation", [True, False])
def test_lora_on_fp8_is_fp8_of_the_weights_with_lora(model, names, modulation):
    patches = differences(model, names, seed=2)
    plan = dict(fp8=FP8Config("per_row", modulation))
    ours = run(with_patches(model, patches, 0.7), **plan)
    assert torch.equal(ours, run(with_weights(model, patches, 0.7), **plan))
    assert error(ours, run(model, **plan)) > 1e-3  # the patches do something


def test_several_loras_changed_strengths_and_any_order_of_nodes(model):
    one, two = differences(model, BLOCK_KEYS[:2], seed=2), differences(model, BLOCK_KEYS[1:], seed=3)
    lora_first = engine.edit(with_patches(with_patches(model, one, 0.5), two, -1.0), **FP8)
    fp8_first = with_patches(with_patches(engine.edit(model, **FP8), one, 0.5), two, -1.0)
    both = sample(lora_first, "a red circle", **SMALL)
    assert torch.equal(sample(fp8_first, "a red circle", **SMALL), both)
    weaker = run(with_patches(with_patches(model, one, 0.25), two, -1.0), **FP8)
    assert not torch.equal(weaker, both)
    none = run(model, **FP8)
    assert torch.equal(run(with_patches(with_patches(model, one, 0.5), two, -1.0), **FP8), both)  # and back
    assert torch.equal(run(random_hunyuan_video(), **FP8), none)


def test_only_layers_whose_patches_changed_are_made_anew(model):
    patches = differences(model, BLOCK_KEYS, seed=2)
    run(with_patches(model, patches), **FP8)
    before = {name: m for name, m in _twins[model.model].model.named_modules() if isinstance(m, QuantizedLinear)}
    run(with_patches(model, patches, 0.5), **FP8)
    after = {name: m for name, m in _twins[model.model].model.named_modules() if isinstance(m, QuantizedLinear)}
    changed = {name.removeprefix("diffusion_model.") for name in before if before[name] is not after[name]}
    assert changed == set(BLOCK_KEYS)


@pytest.mark.parametrize("ending", ["normal", "exception", "interrupt", "while quantizing"])
def test_on_and_off_give_the_same_bits_however_a_run_ended(model, ending, monkeypatch):
    patched = with_patches(model, differences(model, BLOCK_KEYS, seed=2))
    stock, fp8 = run(patched), run(patched, **FP8)
    assert torch.equal(run(patched), stock)
    interrupt = comfy.model_management.InterruptProcessingException

    if ending == "while quantizing":
        other = with_patches(model, differences(model, BLOCK_KEYS, seed=9))
        comfy.model_management.interrupt_current_processing(True)
        with pytest.raises(interrupt):
            run(other, **FP8)
    elif ending != "normal":
        error_type = KeyError if ending == "exception" else interrupt

        def stop(*_):
            raise error_type()

        with pytest.raises(error_type):
            sample(engine.edit(patched, **FP8), "a red circle", **SMALL, callback=stop)
    assert torch.equal(run(patched, **FP8), fp8)
    assert torch.equal(run(patched), stock)


def test_unloading_and_cfg_and_the_cache(model):
    first = run(model, **FP8)
    comfy.model_management.unload_all_models()
    assert torch.equal(run(model, **FP8), first)
    guided = dict(positive="a red circle", negative="a blue square", cfg=4.0, **SMALL)
    assert 0 < error(sample(engine.edit(model, **FP8), **guided), sample(model, **guided)) < 0.2
    run(model, **FP8, cache=CacheConfig(threshold=0.9))
    assert recent_runs()[-1].reused > 0


def test_the_size_that_comfyui_sees_is_the_real_one(model):
    layers = {f"diffusion_model.{name}": "per_row" for name in BLOCK_KEYS}
    twin, sentence = quantized(model, layers)
    saved = sum(3 * comfy.utils.get_attr(model.model, f"{layer}.weight").numel() for layer in layers)
    scales = sum(4 * comfy.utils.get_attr(model.model, f"{layer}.weight").shape[0] for layer in layers)
    assert twin.model_size() == comfy.model_management.module_size(model.model) - saved + scales
    assert "3 layers per_row" in sentence


def test_the_twin_goes_with_its_model():
    model = random_hunyuan_video()
    run(model, **FP8)
    twin = weakref.ref(_twins[model.model].model)
    assert twin() is not None
    comfy.model_management.unload_all_models()
    del model
    gc.collect()
    assert twin() is None


def test_the_twin_and_the_model_share_what_is_not_quantized(model):
    run(model, **FP8)
    comfy.model_management.unload_all_models()
    source, twin = model.model.state_dict(), _twins[model.model].model.state_dict()
    key = "diffusion_model.img_in.proj.weight"
    assert twin[key].data_ptr() == source[key].data_ptr()
    assert twin["diffusion_model.single_blocks.0.linear1.weight"].dtype == torch.float8_e4m3fn


def test_a_checkpoint_stored_in_float8_is_converted(tmp_path):
    model = random_hunyuan_video()
    state = {
        k.removeprefix("diffusion_model."): v for k, v in model.model.state_dict().items() if "diffusion_model" in k
    }
    stored = {k: v.to(torch.float8_e4m3fn) if v.ndim == 2 else v for k, v in state.items()}
    save_file(stored, str(tmp_path / "fp8.safetensors"))
    loaded = comfy.sd.load_diffusion_model(str(tmp_path / "fp8.safetensors"))
    stock = sample(loaded, "a red circle", **SMALL)
    assert error(sample(engine.edit(loaded, **FP8), "a red circle", **SMALL), stock) < 0.1


def test_what_fp8_would_lose_is_refused_with_a_sentence(model):
    wrapped = model.clone()
    wrapped.add_object_patch("diffusion_model.single_blocks.0", model.model.diffusion_model.single_blocks[0])
    with pytest.raises(ValueError, match="another node's patch of diffusion_model"):
        run(wrapped, **FP8)
    hooked = model.clone()
    hooked.hook_patches = {"hook": {f"diffusion_model.{BLOCK_KEYS[0]}.weight": []}}
    with pytest.raises(ValueError, match="LoRA hooks"):
        run(hooked, **FP8)
