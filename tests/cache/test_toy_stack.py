"""The cache on a stack whose blocks do plain arithmetic, so that every decision and prediction is a known number.

The first block adds `first`, each of the two others doubles. From x = 1 a computed call gives (1 + first) * 4;
a reused call gives 1 + first + residual, with the residual of a computed call being (1 + first) * 3.
"""

import pytest
import torch
from skein.cache import CacheHook, FirstBlockCache
from skein.cache.prediction import combine, fitted_weights
from skein.cache.streams import EVALUATION_KEY, Streams
from skein.models import ModelCall, Network
from skein.plan import CacheConfig
from skein.runs import Run
from skein.stopwatch import Stopwatch
from torch import nn


class HunyuanVideo(nn.Module):
    """For the names of its blocks, which are all that is asked of it here."""

    __module__ = "comfy.ldm.hunyuan_video.model"

    def __init__(self):
        super().__init__()
        self.double_blocks = nn.ModuleList(nn.Identity() for _ in range(2))
        self.single_blocks = nn.ModuleList(nn.Identity() for _ in range(1))


NETWORK = Network(HunyuanVideo())
TEXT = 2  # text tokens in front of the image tokens in the last, single-stream block


class ToyModel:
    """Block 0 and 1 are double blocks, block 2 is a single block; all change their input in place, as ComfyUI's do."""

    def __init__(self, hook):
        self.hook = hook
        self.ran = 0
        self.evaluations = 0

    def __call__(self, first, sigma, batch=1, uuids=("a",), options=None, again=False, seed=0):
        """`first` is what the first block adds; returns the image tokens after the last block.

        again: in the evaluation of the call before. seed: of the latent, which the blocks do not see.
        """
        self.evaluations += not again
        known = {"sigmas": torch.tensor([sigma]), "uuids": list(uuids), EVALUATION_KEY: self.evaluations}
        options = known | (options or {})
        latent = torch.randn(1, 2, 6, 6, generator=torch.Generator().manual_seed(seed)).repeat(batch, 1, 1, 1)

        def forward(call):
            def add(values):
                values["img"] += torch.as_tensor(first)
                return values

            def double(values):
                self.ran += 1
                values["x" if "x" in values else "img"].mul_(2)
                return values

            def run(block, values, own):
                call.enter(block, values)
                return self.hook.around_block(call, block, values, own)

            blocks = call.network.blocks
            out = run(blocks[0], {"img": torch.ones(batch, 4, 3), "txt": torch.zeros(batch, TEXT, 3)}, add)
            out = run(blocks[1], out, double)
            joined = torch.cat([out["txt"], out["img"]], dim=1)
            return run(blocks[2], {"x": joined}, double)["x"][:, TEXT:]

        return self.hook.around_model(ModelCall(NETWORK, {"x": latent, "transformer_options": options}), forward)


def toy(**settings):
    hook = CacheHook(FirstBlockCache(CacheConfig(**settings)), Run(), Stopwatch(torch.device("cpu")))
    return ToyModel(hook), hook.run


def value(tensor):
    assert (tensor == tensor.flatten()[0]).all()
    return float(tensor.flatten()[0])


def decisions(run):
    return "".join("r" if call.reused else "c" for call in run.calls)


def test_order_0_is_plain_reuse_against_the_last_computed_call():
    model, run = toy(threshold=0.06, order=0)
    assert value(model(1.00, 1.0)) == 8.0  # computed: (1 + 1) * 4
    assert value(model(1.05, 0.9)) == pytest.approx(2.05 + 6.0)  # reused: residual of the first call is 6
    assert value(model(1.05, 0.8)) == pytest.approx(2.05 + 6.0)  # still 5 % from the *computed* call: reused
    assert value(model(1.10, 0.7)) == pytest.approx(8.4)  # 10 %: computed
    assert value(model(1.15, 0.6)) == pytest.approx(2.15 + 6.3)  # 4.5 % from the new one: reused
    assert decisions(run) == "crrcr"
    assert [call.change for call in run.calls] == [
        None,
        *(pytest.approx(c, rel=1e-4) for c in (0.05, 0.05, 0.10, 0.05 / 1.1)),
    ]
    assert model.ran == 2 * 2  # two blocks in each of two computed calls


