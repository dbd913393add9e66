"""Plan and engine on real ComfyUI models: what must be bit-equal is, and every apply has its undo."""

import sys
import tempfile
from pathlib import Path

import comfy.sd
import pytest
import torch
from comfy.patcher_extension import WrappersMP
from skein import engine
from skein.demo.sampling import conditioning, sample
from skein.plan import AttentionConfig, CacheConfig, CompileConfig, FP8Config, ParallelConfig, Plan
from skein.report import recent_runs
from small_models import random_hunyuan_video, save_random_hunyuan3d

SMALL = dict(shape=(1, 16, 3, 8, 8), steps=6)
REUSING = CacheConfig(threshold=0.9)  # on random weights: the second call is computed, most later ones are not


def cached(model, config=REUSING):
    return engine.edit(model, cache=config)


class Stop(Exception):
    pass


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpmpp_2m"])
@pytest.mark.parametrize("cfg", [1.0, 4.0])
def test_threshold_zero_and_empty_plan_are_bit_equal_to_stock(tiny_model, sampler, cfg):
    arguments = dict(SMALL, sampler=sampler, cfg=cfg)
    stock = sample(tiny_model, "a red circle", **arguments)
    assert torch.equal(sample(engine.edit(tiny_model), "a red circle", **arguments), stock)
    off = cached(tiny_model, CacheConfig(threshold=0))
    assert torch.equal(sample(off, "a red circle", **arguments), stock)
    # The comparison can fail: with the cache on the result differs, and calls are reused.
    assert not torch.equal(sample(cached(tiny_model), "a red circle", **arguments), stock)
    assert recent_runs()[-1].reused > 0


def test_a_plan_is_edited_on_a_clone_and_the_last_node_wins(tiny_model):
    first = engine.edit(tiny_model, cache=CacheConfig(threshold=0.1))
    second = engine.edit(first, cache=CacheConfig(threshold=0.2))
    assert engine.plan_of(tiny_model) == Plan()
    assert engine.plan_of(first).cache.threshold == 0.1
    assert engine.plan_of(second).cache.threshold == 0.2
    assert len(second.wrappers[WrappersMP.OUTER_SAMPLE]["skein"]) == 1
    assert engine.plan_of(second.clone()) == engine.plan_of(second)


def without_set_stance(patch):
    patch.delattr(torch.compiler, "set_stance")


def without_torchao(patch):
    patch.setitem(sys.modules, "torchao.quantization", None)


