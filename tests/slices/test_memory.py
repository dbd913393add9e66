"""What a call holds at its peak, counted in hidden states (tokens x width values) of real blocks with many tokens; and
when a run takes slices by itself.
"""

from dataclasses import replace

import pytest
import skein.estimate
import torch
from comfy.patcher_extension import WrappersMP
from live_bytes import LiveBytes
from skein import engine, live
from skein.estimate import Load, room_bytes, work_bytes
from skein.footprint import with_slices
from skein.models import Network
from skein.offloaded import ahead_bytes
from skein.plan import AttentionConfig, Plan, SlicesConfig
from tiny_models import CASES, FLUX, HUNYUAN_VIDEO, QWEN_IMAGE, WAN, sample

WIDE = {"hidden_size": 768, "num_heads": 6, "depth": 1, "depth_single_blocks": 1}
MANY_TOKENS = {  # 2048, in the widths of the real models' blocks but for C
    "HunyuanVideo": replace(CASES["HunyuanVideo"], config=HUNYUAN_VIDEO | WIDE, latent=(1, 16, 4, 32, 64)),
    "FLUX.1": replace(CASES["FLUX.1"], config=FLUX | WIDE, latent=(1, 16, 64, 128)),
    "Wan 2.1": replace(
        CASES["Wan 2.1"], config=WAN | dict(dim=768, num_heads=6, ffn_dim=3072, num_layers=1), latent=(1, 16, 4, 32, 64)
    ),
    "Qwen-Image": replace(
        CASES["Qwen-Image"], config=QWEN_IMAGE | dict(num_attention_heads=6, num_layers=1), latent=(1, 16, 1, 64, 128)
    ),
}
ATTENTION = Plan(attention=AttentionConfig())
ROTARY = 0.17  # of the factors, which are 128 float32 values a head in the real models too


def peak_of(case, plan):
    """Hidden states at the peak of a call."""
    patcher, peaks = engine.edit(case.patcher(), **vars(plan)), []

    def measure(executor, *args, **kwargs):
        with LiveBytes() as count:
            out = executor(*args, **kwargs)
        peaks.append(count.peak)
        return out

    patcher.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "measure", measure)
    sample(case, patcher, steps=1)
    network = Network(patcher.model.diffusion_model)
    return peaks[0] / (network.tokens(case.latent) * network.width * 4)


@pytest.mark.parametrize("name", MANY_TOKENS)
def test_peaks_in_hidden_states(name):
    case = MANY_TOKENS[name]
    whole, eight, sixteen = (
        peak_of(case, replace(ATTENTION, slices=SlicesConfig(count))) for count in (1, 8, 16)
    )  # fmt: skip
    print(f"{name}: {whole:.2f}, {eight:.2f} in 8 slices, {sixteen:.2f} in 16")
    assert whole > 8 and eight < 6 and sixteen < 5.5


def test_the_estimate_knows_them():
    case = MANY_TOKENS["HunyuanVideo"]
    network = Network(case.patcher().model.diffusion_model)
    load = Load.of(network, case.latent, 4)
    load = replace(load, text=7)
    for count in (1, 2, 4, 8, 16):
        plan = replace(ATTENTION, slices=SlicesConfig(count))
        estimate = (work_bytes(load, plan) - skein.estimate.FIXED) / (load.tokens * load.width * load.size)
        counted = peak_of(case, plan) - ROTARY
        print(f"{count} slices: estimated {estimate:.2f}, counted {counted:.2f}")
        assert counted <= estimate * 1.1 and estimate <= counted * 1.25


@pytest.fixture
def card(monkeypatch):
    """Sets how many bytes the device has; the 36 tokens of a tiny HunyuanVideo may be cut."""
    monkeypatch.setattr("skein.estimate.FEWEST_TOKENS", 9)
    patcher = CASES["HunyuanVideo"].patcher()

    def set_total(total):
        monkeypatch.setattr("comfy.model_management.get_total_memory", lambda *_, **__: total)
        return patcher

    return set_total


def test_a_run_takes_slices_where_whole_blocks_have_no_room(card):
    case = CASES["HunyuanVideo"]
    need = room_bytes(Load(36, 256, 256, size=4), ATTENTION)
    for total, count in ((need + 1, 1), (need - 1, 4)):
        patcher = engine.edit(card(total), attention=AttentionConfig())
        assert with_slices(ATTENTION, patcher, case.latent).slices == SlicesConfig(count)
        sample(case, patcher)
        assert ("slices" in live.snapshot()["sampling"]["techniques"]) == (count > 1)
        assert live.snapshot()["sampling"]["notes"].get("slices", "").startswith("Blocks in 4") == (count > 1)
    by_hand = replace(ATTENTION, slices=SlicesConfig(1))
    assert with_slices(by_hand, patcher, case.latent) == by_hand


def test_a_model_without_such_blocks_is_not_promised_any(card):
    card(0)
    case = CASES["SD3"]
    assert with_slices(ATTENTION, case.patcher(), case.latent) == ATTENTION


def test_where_memory_runs_out_with_whole_blocks_the_sampling_begins_again_in_slices(card, caplog):
    """Here it does so for a block's layer that is given all tokens."""
    case = CASES["HunyuanVideo"]
    patcher = engine.edit(card(1e12), attention=AttentionConfig())
    whole, refused = sample(case, patcher, steps=2), []

    def refuse(_layer, inputs):
        if inputs[0].shape[1] >= 36:
            refused.append(inputs[0].shape[1])
            raise torch.OutOfMemoryError

    layer = patcher.model.diffusion_model.double_blocks[1].img_mlp[0]
    with layer.register_forward_pre_hook(refuse), caplog.at_level("WARNING", "skein"):
        out = sample(case, patcher, steps=2)
        assert len(refused) == 1 and engine.AGAIN in caplog.text
        assert float((out - whole).norm() / whole.norm()) < 1e-5
        by_hand = engine.edit(patcher, slices=SlicesConfig(1))
        with pytest.raises(torch.OutOfMemoryError):
            sample(case, by_hand, steps=2)
        assert len(refused) == 2
    assert torch.equal(sample(case, patcher, steps=2), whole)


def test_comfyui_reckons_with_slices_for_the_run_only(card):
    """What it keeps free of weights."""
    case, asked = CASES["HunyuanVideo"], []
    patcher = engine.edit(card(1), attention=AttentionConfig())
    own = patcher.model.memory_required(case.latent)

    def look(executor, *args, **kwargs):
        asked.append(patcher.model.memory_required(case.latent, cond_shapes={}))
        return executor(*args, **kwargs)

    patcher.add_wrapper_with_key(WrappersMP.PREPARE_SAMPLING, "look", look)
    sample(case, patcher, steps=1)
    plan = replace(ATTENTION, slices=SlicesConfig(4))
    need = room_bytes(Load(36, 256, 256, size=4), plan)
    assert asked == [need + ahead_bytes(Network(patcher.model.diffusion_model))]
    assert patcher.model.memory_required(case.latent) == own
