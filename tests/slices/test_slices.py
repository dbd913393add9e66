"""Blocks in slices of tokens, on tiny models of ComfyUI's own classes: the same result, with each technique, and
nothing left behind.
"""

from dataclasses import replace

import comfy.ldm.flux.math as flux
import pytest
import torch
from loras import with_lora
from skein import engine, live
from skein.bench.errors import relative_error
from skein.models import Network
from skein.plan import AttentionConfig, CacheConfig, CompileConfig, FP8Config, SlicesConfig
from skein.report import recent_runs
from skein.slices import can_be_sliced
from tiny_models import CASES, guidance, sample

HUNYUAN, FLUX = CASES["HunyuanVideo"], CASES["FLUX.1"]
LAYERS = (
    "double_blocks.1.img_attn.qkv",
    "double_blocks.0.img_mlp.0",
    "single_blocks.0.linear1",
    "single_blocks.1.linear2",
)
LORA = [f"diffusion_model.{layer}" for layer in LAYERS]


def architecture_of(name):
    return Network(CASES[name].patcher().model.diffusion_model).architecture


SLICED = [
    name for name in CASES if any(can_be_sliced(architecture_of(name), stack) for stack in architecture_of(name).stacks)
]


def attributes_of(patcher):
    """What the modules of a model have on themselves."""
    modules = patcher.model.diffusion_model.modules()
    return [{name: id(value) for name, value in vars(module).items()} for module in modules]


def rows_of(layer, seen):
    """Has a layer note how many tokens it is given, until the test ends."""
    layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[1]))


def sliced(patcher, count, **plan):
    return engine.edit(patcher, slices=SlicesConfig(count), **plan)


