"""FP8 runs on real ComfyUI models: LoRA, undo, loading, checkpoints, refusals."""

import gc
import os
import weakref
from types import SimpleNamespace

import comfy.model_management
import comfy.model_patcher
import comfy.utils
import pytest
import torch
from loras import with_lora
from random_checkpoints import random_model, text
from skein import engine
from skein.attributes import changed
from skein.bench.errors import relative_error
from skein.demo.sampling import sample
from skein.engine import plan_of
from skein.footprint import needed_bytes, with_slices
from skein.patchers import PLAIN_KEY, TWIN_KEY
from skein.plan import CacheConfig, CompileConfig, FP8Config
from skein.quantization import run
from skein.quantization.layers import block_layers
from skein.quantization.linear import QuantizedLinear, quantize_weight
from skein.quantization.run import quantized
from skein.quantization.twin import _make_room
from skein.report import recent_runs
from skein.techniques import TECHNIQUES
from small_models import on_a_gpu, random_hunyuan_video

SMALL = dict(shape=(1, 16, 3, 8, 8), steps=4)
PROMPT = "a red circle moves left"
MODES = ["per_tensor", "per_row", "weight_only"]
QKV = "diffusion_model.double_blocks.0.img_attn.qkv"
MODULATION = "diffusion_model.single_blocks.1.modulation.lin"
EMBEDDER = "diffusion_model.time_in.in_layer"
LORA_KEYS = [QKV, "diffusion_model.single_blocks.0.linear2", MODULATION, EMBEDDER]


class Stop(Exception):
    pass


HELD: list = []  # as ComfyUI holds the outputs of the nodes of a workflow


@pytest.fixture
def model():
    yield random_hunyuan_video()
    HELD.clear()


def fp8(model, mode="per_row", **settings):
    HELD.append(engine.edit(model, fp8=FP8Config(mode=mode, **settings)))
    return HELD[-1]


def kept_of(model, key=TWIN_KEY):
    return vars(model.model)[key]()


def twin_of(model):
    return kept_of(model).value


def two_loras(model, bias):
    return with_lora(with_lora(model, 0.8, LORA_KEYS, 0, bias=bias), -0.5, LORA_KEYS, 1, bias=bias)


def baked(strengths, bias=False):
    """The same random model with the LoRAs added to its weights for good, by ComfyUI."""
    model = random_hunyuan_video()
    patched = model
    for seed, strength in enumerate(strengths):
        patched = with_lora(patched, strength, LORA_KEYS, seed, bias=bias)
    for key in list(patched.patches):
        weight = patched.patch_weight_to_device(key, device_to=torch.device("cpu"), return_weight=True)
        comfy.utils.set_attr_param(model.model, key, weight)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["single", "double"])
def test_a_blocks_output_stays_within_four_percent_per_row(kind, dtype):
    torch.manual_seed(3)
    img, txt, vec = torch.randn(1, 40, 256).to(dtype), torch.randn(1, 9, 256).to(dtype), torch.randn(1, 256).to(dtype)
    errors = {}
    for mode in [None, *MODES]:
        network = random_hunyuan_video().model.diffusion_model
        block = (network.single_blocks if kind == "single" else network.double_blocks)[0].to(dtype)
        for name, layer in list(block.named_modules()) if mode else []:
            if isinstance(layer, torch.nn.Linear):
                storage = "weight_only" if "mod" in name.split(".")[0] else mode
                comfy.utils.set_attr(block, name, QuantizedLinear(layer.weight, layer.bias, storage))
        tokens = 40 if kind == "single" else 49
        rope = torch.eye(2).expand(1, 1, tokens, 64, 2, 2)
        out = block(img.clone(), vec=vec, pe=rope, **({} if kind == "single" else {"txt": txt.clone()}))
        out = (out if kind == "single" else torch.cat(out, 1)).float()
        if mode is None:
            stock = out
        else:
            errors[mode] = relative_error(out, stock)
    assert all(0.0001 < error < 0.04 for error in errors.values()), errors
    # Rows of random weights are alike, so per-row scales gain nothing here; where they differ, see test_linear.py.
    assert errors["weight_only"] < errors["per_row"] < 1.1 * errors["per_tensor"], errors


