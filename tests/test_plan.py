"""Bad settings are refused with a sentence that says what to do; plans travel."""

import pickle

import pytest
from skein.plan import CacheConfig, FP8Config, Plan


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (dict(threshold=-0.1), "between 0 and 1"),
        (dict(threshold=1.5), "between 0 and 1"),
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


def test_an_unknown_fp8_mode_is_refused_and_modulation_is_part_of_the_plan():
    with pytest.raises(ValueError, match="per_row, per_tensor, weight_only"):
        FP8Config(mode="int8")
    assert FP8Config(modulation=False) != FP8Config(modulation=True)