def test_order_1_taylor_extends_the_line_over_sigma():
    model, run = toy(threshold=0.05, order=1, predictor="taylor")
    model(1.0, 1.0)  # residual 6.0
    model(1.2, 0.9)  # residual 6.6; its signature is 20 % from the first: computed
    assert value(model(1.4, 0.8)) == pytest.approx(2.4 + 7.2)  # on the line: signature and residual are exact
    assert value(model(1.8, 0.6)) == pytest.approx(2.8 + 8.4)
    assert value(model(1.5, 0.5)) == pytest.approx(10.0)  # off the line (2.0 expected): computed
    assert decisions(run) == "ccrrc"
    assert run.calls[-1].change == pytest.approx(0.5 / 2.0, rel=1e-4)


def test_order_2_taylor_extends_the_parabola_over_sigma():
    model, run = toy(threshold=0.05, order=2, predictor="taylor")
    for step, sigma in enumerate((1.0, 0.9, 0.8)):
        model(1.0 + step**2, sigma)  # 1, 2, 5: far apart, all computed
    assert value(model(10.0, 0.7)) == pytest.approx(11.0 + 33.0, rel=1e-4)  # 1 + 3^2, on the parabola
    assert decisions(run) == "cccr"


@pytest.mark.parametrize("order", [1, 2])
def test_fitted_prediction_follows_the_signature_not_sigma(order):
    """The signature moves along a known direction at an uneven pace: sigma misleads, the fit does not."""
    model, run = toy(threshold=0.02, order=order, predictor="fit")
    model(1.0, 1.0)
    model(1.5, 0.9)
    assert value(model(2.5, 0.85)) == pytest.approx(3.5 + 10.5, rel=0.02)
    assert value(model(1.2, 0.3)) == pytest.approx(2.2 + 6.6, rel=0.02)
    assert decisions(run) == "ccrr"


def test_a_signature_in_a_new_direction_is_computed_however_small_the_step():
    model, run = toy(threshold=0.02, order=1, predictor="fit")
    model(torch.tensor([1.0, 1.0, 1.0]), 1.0)
    model(torch.tensor([1.5, 1.5, 1.5]), 0.9)
    model(torch.tensor([1.5, 1.5, 1.8]), 0.8)
    assert decisions(run) == "ccc"


def test_accumulate_sums_the_changes_since_the_last_computed_call():
    model, run = toy(threshold=0.06, order=0, accumulate=True)
    for index, first in enumerate((1.00, 1.04, 1.00, 1.04)):
        model(first, 1.0 - index / 10)
    assert decisions(run) == "crcr"  # 4 %, then 4 % + 3.8 %: computed, although back at the start
    assert run.calls[2].change == pytest.approx(0.04 + 0.04 / 1.04, rel=1e-4)


def test_warm_up_limit_and_range_keep_calls_from_being_reused():
    model, run = toy(threshold=0.5, order=0, warmup_calls=3)
    for _ in range(5):
        model(1.0, 1.0)
    assert decisions(run) == "cccrr"
    model, run = toy(threshold=0.5, order=0, max_consecutive_hits=1)
    for _ in range(6):
        model(1.0, 1.0)
    assert decisions(run) == "crcrcr"
    hook = CacheHook(
        FirstBlockCache(CacheConfig(threshold=0.5, order=0), 0.85, 0.35), Run(), Stopwatch(torch.device("cpu"))
    )
    model = ToyModel(hook)
    for sigma in (1.0, 0.9, 0.8, 0.6, 0.4, 0.2):
        model(1.0, sigma)
    assert decisions(hook.run) == "ccrrrc"


def test_conditions_are_apart_whether_batched_or_in_turn():
    """cond at 1.0, uncond at 3.0: compared with each other they would never be reused."""
    both = torch.tensor([1.0, 3.0]).reshape(2, 1, 1)
    model, run = toy(threshold=0.06, order=0)
    model(both, 1.0, batch=2, uuids="ab")
    out = model(both, 0.9, batch=2, uuids="ab")
    assert out[0].unique() == 2 + 6 and out[1].unique() == 4 + 12
    assert value(model(3.0, 0.8, uuids="b")) == 4 + 12  # now one after another, in another order
    assert value(model(1.0, 0.8, uuids="a")) == 2 + 6
    assert decisions(run) == "crrr"