@pytest.mark.parametrize("modulation", [True, False])
@pytest.mark.parametrize("mode", MODES)
def test_on_off_on(model, mode, modulation):
    stock = sample(model, PROMPT, **SMALL)
    on = sample(fp8(model, mode, modulation=modulation), PROMPT, **SMALL)
    assert 0 < relative_error(on, stock) < 0.1
    twin = twin_of(model)
    assert (MODULATION in twin.modes) == modulation and twin.modes[QKV] == mode
    assert torch.equal(sample(model, PROMPT, **SMALL), stock)
    assert torch.equal(sample(fp8(model, mode, modulation=modulation), PROMPT, **SMALL), on)
    assert twin_of(model) is twin
    assert not any(isinstance(layer, QuantizedLinear) for layer in model.model.modules())


def test_two_conditions_at_cfg_4_and_the_cache(model):
    arguments = dict(SMALL, cfg=4.0)
    stock = sample(model, PROMPT, "a blue square", **arguments)
    assert 0 < relative_error(sample(fp8(model), PROMPT, "a blue square", **arguments), stock) < 0.15
    arguments = dict(SMALL, steps=6)
    plain = sample(fp8(model), PROMPT, **arguments)
    cache = CacheConfig(threshold=0.9)
    one = sample(engine.edit(fp8(model), cache=cache), PROMPT, **arguments)
    assert recent_runs()[-1].reused > 0 and 0 < relative_error(one, plain) < 0.5
    assert torch.equal(sample(fp8(engine.edit(model, cache=cache)), PROMPT, **arguments), one)


def test_samplercustomadvanced_gets_its_model_back(model):
    import comfy.sample
    import comfy.samplers
    from comfy_extras.nodes_custom_sampler import Guider_Basic
    from skein.demo.sampling import conditioning

    patcher = fp8(model)
    guider = Guider_Basic(patcher)
    guider.set_conds(conditioning(PROMPT))
    noise = comfy.sample.prepare_noise(torch.zeros(SMALL["shape"]), 1)
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", 4)
    out = guider.sample(noise, torch.zeros(SMALL["shape"]), comfy.samplers.sampler_object("euler"), sigmas, seed=1)
    assert guider.model_patcher is patcher and guider.model_patcher.model is model.model
    assert torch.equal(out.cpu(), sample(fp8(model), PROMPT, **SMALL))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bias", [False, True])
def test_lora_then_fp8_is_fp8_of_the_weights_with_lora(model, mode, bias):
    expected = sample(fp8(baked([0.8, -0.5], bias), mode), PROMPT, **SMALL)
    both = two_loras(model, bias)
    assert torch.equal(sample(fp8(both, mode), PROMPT, **SMALL), expected)
    assert twin_of(model).merged_count == 3  # the embedder's patch is ComfyUI's
    after = two_loras(fp8(model, mode), bias)
    assert torch.equal(sample(after, PROMPT, **SMALL), expected)
    without = sample(fp8(model, mode), PROMPT, **SMALL)
    assert relative_error(without, expected) > 0.01
    assert torch.equal(without, sample(fp8(random_hunyuan_video(), mode), PROMPT, **SMALL))


def test_a_change_of_strength_quantizes_only_what_it_touches(model, monkeypatch):
    first = sample(fp8(with_lora(model, 0.3, LORA_KEYS)), PROMPT, **SMALL)
    twin, quantized_again = twin_of(model), []
    original = QuantizedLinear.replace
    monkeypatch.setattr(QuantizedLinear, "replace", lambda self, *a: (quantized_again.append(1), original(self, *a)))
    second = sample(fp8(with_lora(model, 0.9, LORA_KEYS)), PROMPT, **SMALL)
    assert len(quantized_again) == 3 and twin_of(model) is twin
    assert torch.equal(second, sample(fp8(baked([0.9])), PROMPT, **SMALL))
    assert not torch.equal(first, second)
    strong = with_lora(model, 0.9, LORA_KEYS)
    sample(fp8(strong), PROMPT, **SMALL)  # other objects, loaded anew: quantized again
    assert len(quantized_again) == 6
    sample(fp8(strong), PROMPT, **SMALL)  # the same objects: not
    assert len(quantized_again) == 6


def test_comfyui_reloads_the_twin_only_when_its_own_patches_change(model, monkeypatch):
    loads = []
    sample(fp8(model), PROMPT, **SMALL)
    twin = twin_of(model)
    uuid = twin.model.current_weight_patches_uuid
    original = type(model).load
    monkeypatch.setattr(type(model), "load", lambda self, *a, **k: (loads.append(self.model), original(self, *a, **k)))
    sample(fp8(model), PROMPT, **SMALL)
    sample(fp8(with_lora(model, 0.5, [QKV])), PROMPT, **SMALL)
    assert twin.model.current_weight_patches_uuid == uuid and twin.model not in loads
    sample(fp8(with_lora(model, 0.5, LORA_KEYS)), PROMPT, **SMALL)
    assert twin.model.current_weight_patches_uuid != uuid and twin.model in loads


