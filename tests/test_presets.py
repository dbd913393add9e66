"""The Speed Up node: what its presets choose, what they leave to other nodes, and what they leave out."""

import sys

import pytest
import torch
from comfy.patcher_extension import WrappersMP
from skein import engine, pace, presets
from skein.bench.errors import relative_error
from skein.demo.sampling import sample
from skein.estimate import Load, room_bytes
from skein.footprint import coming_bytes, expected_bytes
from skein.models import Network
from skein.plan import (
    AttentionConfig,
    CacheConfig,
    CompileConfig,
    FP8Config,
    ParallelConfig,
    Plan,
    PresetConfig,
    SlicesConfig,
    SparseConfig,
)
from skein.report import recent_runs
from small_models import random_hunyuan_video

SMALL = dict(shape=(1, 16, 3, 8, 8), steps=6)
TEXT = "a red circle"


def sped_up(model, preset="balanced", **settings):
    return engine.edit(model, preset=PresetConfig(preset, **settings))


class Guider:
    """What a plan is resolved for, as ComfyUI's guiders have it."""

    def __init__(self, patcher):
        self.model_patcher, self.model_options = patcher, patcher.model_options
        self.model_options.setdefault("transformer_options", {})


def chosen(model, latent=SMALL["shape"]):
    return presets.resolve(engine.plan_of(model), Guider(model), latent)


@pytest.fixture
def shown(monkeypatch):
    """What is shown on nodes, in order."""
    texts = []
    monkeypatch.setattr(pace, "show", lambda node, text, about="": texts.append((node, text)))
    return texts


@pytest.mark.parametrize(
    ("preset", "techniques"),
    [
        ("exact", {"attention"}),
        ("balanced", {"attention", "cache"}),
        ("fastest", {"attention", "cache", "sparse"}),
        ("low memory", {"attention", "cache", "fp8"}),
    ],
)
def test_what_the_presets_choose_on_a_cpu(tiny_model, preset, techniques):
    """Nothing is compiled there, and FP8 saves memory only."""
    assert set(chosen(sped_up(tiny_model, preset)).plan.techniques) == techniques


def test_exact_is_exact(tiny_model):
    stock = sample(tiny_model, TEXT, **SMALL)
    assert relative_error(sample(sped_up(tiny_model, "exact"), TEXT, **SMALL), stock) < 1e-5


def test_other_nodes_win_wherever_they_stand(tiny_model):
    own = {"cache": CacheConfig(0.3), "attention": AttentionConfig(kernel="stock"), "fp8": FP8Config("per_tensor")}
    before = sped_up(engine.edit(tiny_model, **own), "fastest")
    after = engine.edit(sped_up(tiny_model, "fastest"), **own)
    for model in (before, after):
        plan = chosen(model).plan
        assert {name: getattr(plan, name) for name in own} == own and plan.sparse == SparseConfig()


def test_a_cache_that_is_switched_off_stays_off(tiny_model):
    off = engine.edit(tiny_model, cache=CacheConfig(threshold=0))
    assert chosen(sped_up(off)).plan.techniques == ["attention"]


def test_the_last_of_two_speed_up_nodes_wins(tiny_model):
    assert engine.plan_of(sped_up(sped_up(tiny_model, "fastest"), "exact")).preset == PresetConfig("exact")
    assert chosen(sped_up(sped_up(tiny_model, "fastest"), "exact")).plan.techniques == ["attention"]


def test_a_plan_without_a_preset_stays_as_it_is(tiny_model):
    plan = Plan(cache=CacheConfig(0.2))
    assert chosen(engine.edit(tiny_model, cache=plan.cache)).plan == plan


def test_what_other_nodes_stand_against_is_left_out_and_said(tiny_model, shown):
    """EasyCache's wrapper: First-Block Cache's own node would refuse it."""
    model = sped_up(tiny_model, node_id="7")
    model.add_wrapper_with_key(
        WrappersMP.OUTER_SAMPLE, "easycache", lambda executor, *args, **kw: executor(*args, **kw)
    )
    runs = len(recent_runs())
    sample(model, TEXT, **SMALL)
    assert len(recent_runs()) == runs  # nothing was cached
    node, last = shown[-1]
    assert node == "7" and last.startswith("Attention: 6 steps in ")
    assert "Without First-Block Cache: EasyCache and First-Block Cache cannot work on one model" in last


def test_where_nothing_can_work_the_run_goes_on_and_the_node_says_why(shown):
    """A model that another node has compiled, which stays so on the model until the next run takes it off."""
    stock = random_hunyuan_video()
    compiled = sped_up(stock, node_id="7")
    compiled.add_object_patch("diffusion_model", torch.compile(stock.model.diffusion_model, backend="eager"))
    expected = sample(stock, TEXT, **SMALL)
    assert relative_error(sample(compiled, TEXT, **SMALL), expected) < 1e-5
    said = shown[-1][1].splitlines()
    assert said[0] == "nothing: the model runs as it does without Skein"
    assert "compiles the whole model" in said[1] and said[1].startswith("- Without Attention: ")
    sample(sped_up(stock, "low memory", node_id="7"), TEXT, **SMALL)
    assert shown[-1][1].startswith("Attention, FP8 Quantize, First-Block Cache at 0.06: 6 steps in ")