def test_one_changed_sample_makes_the_whole_batch_compute():
    model, run = toy(threshold=0.06, order=0)
    model(torch.tensor([1.0, 1.0]).reshape(2, 1, 1), 1.0, batch=2)
    model(torch.tensor([1.0, 1.2]).reshape(2, 1, 1), 0.9, batch=2)
    assert decisions(run) == "cc"


def test_calls_of_one_evaluation_are_streams_of_their_own():
    """Nothing but their order tells them apart: alike in the first block, not alike in the others."""
    model, run = toy(threshold=0.06, order=0)
    model(1.0, 1.0)
    model(1.0, 0.95)
    assert value(model(1.0, 0.95, again=True)) == 8.0  # guidance begins
    for sigma in (0.9, 0.8):
        model(1.0, sigma)
        model(1.0, sigma, again=True)
    model(1.0, 0.7)  # guidance has ended
    model(1.0, 0.6)
    model(1.0, 0.6, again=True)  # and begins again
    assert decisions(run) == "c" + "rc" + "cc" + "rr" + "r" + "cc"
    assert [call.parts for call in run.calls] == [[i] for i in (0, 0, 1, 2, 3, 2, 3, 2, 4, 5)]


def test_without_a_count_of_evaluations_calls_at_one_sigma_are_one():
    model, run = toy(threshold=0.06, order=0)
    for sigma in (1.0, 0.9, 0.8):
        model(1.0, sigma, options={EVALUATION_KEY: 0})
        model(1.0, sigma, options={EVALUATION_KEY: 0})
    assert decisions(run) == "ccrrrr"


@pytest.mark.parametrize(
    "options",
    [
        {"patches": {"attn1_patch": [sum]}},
        {"patches": {"attn1_patch": [len, sum]}},
        {"optimized_attention_override": value},
        {"skip": True},
        {"skipped": [7, 8]},
        {"patches_replace": {"dit": {("double_block", 1): decisions}}},
    ],
    ids=str,
)
def test_what_a_call_is_told_tells_it_apart(options):
    """Whatever their order, also with one of them left out."""
    model, run = toy(threshold=0.06, order=0)
    plain = {"patches": {"attn1_patch": [len]}, "skip": False, "skipped": [7]}
    model(1.0, 1.0, options=plain)
    model(1.0, 1.0, options=plain | options, again=True)
    model(1.0, 0.9, options=plain | options)
    model(1.0, 0.9, options=plain, again=True)
    model(1.0, 0.8, options=plain | options)
    assert decisions(run) == "ccrrr"
    assert [call.parts for call in run.calls] == [[0], [1], [1], [0], [1]]


def test_what_packs_make_anew_for_each_call_or_count_does_not():
    model, run = toy(threshold=0.06, order=0)
    for step, sigma in enumerate((1.0, 0.9, 0.8)):
        fresh = {"step": step, "percent": step / 3, "patches": {"attn1_patch": [lambda q, step=step: step]}}
        model(1.0, sigma, options={**fresh, "holder": ToyModel(None)})
    assert decisions(run) == "crr"


def test_inputs_that_are_not_alike_are_streams_of_their_own_in_any_order():
    """Two tiles, an evaluation each: in turn, in the other order, and with fresh noise in one."""
    model, run = toy(threshold=0.06, order=0)
    model(1.0, 1.0, seed=1)
    model(2.0, 1.0, seed=2)
    assert value(model(2.0, 0.9, seed=2)) == 3 + 9
    assert value(model(1.0, 0.9, seed=1)) == 2 + 6
    model(1.0, 0.8, seed=3)
    assert decisions(run) == "ccrrc"


def test_streams_that_the_last_step_had_not_are_dropped():
    model, run = toy(threshold=0.06, order=0)
    for sigma, uuids in ((1.0, "ab"), (0.9, "a"), (0.8, "a"), (0.7, "ab")):
        for index, uuid in enumerate(uuids):
            model(1.0, sigma, uuids=uuid, again=index > 0)
    assert decisions(run) == "ccrrrc"
    assert len(model.hook.cache._states) == 2
    model(1.0, 0.6, uuids="c")
    model(1.0, 0.5, uuids="c")
    assert len(model.hook.cache._states) == 1