def raising(error):
    def callback(step, x0, x, total):
        if step == 1:
            raise error

    return callback


@pytest.mark.parametrize("ending", ["exception", "interrupt"])
def test_after_a_stopped_run_stock_and_fp8_are_as_before(model, ending):
    stock, on = sample(model, PROMPT, **SMALL), sample(fp8(model), PROMPT, **SMALL)
    patcher = fp8(model)
    error = Stop() if ending == "exception" else comfy.model_management.InterruptProcessingException()
    with pytest.raises(type(error)):
        sample(patcher, PROMPT, **SMALL, callback=raising(error))
    assert patcher.model is model.model
    assert torch.equal(sample(model, PROMPT, **SMALL), stock)
    assert torch.equal(sample(patcher, PROMPT, **SMALL), on)


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("full"), comfy.model_management.InterruptProcessingException()]
)
def test_stopped_while_quantizing_nothing_is_half_made(model, monkeypatch, error):
    source = with_lora(model, 0.5, LORA_KEYS)
    stock = sample(source, PROMPT, **SMALL)
    before = {key: value.clone() for key, value in random_hunyuan_video().model.state_dict().items()}
    made = []

    def failing(weight, mode):
        if len(made) == 7:
            raise error
        made.append(1)
        return quantize_weight(weight, mode)

    monkeypatch.setattr("skein.quantization.linear.quantize_weight", failing)
    with pytest.raises(type(error)):
        sample(fp8(source), PROMPT, **SMALL)
    assert len(made) == 7 and twin_of(model) is None
    assert all(torch.equal(value, before[key]) for key, value in model.model.state_dict().items())
    monkeypatch.undo()
    assert torch.equal(sample(source, PROMPT, **SMALL), stock)
    assert torch.equal(sample(fp8(source), PROMPT, **SMALL), sample(fp8(baked([0.5])), PROMPT, **SMALL))


def test_stopped_while_requantizing_the_next_run_goes_on(model, monkeypatch):
    sample(fp8(with_lora(model, 0.3, LORA_KEYS)), PROMPT, **SMALL)
    made, strong = [], with_lora(model, 0.9, LORA_KEYS)

    def failing(weight, mode):
        made.append(1)
        if len(made) == 2:
            raise Stop
        return quantize_weight(weight, mode)

    monkeypatch.setattr("skein.quantization.linear.quantize_weight", failing)
    with pytest.raises(Stop):
        sample(fp8(strong), PROMPT, **SMALL)
    assert torch.equal(sample(fp8(strong), PROMPT, **SMALL), sample(fp8(baked([0.9])), PROMPT, **SMALL))


def test_without_room_the_fp8_weights_wait_where_comfyui_offloads_to(model, monkeypatch):
    on = sample(fp8(model), PROMPT, **SMALL)
    for room in ("_room_for", "_make_room"):  # meanwhile, and beforehand
        kept_of(model).value = None
        monkeypatch.setattr(f"skein.quantization.twin.{room}", lambda *_: False)
        monkeypatch.setattr(model, "load_device", torch.device("cpu", 0))  # another name, so that a rest is left
        with quantized(model, FP8Config("per_row")) as patcher:
            assert patcher.loaded_size() == 0
        monkeypatch.undo()
        assert torch.equal(sample(fp8(model), PROMPT, **SMALL), on)


def test_after_a_change_of_lora_comfyui_decides_how_much_to_load(model):
    sample(fp8(with_lora(model, 0.5, LORA_KEYS)), PROMPT, **SMALL)
    comfy.model_management.unload_all_models()
    with quantized(with_lora(model, 0.9, LORA_KEYS), FP8Config("per_row")) as patcher:
        assert patcher.model is twin_of(model).model and patcher.loaded_size() == 0


def test_unloading_everything_between_runs(model):
    on = sample(fp8(with_lora(model, 0.5, LORA_KEYS)), PROMPT, **SMALL)
    with torch.inference_mode(False):  # as ComfyUI's server does it for /free
        comfy.model_management.unload_all_models()
    assert twin_of(model).model.model_loaded_weight_memory == 0
    assert torch.equal(sample(fp8(with_lora(model, 0.5, LORA_KEYS)), PROMPT, **SMALL), on)