@pytest.mark.parametrize("name", SLICED)
def test_slices_of_any_size_give_the_same_result(name):
    """Of one token, of seven, of half of them; of a batch of two, and of one."""
    case = CASES[name]
    patcher = case.patcher()
    tokens = Network(patcher.model.diffusion_model).tokens(case.latent)
    for cfg in (guidance(name), 1.0):
        stock, before = sample(case, patcher, cfg=cfg), attributes_of(patcher)
        for count in (tokens, -(-tokens // 7), 2)[0 if name in ("HunyuanVideo", "FLUX.1", "Wan 2.1") else 1 :]:
            out = sample(case, sliced(patcher, count), cfg=cfg)
            assert relative_error(out, stock) < 3e-6, (count, cfg)
        assert attributes_of(patcher) == before
        assert torch.equal(sample(case, patcher, cfg=cfg), stock)
    assert live.snapshot()["sampling"]["notes"]["slices"].startswith("Blocks in 2 slices of tokens: ")


def test_layers_see_a_slice_at_a_time():
    patcher = HUNYUAN.patcher()
    blocks, tokens = patcher.model.diffusion_model, 3 * 4 * 3
    feed_forward, single = [], []
    rows_of(blocks.double_blocks[0].img_mlp[0], feed_forward)
    rows_of(blocks.single_blocks[0].linear2, single)
    sample(HUNYUAN, patcher, steps=1)
    assert (feed_forward, single) == ([tokens], [tokens + 7])
    feed_forward.clear(), single.clear()
    sample(HUNYUAN, sliced(patcher, 4), steps=1)
    assert (feed_forward, single) == ([9] * 4, [11, 11, 11, 10])


@pytest.mark.parametrize(
    ("fp8", "bound"),
    [(None, 3e-6), (FP8Config(), 3e-6), (FP8Config("weight_only"), 3e-6), (FP8Config("per_tensor"), 0.03)],
    ids=["", "per_row", "weight_only", "per_tensor"],
)
@pytest.mark.parametrize("lora", [False, True], ids=["", "lora"])
@pytest.mark.parametrize("case", [HUNYUAN, FLUX], ids=["HunyuanVideo", "FLUX.1"])
def test_with_fp8_and_lora(case, fp8, bound, lora):
    """FP8 scales per row belong to a token each, so that slices have the same; one per tensor is each slice's own."""
    patcher = with_lora(case.patcher(), 1.0, LORA) if lora else case.patcher()
    plan = {"attention": AttentionConfig(), **({"fp8": fp8} if fp8 else {})}
    whole = sample(case, engine.edit(patcher, **plan))
    error = relative_error(sample(case, sliced(patcher, 5, **plan)), whole)
    print(f"{error:.1e}")
    assert error < bound and (error > 1e-4 or bound < 0.01)
    if lora:
        assert relative_error(whole, sample(case, engine.edit(case.patcher(), **plan))) > 1e-3


def test_lora_that_comfyui_puts_on_in_each_call():
    """As it does on layers that are not on the GPU: by functions on their weights."""
    patcher = HUNYUAN.patcher()
    stock = sample(HUNYUAN, patcher)
    for path in LORA:
        patcher.model.get_submodule(path).weight_function = [lambda weight: weight * 1.5]
    patched = sample(HUNYUAN, patcher)
    assert relative_error(sample(HUNYUAN, sliced(patcher, 5)), patched) < 3e-6 < 1e-2 < relative_error(patched, stock)


@pytest.mark.parametrize("plan", [{}, {"compile": CompileConfig()}], ids=["", "compiled"])
def test_a_forward_of_another_node_on_a_layer_is_run_for_all_of_its_channels(plan):
    """As ComfyUI's bypass LoRA puts one on each of its layers."""
    patcher = HUNYUAN.patcher()
    stock = sample(HUNYUAN, patcher)
    for path in LORA:
        layer = patcher.model.get_submodule(path)
        added = torch.randn(layer.out_features)
        layer.forward = lambda x, own=layer.forward, added=added: own(x) + added
    patched = sample(HUNYUAN, patcher)
    out = sample(HUNYUAN, sliced(patcher, 5, **plan))
    assert relative_error(out, patched) < 3e-6 < 1e-2 < relative_error(patched, stock)


def test_a_parameter_of_a_layer_that_is_for_all_rows_stays_whole():
    """As a scale of the input, of no dimension."""
    patcher = HUNYUAN.patcher()
    stock = sample(HUNYUAN, patcher)
    layer = patcher.model.diffusion_model.single_blocks[0].linear1
    layer.register_parameter("input_scale", torch.nn.Parameter(torch.tensor(1.0), requires_grad=False))
    assert relative_error(sample(HUNYUAN, sliced(patcher, 5)), stock) < 3e-6


def test_the_cache_reuses_the_same_calls():
    patcher = HUNYUAN.patcher()
    how = {"cfg": 3.0, "steps": 5, "near": True}
    cached = engine.edit(patcher, cache=CacheConfig(threshold=0.8, order=0))
    whole = sample(HUNYUAN, cached, **how)
    reused = [call.reused for call in recent_runs()[-1].calls]
    assert relative_error(sample(HUNYUAN, sliced(cached, 5), **how), whole) < 3e-6
    assert [call.reused for call in recent_runs()[-1].calls] == reused and any(reused)


@pytest.mark.parametrize("when", [0, 1, 4, 7])
def test_an_exception_in_the_middle_leaves_nothing(when):
    patcher = HUNYUAN.patcher()
    stock, before, calls = sample(HUNYUAN, patcher), attributes_of(patcher), []
    layer = patcher.model.diffusion_model.double_blocks[1].img_attn

    def fail(*_):
        calls.append(None)
        if len(calls) > when:
            raise KeyError("in the middle")

    hooks = [each.register_forward_pre_hook(fail) for each in (layer.norm, layer.proj)]
    with pytest.raises(KeyError, match="in the middle"):
        sample(HUNYUAN, sliced(patcher, 4))
    for hook in hooks:
        hook.remove()
    assert len(calls) == when + 1 and attributes_of(patcher) == before
    assert torch.equal(sample(HUNYUAN, patcher), stock)


def test_another_packs_patch_inside_of_a_blocks_attention_has_it_whole():
    patcher, seen = HUNYUAN.patcher(), []

    def patch(q, k, v, pe, attn_mask, extra_options):
        seen.append((q.shape[2], extra_options["img_slice"]))
        return {"q": q * 0.5}

    patcher.set_model_attn1_patch(patch)
    stock = sample(HUNYUAN, patcher)
    whole = list(seen)
    seen.clear()
    assert torch.equal(sample(HUNYUAN, sliced(patcher, 4)), stock) and seen == whole
    assert "another node's attention patch" in live.snapshot()["sampling"]["notes"]["slices"]


def test_a_block_whose_attention_does_not_show_runs_whole(monkeypatch):
    """Nothing that it has been given is changed by the try."""
    patcher = HUNYUAN.patcher()
    stock = sample(HUNYUAN, patcher)

    def plain(q, k, v, pe, mask=None, transformer_options=None):
        q, k = flux.apply_rope(q, k, pe)
        return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    monkeypatch.setattr("comfy.ldm.flux.layers.attention", plain)
    assert relative_error(sample(HUNYUAN, sliced(patcher, 4)), stock) < 1e-5
    assert (
        live.snapshot()["sampling"]["notes"]["slices"]
        == "single_block 1 runs whole: its attention cannot be told apart"
    )


def test_a_text_mask_reaches_the_attention_whole():
    masked = replace(HUNYUAN, extra={"attention_mask": (torch.arange(7) < 5).long().unsqueeze(0)})
    patcher = HUNYUAN.patcher()
    stock = sample(masked, patcher)
    assert relative_error(stock, sample(HUNYUAN, patcher)) > 1e-4
    kept = AttentionConfig(kernel="stock", trim_text=False)
    assert relative_error(sample(masked, sliced(patcher, 4, attention=kept)), stock) < 3e-6


def test_half_precision_in_which_blocks_do_not_end_in_place():
    """In float16 ComfyUI's blocks give back other tensors than those that they were given."""
    patcher = HUNYUAN.patcher(dtype=torch.float16)
    stock = sample(HUNYUAN, patcher)
    assert stock.isfinite().all() and relative_error(sample(HUNYUAN, sliced(patcher, 4)), stock) < 2e-2
