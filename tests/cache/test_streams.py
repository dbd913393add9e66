"""Calls of one conditioning at one sigma that are not one another's: guidance, tiles, single samples of a batch.

On the embedded model through ComfyUI's own sampler. Guidance is measured by its effect, the guided output less the
plain one: the error of the effect under the cache against the effect without it. It is 1 where guidance is lost.
"""

import functools
import itertools

import comfy.samplers
import pytest
import torch
from skein import engine
from skein.bench.errors import relative_error
from skein.bench.previews import frames
from skein.demo.sampling import sample
from skein.demo.video import psnr
from skein.plan import CacheConfig
from skein.report import recent_runs

PROMPT = "a red circle moves left"
SMALL = dict(shape=(1, 16, 3, 12, 12), steps=12)
BLOCKS = [("double_block", 1), ("single_block", 1)]  # perturbed
THRESHOLDS = (1e-9, 0.06, 0.2)
SCALE = 2.0
THRESHOLD = 0.2  # for tiles


def run(model, threshold=None, **changes):
    model = model if threshold is None else engine.edit(model, cache=CacheConfig(threshold=threshold))
    return sample(model, PROMPT, **{**SMALL, **changes})


def decisions():
    return [call.reused for call in recent_runs()[-1].calls]


def damped_attention(func, *args, **kwargs):
    here = kwargs["transformer_options"].get("block_index") == 1  # not in the first block, which would show it
    return func(*args, **kwargs) * (0.3 if here else 1.0)


def damped_keys(q, k, v, pe=None, attn_mask=None, extra_options=None):
    factor = 0.1 if extra_options["block_index"] == 1 else 1.0
    return {"q": q, "k": k * factor, "v": v, "pe": pe, "attn_mask": attn_mask}


class Perturbation:
    """A block whose output another pack's wrapper damps, while it is told to. `told` finds that out."""

    def __init__(self, told):
        self.told = told

    def install(self, model):
        for kind, index in BLOCKS:
            model.set_model_patch_replace(self.around, "dit", kind, index)

    def around(self, args, extra):
        before = args["img"].clone()
        out = extra["original_block"](args)
        return {**out, "img": torch.lerp(before, out["img"], 0.3)} if self.told(args["transformer_options"]) else out


def by_patch(_model):
    return lambda options: with_option(options, "patches", {"attn1_patch": [damped_keys]})


def by_override(_model):
    return lambda options: with_option(options, "optimized_attention_override", damped_attention)


def by_flag(model):
    Perturbation(lambda options: options.get("perturbed", False)).install(model)
    return lambda options: with_option(options, "perturbed", True)


def by_number(model):
    """As by_flag; but the flag is a number, such as steps are counted by, and there in the plain call too."""
    model.model_options["transformer_options"]["scale"] = 0.0
    Perturbation(lambda options: options["scale"] > 0).install(model)
    return lambda options: with_option(options, "scale", 1.0)


def by_nothing_visible(model):
    """Nothing in the options differs: what is installed is told otherwise."""
    switch = []
    Perturbation(lambda _options: switch).install(model)

    class Switched(dict):
        def __enter__(self):
            switch.append(True)

        def __exit__(self, *_):
            switch.clear()

    return Switched


def with_option(options, name, value):
    return {**options, "transformer_options": {**options["transformer_options"], name: value}}


WAYS = [by_patch, by_override, by_flag, by_number, by_nothing_visible]


def guided(model, way, active=lambda sigma: True, first=False):
    """Guidance away from a perturbed second call in a step: after the plain one, or first."""
    model = model.clone()
    perturb = way(model)

    def call(given, cond):
        changed = perturb(given)
        if hasattr(changed, "__enter__"):
            with changed:
                return cond(given)
        return cond(changed)

    def after(args):
        if not active(float(args["sigma"][0])):
            return args["denoised"]
        sampled = functools.partial(comfy.samplers.calc_cond_batch, args["model"], [args["cond"]], args["input"])
        (worse,) = call(args["model_options"], lambda options: sampled(args["sigma"], options))
        return args["denoised"] + SCALE * (args["cond_denoised"] - worse)

    def instead(args):
        sampled = functools.partial(comfy.samplers.calc_cond_batch, args["model"], args["conds"], args["input"])
        if not active(float(args["sigma"][0])):
            return sampled(args["sigma"], args["model_options"])
        worse = call(args["model_options"], lambda options: sampled(args["sigma"], options))
        better = sampled(args["sigma"], args["model_options"])
        return [good + SCALE * (good - bad) for good, bad in zip(better, worse)]

    if first:
        model.model_options["sampler_calc_cond_batch_function"] = instead
    else:
        model.set_model_sampler_post_cfg_function(after)
    return model


@functools.cache
def plain(model, threshold=None):
    return run(model, threshold)


@functools.cache
def effect_of(model, way):
    return run(guided(model, way)) - plain(model)


@pytest.mark.parametrize("threshold", THRESHOLDS)
@pytest.mark.parametrize("way", WAYS)
def test_guidance_by_a_second_call_has_its_effect(demo_model, way, threshold):
    effect = effect_of(demo_model, way)
    if not effect.any():
        pytest.skip("the blocks of this ComfyUI (0.16) take no attn1 patches")
    alone = plain(demo_model, threshold)
    error = relative_error(run(guided(demo_model, way), threshold) - alone, effect)
    print(f"error of the effect {error:.3f}, {sum(decisions())} of {len(decisions())} reused")
    assert error < {1e-9: 1e-6, 0.06: 0.1, 0.2: 0.5}[threshold]
    assert any(decisions()) == (threshold > 1e-9)