@pytest.mark.parametrize(
    ("changes", "lacking", "sentence"),
    [
        ({"parallel": ParallelConfig("all")}, None, "ComfyUI found no GPU"),
        ({"parallel": ParallelConfig("6,7")}, None, "There is no GPU 6, 7 here"),
        ({"parallel": ParallelConfig("cpu,cpu,cpu", ulysses_degree=3)}, None, "has 2 heads"),
        ({"fp8": FP8Config()}, without_torchao, "torchao"),
        ({"compile": CompileConfig()}, without_set_stance, "need PyTorch 2.6 or newer"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="where there is a GPU, these devices may be there")
def test_what_cannot_run_here_is_refused_by_the_node(tiny_model, monkeypatch, changes, lacking, sentence):
    if lacking:
        lacking(monkeypatch)
    with pytest.raises(ValueError, match=sentence):
        engine.edit(tiny_model, **changes)


ONE_OF_EACH = {
    "cache": CacheConfig(),
    "attention": AttentionConfig(),
    "fp8": FP8Config(),
    "compile": CompileConfig(),
    "parallel": ParallelConfig("cpu,cpu"),
}


@pytest.mark.parametrize("technique", ONE_OF_EACH)
def test_a_model_of_another_architecture_is_refused_by_the_node(technique):
    with tempfile.TemporaryDirectory() as folder:
        save_random_hunyuan3d(Path(folder) / "shape.safetensors")
        model = comfy.sd.load_diffusion_model(str(Path(folder) / "shape.safetensors"))
    with pytest.raises(ValueError, match="does not know the blocks of Hunyuan3Dv2"):
        engine.edit(model, **{technique: ONE_OF_EACH[technique]})


def test_a_cache_that_is_off_asks_nothing_of_a_model(tmp_path):
    save_random_hunyuan3d(tmp_path / "shape.safetensors")
    model = comfy.sd.load_diffusion_model(str(tmp_path / "shape.safetensors"), model_options={"dtype": torch.float32})
    arguments = dict(positive=[[torch.randn(1, 7, 64), {}]], negative=[[torch.zeros(1, 7, 64), {}]], shape=(1, 64, 20))
    stock = sample(model, steps=2, **arguments)
    assert torch.equal(sample(engine.edit(model, cache=CacheConfig(threshold=0)), steps=2, **arguments), stock)


@pytest.mark.parametrize("technique", ["cache", "parallel"])
def test_a_model_of_one_block_is_refused_by_the_node(technique):
    model = random_hunyuan_video(depth=1, depth_single_blocks=0)
    with pytest.raises(ValueError, match=r"has 1 block\(s\)"):
        engine.edit(model, **{technique: ONE_OF_EACH[technique]})


def raising(error):
    def callback(step, x0, x, total):
        if step == 3:
            raise error

    return callback


@pytest.mark.parametrize("ending", ["normal", "exception", "interrupt"])
def test_the_next_stock_run_is_bit_equal_however_a_cached_run_ended(tiny_model, ending):
    import comfy.model_management

    before = sample(tiny_model, "a red circle", **SMALL)
    if ending == "normal":
        sample(cached(tiny_model), "a red circle", **SMALL)
    else:
        error = Stop() if ending == "exception" else comfy.model_management.InterruptProcessingException()
        with pytest.raises(type(error)):
            sample(cached(tiny_model), "a red circle", **SMALL, callback=raising(error))
    run = recent_runs()[-1]
    assert run.finished == (ending == "normal")
    assert run.reused > 0
    assert torch.equal(sample(tiny_model, "a red circle", **SMALL), before)
    assert tiny_model.model_options["transformer_options"] == {}


def test_two_cached_runs_are_equal_and_sizes_may_change_between_them(tiny_model):
    model = cached(tiny_model)
    first = sample(model, "a red circle", **SMALL)
    sample(model, "a small blue square moves up", shape=(2, 16, 2, 12, 10), steps=6)
    assert torch.equal(sample(model, "a red circle", **SMALL), first)


def test_the_samples_of_a_batch_are_cached_like_single_ones_when_they_are_alike(tiny_model):
    one = torch.zeros(1, 16, 3, 8, 8)
    single = sample(cached(tiny_model), "a red circle", latent=one, steps=6)
    decisions = [call.reused for call in recent_runs()[-1].calls]
    noise_of_batch = sample(cached(tiny_model), "a red circle", latent=one.repeat(2, 1, 1, 1, 1), steps=6)
    assert any(decisions) and noise_of_batch.shape[0] == 2
    assert torch.allclose(noise_of_batch[:1], single, atol=1e-5)


def test_two_call_samplers_are_counted_by_model_calls(tiny_model):
    sample(cached(tiny_model), "a red circle", **dict(SMALL, sampler="heun"))
    run = recent_runs()[-1]
    assert len(run.calls) == 2 * 6 - 1  # heun's last step makes one call
    assert run.computed + run.reused == 11 and all(call.ms > 0 for call in run.calls)


def test_cond_and_uncond_have_states_of_their_own(tiny_model):
    """Together in one batch or one after another, each condition is compared with itself only."""
    apart = sample(cached(tiny_model), "a red circle", "a blue square", **SMALL, cfg=3.0)
    calls = recent_runs()[-1].calls
    # The first call of each condition has nothing to compare with; a mix-up would give the second one a change.
    first_sigma = [call for call in calls if call.sigma == calls[0].sigma]
    assert all(call.change is None for call in first_sigma)
    assert torch.isfinite(apart).all()


VIDEO = (1, 16, 3, 8, 8)
HUNYUAN_KINDS = {  # what differs from the tests' random model, in the conditioning, and the shape of the latent
    "double_and_single": ({}, {}, VIDEO),
    "double_only": (dict(depth=4, depth_single_blocks=0), {}, VIDEO),
    "one_block_of_each": (dict(depth=1, depth_single_blocks=1), {}, VIDEO),
    "three_heads": (dict(hidden_size=384), {}, VIDEO),
    "token_replacement": ({}, {"guiding_frame_index": 0}, VIDEO),
    "reference_latent": ({}, {"ref_latent": torch.ones(1, 16, 1, 8, 8)}, VIDEO),
    "hunyuan_video_1.5": (
        dict(in_channels=65, out_channels=32, vec_in_dim=None, patch_size=[1, 1, 1], guidance_embed=False, byt5=True,
             use_cond_type_embedding=True, vision_in_dim=1152, meanflow_sum=True, depth=4, depth_single_blocks=0),
        {"conditioning_byt5small": torch.ones(1, 7, 1472)},
        (1, 32, 3, 8, 8),
    ),
    "hunyuan_image_2.1": (
        dict(in_channels=64, out_channels=64, vec_in_dim=None, patch_size=[1, 1], axes_dim=[64, 64],
             guidance_embed=False),
        {},
        (1, 64, 8, 8),
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", HUNYUAN_KINDS)
def test_every_shape_of_hunyuan_video(kind):
    """A threshold that nothing stays below leaves the output bit-equal; a wide one reuses calls and stays near it."""
    changes, extra, shape = HUNYUAN_KINDS[kind]
    model = random_hunyuan_video(**changes)
    arguments = dict(positive=conditioning("a red circle moves left", **extra), shape=shape, steps=6)
    stock = sample(model, **arguments)
    tight = sample(cached(model, CacheConfig(threshold=1e-9)), **arguments)
    assert torch.equal(tight, stock) and recent_runs()[-1].reused == 0
    loose = sample(cached(model), **arguments)
    assert recent_runs()[-1].reused > 0
    assert 0 < (loose - stock).norm() / stock.norm() < 0.5


def test_a_model_of_one_block_is_refused_with_a_sentence():
    with pytest.raises(ValueError, match="at least two"):
        sample(cached(random_hunyuan_video(depth=1, depth_single_blocks=0)), "a red circle", **SMALL)