def test_a_partly_loaded_twin_gives_the_same(model, monkeypatch):
    source = with_lora(model, 0.5, LORA_KEYS)
    on = sample(fp8(source), PROMPT, **SMALL)
    comfy.model_management.unload_all_models()
    with quantized(source, FP8Config("per_row")) as patcher:
        assert patcher.model is twin_of(model).model
        patcher.partially_load(torch.device("cpu"), patcher.model_size() // 2)
        books = twin_of(model).model
        assert books.model_lowvram and 0 < books.model_loaded_weight_memory < patcher.model_size()
        monkeypatch.setattr(comfy.model_management, "load_models_gpu", lambda *a, **k: None)  # loaded as it is
        partly = sample(patcher, PROMPT, **SMALL)
        assert books.model_lowvram
        monkeypatch.undo()
    assert relative_error(partly, on) < 1e-5
    assert torch.equal(sample(fp8(source), PROMPT, **SMALL), on)


@on_a_gpu
@pytest.mark.parametrize("compiled", [None, CompileConfig()], ids=["eager", "compiled"])
def test_a_twin_that_stays_off_the_gpu_gives_the_same_to_rounding(model, compiled):
    """Compiled anew, because its weights come from another device, and perhaps rounded in another order."""
    planned = engine.edit(fp8(model), compile=compiled)
    on = sample(planned, PROMPT, **SMALL)
    comfy.model_management.unload_all_models()
    with changed([(torch.cuda, "mem_get_info", lambda device=None: (0, 1 << 30))]):
        off = sample(planned, PROMPT, **SMALL)
        assert twin_of(model).model.model_lowvram
    assert relative_error(off, on) < 0.02
    assert relative_error(sample(planned, PROMPT, **SMALL), on) < 0.02


def test_sizes_are_real(model):
    import comfy.model_management as memory

    layers = [m for m in model.model.diffusion_model.double_blocks.modules() if isinstance(m, torch.nn.Linear)]
    layers += [m for m in model.model.diffusion_model.single_blocks.modules() if isinstance(m, torch.nn.Linear)]
    stock = model.model_size()
    with quantized(model, FP8Config("per_tensor", modulation=False)) as patcher:
        kept = patcher.model_size()
    with quantized(model, FP8Config("per_tensor")) as patcher:
        size = patcher.model_size()
        assert size == memory.module_size(patcher.model) == patcher.loaded_size()
    saved = sum(3 * layer.weight.numel() for layer in layers)  # float32 to one byte
    assert stock - saved <= size <= stock - saved + 4 * sum(layer.out_features for layer in layers)
    assert size < kept < stock
    assert "FP8: 38 MB -> 18 MB in " in run.describe(twin_of(model), "per_tensor") and model.model_size() == stock


def test_the_twin_goes_when_the_model_goes():
    model = random_hunyuan_video()
    sample(fp8(model), PROMPT, **SMALL)
    twin = weakref.ref(twin_of(model).model)
    source = weakref.ref(model.model)
    del model
    HELD.clear()
    gc.collect()
    assert source() is None and twin() is None


def test_the_twin_goes_with_the_last_output_that_has_fp8(model):
    """As when the node has gone from the workflow; and not while one of two branches has it."""
    stock, on = sample(model, PROMPT, **SMALL), fp8(model)
    expected = sample(on, PROMPT, **SMALL)
    twin, held = weakref.ref(twin_of(model)), weakref.ref(twin_of(model).model)
    branch = engine.edit(with_lora(on, 0.0, LORA_KEYS), cache=CacheConfig())
    del on
    HELD.clear()
    assert torch.equal(sample(model, PROMPT, **SMALL), stock) and twin_of(model) is twin()
    comfy.model_management.unload_all_models()
    assert torch.equal(sample(branch.parent, PROMPT, **SMALL), expected) and twin_of(model) is twin()
    del branch
    assert twin() is None and held() is None and kept_of(model) is None
    comfy.model_management.cleanup_models()
    assert torch.equal(sample(model, PROMPT, **SMALL), stock)
    assert torch.equal(sample(fp8(model), PROMPT, **SMALL), expected)


class Dynamic(comfy.model_patcher.ModelPatcher):
    """Under dynamic VRAM, as far as our code sees it; ComfyUI has it on NVIDIA GPUs only."""

    def is_dynamic(self):
        return True


@pytest.mark.parametrize("plan", [dict(fp8=FP8Config()), dict(compile=CompileConfig())], ids=["fp8", "compile"])
def test_the_model_without_dynamic_vram_goes_with_the_last_output_that_needs_it(tmp_path, plan, monkeypatch):
    monkeypatch.setattr("skein.engine.TECHNIQUES", [each for each in TECHNIQUES if each.__name__ != "_compiling"])
    model = random_model(tmp_path, 2)
    stock, path = sample(model, text(7), **SMALL), model.cached_patcher_init[1][0]
    model.__class__ = Dynamic
    on = engine.edit(model, **plan)
    first = sample(on, text(7), **SMALL)
    second = weakref.ref(kept_of(model, PLAIN_KEY).value.root.model)
    assert second() is not model.model
    os.remove(path)
    assert torch.equal(sample(on, text(7), **SMALL), first)  # not loaded again
    del on
    assert second() is None and kept_of(model, PLAIN_KEY) is None
    assert torch.equal(sample(model, text(7), **SMALL), stock)
    with pytest.raises(ValueError, match="is no longer there since ComfyUI loaded it"):
        sample(engine.edit(model, **plan), text(7), **SMALL)


def test_a_file_that_is_written_to_under_the_second_model_is_refused(tmp_path, monkeypatch):
    """Its weights lie there; a file that takes its place does not reach them."""
    monkeypatch.setattr("skein.engine.TECHNIQUES", [each for each in TECHNIQUES if each.__name__ != "_compiling"])
    model = random_model(tmp_path, 2)
    model.__class__ = Dynamic
    on, path = engine.edit(model, fp8=FP8Config()), model.cached_patcher_init[1][0]
    first = sample(on, text(7), **SMALL)
    kept = kept_of(model, PLAIN_KEY).value
    os.link(path, tmp_path / "the same file")
    (tmp_path / "another").write_bytes(b"")
    os.replace(tmp_path / "another", path)
    assert torch.equal(sample(on, text(7), **SMALL), first) and kept_of(model, PLAIN_KEY).value is kept
    with open(tmp_path / "the same file", "ab") as file:
        file.write(b" ")
    with pytest.raises(ValueError, match="has changed on disk since ComfyUI loaded it"):
        sample(on, text(7), **SMALL)


def test_another_mode_takes_the_place_of_the_first(model):
    sample(fp8(model, "per_row"), PROMPT, **SMALL)
    twin = weakref.ref(twin_of(model).model)
    sample(fp8(model, "per_tensor"), PROMPT, **SMALL)
    gc.collect()
    assert twin() is None and twin_of(model).modes[QKV] == "per_tensor"


def test_fp8_weights_stay_on_the_device_where_the_run_has_room_beside_them(model, monkeypatch):
    """Else each goes as it is made: there is no room for all, or what is left is in pieces between them."""
    layers = list(block_layers(model.model, FP8Config(), "per_row"))
    source = SimpleNamespace(load_device=torch.device("cuda"), model=model.model)
    weights = [model.model.get_submodule(name).weight for name in layers]
    fp8 = comfy.model_management.module_size(model.model) - sum(weight.nbytes - weight.numel() for weight in weights)
    freed, free = [], [0.0]
    monkeypatch.setattr(comfy.model_management, "free_memory", lambda size, device: freed.append(size))
    monkeypatch.setattr(comfy.model_management, "get_free_memory", lambda device: free[0])
    for work in (1e9, 16 * max(weight.numel() for weight in weights)):
        need = fp8 + work + comfy.model_management.minimum_inference_memory()
        for free[0], fits in ((need, True), (need - 1, False)):
            assert _make_room(source, layers, work) == fits and freed[-1] == need


def test_a_run_tells_what_it_needs_beside_the_weights(model, monkeypatch):
    needs = []
    monkeypatch.setattr("skein.quantization.twin._make_room", lambda source, modes, work: needs.append(work) or True)
    patcher = fp8(model)
    sample(patcher, PROMPT, **SMALL)
    assert needs == [needed_bytes(with_slices(plan_of(patcher), patcher, SMALL["shape"]), patcher, SMALL["shape"])]
    assert needs[0] > 0


def test_torchao_missing(model, monkeypatch):
    """Refused by the node, which does no more than this edit."""
    monkeypatch.setitem(__import__("sys").modules, "torchao.quantization", None)
    with pytest.raises(ValueError, match="python -m pip install torchao"):
        engine.edit(model, fp8=FP8Config())


def test_an_old_gpu_stores_fp8_only(model, monkeypatch, caplog):
    monkeypatch.setattr(run, "supported_mode", lambda mode, device: "weight_only")
    caplog.set_level("INFO", "skein")
    old = sample(fp8(model, "per_row"), PROMPT, **SMALL)
    assert "weight_only is used instead" in caplog.text
    monkeypatch.undo()
    assert torch.equal(sample(fp8(model, "weight_only"), PROMPT, **SMALL), old)
