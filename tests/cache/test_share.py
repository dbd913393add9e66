"""The threshold that follows a share of calls: on calls whose changes are known, and in ComfyUI's samplers."""

import random

import pytest
from skein import engine
from skein.cache.share import LARGEST, ShareController, Steps
from skein.demo.sampling import sample
from skein.plan import CacheConfig
from skein.report import recent_runs

SHARES = (0.2, 1 / 3, 0.5, 2 / 3, 0.8)
SHAPE = (1, 16, 3, 12, 12)


def follow(share, changes, steps, a_step=1):
    """Which calls with these changes are reused. a_step: calls in each step."""
    controller = ShareController(share, points=3)
    decisions = []
    for index, change in enumerate(changes):
        limit = controller.next(index // a_step, steps)
        assert 0 <= limit <= LARGEST
        decisions.append(change is not None and change < limit)
        controller.reused += decisions[-1]
    return decisions


def some_changes(count, kind, scale):
    """Of `count` calls; the first has nothing to compare with."""
    known = random.Random(f"{kind}{scale}")
    shape = {
        "flat": lambda i: 1.0,
        "rising": lambda i: 0.2 + 2 * i / count,
        "falling": lambda i: 2.2 - 2 * i / count,
        "scattered": lambda i: known.lognormvariate(0, 1),
    }[kind]
    return [None, *(min(scale * shape(i), 0.95) for i in range(1, count))]


@pytest.mark.parametrize("scale", [0.001, 0.05, 0.4])
@pytest.mark.parametrize("kind", ["flat", "rising", "falling", "scattered"])
@pytest.mark.parametrize("count", [8, 12, 20, 50])
def test_the_share_is_reached_whatever_the_changes_are(count, kind, scale):
    for share in SHARES:
        decisions = follow(share, some_changes(count, kind, scale), Steps([1 - i / count for i in range(count)]))
        assert sum(decisions) == round(share * count)


def test_what_changes_least_is_reused():
    """Of calls that change much and little in turn, at a level that the controller has to find."""
    changes = [None, *(0.3 if i % 2 else 0.1 for i in range(49))]
    decisions = follow(0.5, changes, Steps([1 - i / 50 for i in range(50)]))
    little = [change for change, reused in zip(changes, decisions) if reused]
    assert sum(change == 0.1 for change in little) > 20


def test_with_two_calls_a_step_too():
    for count, share in ((12, 0.5), (20, 1 / 3), (50, 2 / 3)):
        changes = some_changes(2 * count - 1, "scattered", 0.05)  # heun's last step has one
        decisions = follow(share, changes, Steps([1 - i / count for i in range(count)]), a_step=2)
        assert abs(sum(decisions) - share * len(changes)) <= 1.5


def test_steps_that_are_always_computed_are_made_up_for():
    """As far as the others go."""
    steps = Steps([1 - i / 20 for i in range(20)], start_sigma=0.81, end_sigma=0.39)
    for share, wanted in ((0.25, 5), (0.5, 9)):
        allowed = [steps.start_sigma >= sigma >= steps.end_sigma for sigma in steps.sigmas]
        changes = [0.05 if each else None for each in allowed]
        assert sum(allowed) == 9 and sum(follow(share, changes, steps)) == wanted


@pytest.mark.parametrize("share", [-0.1, 0.95, float("nan")])
def test_a_share_that_cannot_be_is_refused(share):
    with pytest.raises(ValueError, match=f"reuse_share must lie between 0 and 0.9, not {share}; 0.5 reuses half"):
        CacheConfig(reuse_share=share)


@pytest.mark.parametrize("cfg", [1.0, 3.0])
@pytest.mark.parametrize("sampler", ["euler", "heun", "dpmpp_2m"])
@pytest.mark.parametrize("steps", [12, 20])
def test_a_run_reuses_the_share_that_was_asked_for(demo_model, steps, sampler, cfg):
    for share in (1 / 3, 0.6):
        model = engine.edit(demo_model, cache=CacheConfig(reuse_share=share))
        sample(model, "a red circle moves left", steps=steps, sampler=sampler, cfg=cfg, shape=SHAPE)
        run = recent_runs()[-1]
        assert run.share == share and abs(run.reused / len(run.calls) - share) <= 0.05
        assert f"{run.reused} reused ({share:.0%} asked for)" in run.summary()
        thresholds = {call.threshold for call in run.calls}
        assert len(thresholds) > 3 and all(call.reused <= (call.threshold > 0) for call in run.calls)


def test_without_a_schedule_the_threshold_stays(demo_model):
    """Of a sampler that does not tell it."""

    def hide(call, given):
        given["c"]["transformer_options"] = {
            key: value for key, value in given["c"]["transformer_options"].items() if key != "sample_sigmas"
        }
        return call(given["input"], given["timestep"], **given["c"])

    model = engine.edit(demo_model, cache=CacheConfig(threshold=0.07, reuse_share=0.5))
    model.set_model_unet_function_wrapper(hide)
    sample(model, "a red circle moves left", steps=8, shape=SHAPE)
    assert {call.threshold for call in recent_runs()[-1].calls} == {0.07}


def test_a_threshold_of_zero_is_off_with_a_share_too(demo_model):
    plan = engine.plan_of(engine.edit(demo_model, cache=CacheConfig(threshold=0, reuse_share=0.5)))
    assert plan.techniques == []
