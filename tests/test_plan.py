"""Bad settings are refused with a sentence that says what to do; plans travel."""

import pickle

import pytest
from skein.plan import AttentionConfig, CacheConfig, CompileConfig, FP8Config, Plan, SlicesConfig


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (dict(threshold=-0.1), "between 0 and 1"),
        (dict(threshold=1.5), "between 0 and 1"),
        (dict(threshold=-0.995), "-1 for the model's default"),
        (dict(threshold=float("nan")), "between 0 and 1"),
        (dict(start_percent=-0.1), "between 0 and 1"),
        (dict(end_percent=1.1), "between 0 and 1"),
        (dict(start_percent=0.6, end_percent=0.5), "swap"),
        (dict(warmup_calls=-1), "0 or more"),
        (dict(max_consecutive_hits=-2), "no limit"),
        (dict(order=3), "0, 1 or 2"),
    ],
)
def test_settings_out_of_range_are_refused(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        CacheConfig(**settings)


def test_a_plan_survives_pickling_and_ignores_which_node_made_it():
    plan = Plan(cache=CacheConfig(threshold=0.1, node_id="7"))
    assert pickle.loads(pickle.dumps(plan)) == plan
    assert plan == Plan(cache=CacheConfig(threshold=0.1, node_id="8"))
    assert plan != Plan()


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: FP8Config(mode="int8"), "per_row, per_tensor, weight_only"),
        (lambda: AttentionConfig(kernel="flash9"), "flash3"),
        (lambda: AttentionConfig(exact_steps=-1), "0 or more"),
        (lambda: CompileConfig(mode="fast"), "max-autotune"),
        (lambda: CompileConfig(dynamic="maybe"), "auto"),
        (lambda: SlicesConfig(0), "1 or more"),
    ],
)
def test_unknown_choices_are_refused_with_those_that_there_are(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()


def test_modulation_is_part_of_the_plan():
    assert FP8Config(modulation=False) != FP8Config(modulation=True)


def test_a_threshold_of_zero_asks_for_no_cache():
    plan = Plan(cache=CacheConfig(threshold=0.0), attention=AttentionConfig())
    assert plan.techniques == ["attention"] and Plan(cache=CacheConfig()).techniques == ["cache"]