def test_what_is_not_installed_is_left_out_and_said(tiny_model, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    choice = chosen(sped_up(tiny_model, "low memory"))
    assert choice.plan.fp8 is None and "torchao" in choice.left_out["fp8"]


def test_several_devices_only_where_they_gain(tiny_model):
    """Devices that are named are used."""
    model = sped_up(tiny_model, devices="cpu,cpu")
    plan = engine.plan_of(model)
    assert presets.wanted(plan, 0.06).parallel == ParallelConfig("cpu,cpu")
    case = presets.Case(PresetConfig(devices="all"), tiny_model, SMALL["shape"])
    assert "gain little on 48 tokens" in presets.ORDER["parallel"](case, plan)
    assert chosen(model).plan.parallel == ParallelConfig("cpu,cpu")
    model.cached_patcher_init = None  # as after a loader of another pack: no worker could load it again
    choice = chosen(model)
    assert choice.plan.parallel is None and "does not tell how" in choice.left_out["parallel"]


def test_the_cache_keeps_what_fits_beside_blocks_in_slices(tiny_model, monkeypatch):
    latent = (1, 16, 33, 90, 160)
    needs = {}
    for order in (0, 1, 2):
        cache = CacheConfig(0.06, order=order)
        plan = Plan(cache=cache, attention=AttentionConfig(), slices=SlicesConfig(16))
        needs[order] = expected_bytes(plan, tiny_model, latent)
    for order, need in needs.items():
        monkeypatch.setattr("comfy.model_management.get_total_memory", lambda device, need=need: need)
        assert chosen(sped_up(tiny_model), latent).plan.cache.order == order
    monkeypatch.setattr("comfy.model_management.get_total_memory", lambda device: needs[0] / 2)
    choice = chosen(sped_up(tiny_model), latent)
    assert choice.plan.cache is None and "not enough memory" in choice.left_out["cache"]


def test_weights_that_come_while_blocks_run_take_nothing_from_the_cache(tiny_model, monkeypatch):
    """With FP8 the cache keeps what fits without the model, in slices if need be."""
    latent, network = (1, 16, 33, 90, 160), Network(tiny_model.model.diffusion_model)
    load = Load.of(network, latent, size=4)
    for order in (0, 1, 2):
        plan = Plan(CacheConfig(0.06, order=order), AttentionConfig(), FP8Config(), slices=SlicesConfig(16))
        need = room_bytes(load, plan) + coming_bytes(tiny_model.model, network, plan) + 1
        monkeypatch.setattr("comfy.model_management.get_total_memory", lambda device, need=need: need)
        plan = chosen(sped_up(tiny_model, "low memory"), latent).plan
        assert plan.fp8 is not None and plan.cache.order == order
    monkeypatch.setattr("comfy.model_management.get_total_memory", lambda device: need / 3)
    assert chosen(sped_up(tiny_model, "low memory"), latent).plan.cache is None


def test_weights_in_comfyuis_quantized_forms_do_not_come_while_blocks_run(tiny_model, monkeypatch):
    case, compiled = presets.Case(PresetConfig(), tiny_model, SMALL["shape"]), Plan(compile=CompileConfig())
    assert case.weights_come(compiled) and not case.weights_come(Plan(attention=AttentionConfig()))
    monkeypatch.setattr(presets, "is_quantized", lambda model: True)
    assert not case.weights_come(compiled)


def test_a_latent_whose_size_is_not_known_is_taken_for_one_that_fits(tiny_model, monkeypatch):
    monkeypatch.setattr("comfy.model_management.get_total_memory", lambda device: 1)
    assert chosen(sped_up(tiny_model), (1, 1, 5000)).plan.cache.order == 2


def test_the_node_says_what_was_chosen_before_and_after(tiny_model, shown):
    model = sped_up(tiny_model, node_id="7")
    first = sample(model, TEXT, **SMALL)
    sample(model, TEXT, **SMALL)
    said = [text for node, text in shown if node == "7" and not text.startswith("step ")]
    assert said[0].startswith("Attention, First-Block Cache at 0.06: the time is known after")
    assert "MB" in said[0] and "6 steps in" in said[1]
    assert "a step, " in said[2] and "in all" in said[2]  # the second run knows of the first
    assert torch.equal(first, sample(model, TEXT, **SMALL))


def test_what_a_run_takes_is_said_without_the_node_and_is_no_more_than_the_device_has(tiny_model, monkeypatch, caplog):
    monkeypatch.setattr("comfy.model_management.get_total_memory", lambda device: 3_000_000)
    with caplog.at_level("INFO", "skein"):
        sample(engine.edit(tiny_model, attention=AttentionConfig()), TEXT, **SMALL)
    begins, _, ends = next(text for text in caplog.messages if text.endswith(" MB")).partition("; ")
    assert begins.startswith("Skein: Attention: ") and ends == "about 3.0 MB"


@pytest.mark.parametrize("settings", [{"preset": "turbo"}, {"devices": "gpu"}])
def test_settings_that_cannot_be_are_refused(settings):
    with pytest.raises(ValueError, match="must be"):
        PresetConfig(**settings)