def test_a_part_of_a_batch_that_another_pack_has_split_is_one_chunk():
    model, run = toy(threshold=0.06, order=0)
    for sigma in (1.0, 0.9):
        for again, first in ((False, 1.0), (True, 3.0)):  # a batch of cond and uncond, one sample at a time
            model(first, sigma, uuids="ab", again=again)
    assert decisions(run) == "ccrr"


def test_a_conditioning_that_comes_to_another_device_is_computed():
    """As ComfyUI's MultiGPU deals them out anew in each step. Nothing of one device is compared with the other's."""
    latent = torch.randn(1, 2, 6, 6)
    streams = Streams(forget=lambda number: None, total=lambda value: value)
    first = streams.find({EVALUATION_KEY: 1}, latent, 1.0)
    other = streams.find({EVALUATION_KEY: 2}, latent.to("meta"), 0.9)
    assert streams.find({EVALUATION_KEY: 2}, latent, 0.9) == first != other


def test_nothing_is_kept_past_the_end_of_the_range():
    cache = FirstBlockCache(CacheConfig(threshold=0.5, order=1), end_sigma=0.75)
    model = ToyModel(CacheHook(cache, Run(), Stopwatch(torch.device("cpu"))))
    kept = []
    for sigma in (1.0, 0.9, 0.8, 0.7, 0.6):
        assert value(model(1.0, sigma)) == 8.0
        kept.append(sum(len(state.points) for state in cache._states.values()))
    assert kept == [1, 1, 1, 0, 0] and decisions(model.hook.run) == "crrcc"
    assert [call.admitted for call in model.hook.run.calls] == [True] * 3 + [False] * 2


class Window:
    def __init__(self, frames):
        self.index_list = frames


def test_context_windows_of_one_conditioning_have_states_of_their_own():
    model, run = toy(threshold=0.06, order=0)
    first, second = ({"context_window": Window(frames)} for frames in ([0, 1], [2, 3]))
    model(1.0, 1.0, options=first)
    model(2.0, 1.0, options=second)
    assert value(model(1.0, 0.9, options=first)) == 2 + 6
    assert value(model(2.0, 0.9, options=second)) == 3 + 9
    assert decisions(run) == "ccrr"


def test_values_that_are_not_finite_are_never_reused():
    model, run = toy(threshold=1.0, order=0)
    for first in (1.0, float("nan"), float("inf")):
        model(first, 1.0)
    assert decisions(run) == "ccc"


def test_the_same_sigma_twice_replaces_the_point_instead_of_dividing_by_zero():
    model, run = toy(threshold=0.01, order=1, predictor="taylor")
    model(1.0, 1.0)
    model(1.2, 0.9)
    model(1.3, 0.9)  # a two-call sampler's second look at this sigma
    assert value(model(1.6, 0.8)) == pytest.approx(2.6 + 7.8)  # the line through 1.0 and 1.3
    assert decisions(run) == "cccr"


class WithoutFloat64(torch.Tensor):
    """Of a device that has no float64, as Apple's; what has come to the CPU is a tensor like any other."""

    def double(self):
        raise TypeError("Cannot convert a MPS Tensor to float64 dtype")

    def cpu(self):
        return self.as_subclass(torch.Tensor)


def test_weights_are_fitted_on_devices_without_float64():
    known = [torch.randn(1, 4, 3) for _ in range(3)]
    new = 0.5 * known[0] + 0.5 * known[2]
    there = [each.as_subclass(WithoutFloat64) for each in known]
    expected = fitted_weights(known, new, lambda sums: sums)
    assert torch.equal(fitted_weights(there, new.as_subclass(WithoutFloat64), lambda sums: sums), expected)


def test_weights_are_not_rounded_to_the_type_of_what_they_weigh():
    """Weights that sum to 1, of residuals that are nearly alike: rounded ones would scale the whole."""
    alike = torch.randn(2, 5000, 8)
    values = [(alike + 0.05 * torch.randn_like(alike)).bfloat16() for _ in range(3)]
    weights = torch.tensor([[0.2337, 0.3], [-1.1171, -1.0], [1.8834, 1.7]])
    exact = sum(value.double() * weight.double()[:, None, None] for value, weight in zip(values, weights))
    found = combine(values, weights)
    error = float((found.double() - exact).norm() / exact.norm())
    print(f"error of the sum {error:.4f}")
    assert found.dtype == torch.bfloat16 and error < 0.0018