@pytest.mark.parametrize("first", [False, True], ids=["after", "before"])
@pytest.mark.parametrize("way", [by_flag, by_nothing_visible])
def test_guidance_in_a_part_of_the_steps(demo_model, way, first):
    """It begins and ends in the middle: streams end and begin, none goes on as another."""
    middle = guided(demo_model, way, lambda sigma: 0.5 < sigma < 0.93, first)
    effect, alone = run(middle) - plain(demo_model), plain(demo_model, 0.06)
    error = relative_error(run(middle, 0.06) - alone, effect)
    print(f"error of the effect {error:.3f}, {sum(decisions())} of {len(decisions())} reused")
    assert error < 0.15 and any(decisions())


def tiled(model, parts, order=lambda step: range(4)):
    """A model whose calls are made part by part, as tiling packs and those that save memory make them."""
    model, count = model.clone(), [0]

    def around(call, given):
        x, timestep = given["input"], given["timestep"]
        out, slices = torch.zeros_like(x), parts(x)
        for index in order(count[0]):
            here = slices[index]
            batch = x[here].shape[0]
            context = {
                name: value[:batch] if isinstance(value, torch.Tensor) and value.shape[0] == x.shape[0] else value
                for name, value in given["c"].items()
            }
            out[here] = call(x[here].clone(), timestep[:batch], **context)
        count[0] += 1
        return out

    model.set_model_unet_function_wrapper(around)
    return model


def quarters(x):
    h, w = (length // 2 for length in x.shape[-2:])
    return [(..., slice(i, i + h), slice(j, j + w)) for i in (0, h) for j in (0, w)]


def samples(x):
    return [slice(i, i + 1) for i in range(x.shape[0])]


def quality(model, threshold, **arguments):
    value = psnr(*(frames(run(model, each, **arguments), model) for each in (threshold, None)))
    print(f"{value:.1f} dB, {sum(decisions())} of {len(decisions())} reused")
    return value


@pytest.mark.parametrize("turning", [False, True], ids=["in one order", "in changing order"])
def test_tiles_are_predicted_from_themselves(demo_model, turning):
    arguments = dict(shape=(1, 16, 3, 24, 24), steps=16)
    whole = quality(demo_model, THRESHOLD, **arguments)
    order = (lambda step: [(step + i) % 4 for i in range(4)]) if turning else (lambda step: range(4))
    value = quality(tiled(demo_model, quarters, order), THRESHOLD, **arguments)
    assert value > whole - 3
    assert sum(decisions()) > 0.5 * len(decisions())


def test_samples_of_a_batch_in_turn_are_predicted_from_themselves(demo_model):
    arguments = dict(shape=(4, 16, 3, 12, 12), steps=16)
    whole = quality(demo_model, THRESHOLD, **arguments)
    split = quality(tiled(demo_model, samples), THRESHOLD, **arguments)
    assert split > whole - 3
    assert sum(decisions()) > 0.5 * len(decisions())


def test_tiles_that_a_sampler_makes_one_evaluation_each(demo_model):
    """As of samplers that step one tile after another: one call an evaluation, several evaluations at one sigma."""

    def euler_in_tiles(model, x, sigmas, extra_args=None, callback=None, disable=None):
        ones = x.new_ones([x.shape[0]])
        for now, after in itertools.pairwise(sigmas):
            new = torch.empty_like(x)
            for here in quarters(x):
                part = x[here]
                new[here] = part + (part - model(part, now * ones, **extra_args)) / now * (after - now)
            x = new
        return x

    value = psnr(*(frames(sampled_by(demo_model, euler_in_tiles, each), demo_model) for each in (None, THRESHOLD)))
    assert any(decisions())
    print(f"{value:.1f} dB, {sum(decisions())} of {len(decisions())} reused")
    assert value > quality(demo_model, THRESHOLD, shape=(1, 16, 3, 24, 24), steps=16) - 3


def sampled_by(model, function, threshold, shape=(1, 16, 3, 24, 24), steps=16):
    import comfy.sample
    from skein.demo.sampling import conditioning

    model = model if threshold is None else engine.edit(model, cache=CacheConfig(threshold=threshold))
    latent = torch.zeros(shape)
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", steps)
    return comfy.sample.sample_custom(
        model, comfy.sample.prepare_noise(latent, 1), 1.0, comfy.samplers.KSAMPLER(function), sigmas,
        conditioning(PROMPT), conditioning(""), latent, disable_pbar=True, seed=1,
    )  # fmt: skip


@pytest.mark.parametrize("ends", ["from the second half on", "never"])
def test_a_last_block_that_is_left_out_only_later_is_not_missed(demo_model, ends):
    """Another pack has replaced all blocks, and later leaves out the last one, where a hit would be put in."""
    model = demo_model.clone()
    network = model.model.diffusion_model
    counts = {"double_block": len(network.double_blocks), "single_block": len(network.single_blocks)}
    last = ("single_block", counts["single_block"] - 1)

    def around(key):
        def run_block(args, extra):
            left_out = key == last and ends != "never" and float(args["transformer_options"]["sigmas"][0]) < 0.7
            return {"img": args["img"]} if left_out else extra["original_block"](args)

        return run_block

    for kind, count in counts.items():
        for index in range(count):
            model.set_model_patch_replace(around((kind, index)), "dit", kind, index)
    stock, cached = run(model), run(model, 0.15)
    reused = sum(decisions())
    print(f"{ends}: {reused} reused, error {relative_error(cached, stock):.3f}")
    assert reused > 0 and relative_error(cached, stock) < 0.1
