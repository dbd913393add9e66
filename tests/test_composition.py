"""All techniques together: every subset, on two samplers, with and without LoRA, in any order, and off again.

The demo model in small; errors are relative, of the final latent against the stock run. What the cache may do to this
model at this threshold is bounded widely; the rest is bounded by its own rounding.
"""

import itertools

import pytest
import torch
from comfy.patcher_extension import WrappersMP
from loras import with_lora
from skein import engine, live
from skein.bench.errors import relative_error
from skein.demo.sampling import conditioning, sample
from skein.plan import AttentionConfig, CacheConfig, CompileConfig, FP8Config
from skein.quantization.linear import QuantizedLinear
from skein.report import recent_runs

SMALL = dict(shape=(1, 16, 3, 8, 8), steps=6)
PARTS = {
    "cache": CacheConfig(threshold=0.3),
    "attention": AttentionConfig(),
    "fp8": FP8Config(),
    "compile": CompileConfig(),
}
BOUNDS = {"cache": 0.5, "attention": 1e-5, "fp8": 0.1, "compile": 1e-5}
LORA = [
    f"diffusion_model.{layer}"
    for layer in ("double_blocks.1.img_mlp.0", "single_blocks.2.linear1", "single_blocks.0.modulation.lin")
]
SUBSETS = [subset for size in range(5) for subset in itertools.combinations(PARTS, size)]


def witnessed(model, active):
    """The model with a wrapper that notes the techniques it finds at work inside of a model call."""

    def look(executor, *args, **kwargs):
        network = executor.class_obj
        if live.snapshot()["sampling"]["notes"].get("compile", "").startswith("compiled"):
            active.add("compile")
        if any(isinstance(module, QuantizedLinear) for module in network.modules()):
            active.add("fp8")
        options = next(value for value in (*args, *kwargs.values()) if isinstance(value, dict) and "sigmas" in value)
        if "optimized_attention_override" in options:
            active.add("attention")
        return executor(*args, **kwargs)

    model = model.clone()
    model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "witness", look)
    return model


def run(model, names, sampler="euler", **changes):
    plan = {name: PARTS[name] for name in names}
    return sample(engine.edit(model, **plan), "a red circle moves left", sampler=sampler, **{**SMALL, **changes})


@pytest.mark.parametrize("lora", [False, True], ids=["", "lora"])
@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m"])
@pytest.mark.parametrize("names", SUBSETS, ids="+".join)
def test_every_subset_is_within_the_sum_of_its_bounds_and_leaves_nothing_behind(demo_model, names, sampler, lora):
    model = with_lora(demo_model, 1.0, LORA, scale=0.07) if lora else demo_model
    stock, active = run(model, (), sampler), set()
    out = run(witnessed(model, active), names, sampler)
    # Without an attention of its own, Compile runs ComfyUI's as Skein's operator.
    assert active == {*names} - {"cache"} | ({"attention"} if "compile" in names else set())
    assert relative_error(out, stock) <= sum(BOUNDS[name] for name in names)
    if "cache" in names:
        assert recent_runs()[-1].reused > 0
    if "fp8" in names:
        assert relative_error(out, stock) > 1e-4
    assert torch.equal(run(model, (), sampler), stock)


@pytest.mark.parametrize("layers", [("1", "2"), ("0", ""), ("", "3")], ids=["middle", "first", "last"])
def test_skip_layer_guidance_is_the_same_with_the_cache(demo_model, layers):
    """It calls the model a second time in a step, for the same conditioning and with blocks left out."""
    from comfy_extras.nodes_slg import SkipLayerGuidanceDiT

    (guided,) = SkipLayerGuidanceDiT.execute(demo_model, 3.0, 0.0, 1.0, *layers).result
    plain, effect = run(demo_model, ("cache",)), run(guided, ()) - run(demo_model, ())
    with_cache = run(guided, ("cache",))
    assert recent_runs()[-1].reused > 0
    assert relative_error(with_cache - plain, effect) < 0.5


def test_the_order_of_the_nodes_does_not_matter(demo_model):
    """All orders of the four nodes and a LoRA give the same bits."""
    steps = [*PARTS, "lora"]
    expected = None
    for order in itertools.permutations(steps):
        model = demo_model
        for name in order:
            model = (
                with_lora(model, 1.0, LORA, scale=0.07) if name == "lora" else engine.edit(model, **{name: PARTS[name]})
            )
        out = sample(model, "a red circle", **{**SMALL, "steps": 3})
        expected = out if expected is None else expected
        assert torch.equal(out, expected), order


@pytest.mark.parametrize(
    "arguments",
    [
        dict(cfg=4.0, negative="a blue square"),
        dict(positive=conditioning("a red circle", guiding_frame_index=0)),
        dict(positive=conditioning("a red circle", ref_latent=torch.ones(1, 16, 1, 8, 8))),
        dict(latent=torch.zeros(2, 16, 3, 8, 8)),
    ],
    ids=["cfg", "image-to-video", "reference", "batch"],
)
def test_all_four_with_guidance_image_to_video_and_batches(demo_model, arguments):
    """The exact two give stock's result; the inexact two stay near it (guidance multiplies what FP8 rounds)."""
    arguments = {"positive": "a red circle", **SMALL, **arguments}
    stock = sample(demo_model, **arguments)
    exact = sample(engine.edit(demo_model, attention=PARTS["attention"], compile=PARTS["compile"]), **arguments)
    assert relative_error(exact, stock) < 1e-4
    everything = sample(engine.edit(demo_model, **{**PARTS, "cache": CacheConfig(threshold=0.05)}), **arguments)
    assert everything.shape == stock.shape and 1e-4 < relative_error(everything, stock) < sum(BOUNDS.values())


def test_next_to_patches_of_core(demo_model):
    """ModelSamplingSD3 changes the schedule, an attn1 patch runs inside of blocks, which then stay uncompiled: both
    keep working under all four."""
    from comfy_extras.nodes_model_advanced import ModelSamplingSD3

    shifted = ModelSamplingSD3().patch(demo_model, shift=3.0)[0]
    seen = []

    def patch(q, k, v, pe=None, attn_mask=None, extra_options=None):
        seen.append(tuple(extra_options["img_slice"]))
        return {"q": q, "k": k * 0.5, "v": v, "pe": pe, "attn_mask": attn_mask}

    shifted.set_model_patch(patch, "attn1_patch")
    stock = run(shifted, ())
    calls = len(seen)
    if not calls:
        pytest.skip("the blocks of this ComfyUI (0.16) take no attn1 patches")
    assert calls == 6 * 6 and relative_error(stock, run(demo_model, ())) > 1e-3
    assert relative_error(run(shifted, ("attention", "fp8", "compile")), stock) < BOUNDS["fp8"]
    assert len(seen) == 2 * calls
    assert relative_error(run(shifted, PARTS), stock) < sum(BOUNDS.values())
    assert recent_runs()[-1].reused > 0 and 2 * calls < len(seen) < 3 * calls
