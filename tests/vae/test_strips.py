"""Strips of the frame, each decoded by its own process, are the whole frame decoded by stock ComfyUI: every family,
real processes, gloo, float32. And the layers in one process."""

import json
from pathlib import Path

import pytest
import torch
import vaes
from ranks import run_ranks
from skein.vae.layers import attention, computing, moments, refusal
from skein.vae.strip import Strip
from torch import nn

SCRIPT = Path(__file__).parent / "strips.py"
TOLERANCE = 1e-4  # of the largest difference (on two kinds of CPU 0.8e-5, 1.7e-5); frames have a deviation of 0.1 to 1


@pytest.mark.parametrize("world", [2, 3])
def test_strips_are_the_whole_frame(world):
    result = run_ranks(SCRIPT, world)
    assert result.returncode == 0, result.stderr[-3000:]
    rows = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    assert {row["family"] for row in rows} == set(vaes.FAMILIES) and len(rows) == 4 * len(vaes.FAMILIES)
    for row in rows:
        assert row["difference"] < TOLERANCE, row
        assert -row["without"] > 1e-2, row  # each rank alone would be wrong
        assert not row["left_behind"] and not row["frames_missing"], row


@pytest.mark.parametrize("name", vaes.FAMILIES)
def test_one_process_computes_the_same_and_leaves_nothing_behind(name):
    model = vaes.build(name)
    z, strip, done = vaes.latent(name, (1, 3, 3, 4)), Strip(-1, (4,)), []
    stock, attributes = model.decode(z), [dict(vars(module)) for module in model.modules()]
    with computing(model.decoder, strip, lambda: None, done.append):
        fast = model.decode(z)
    assert float((fast - stock).abs().max()) < TOLERANCE and sum(done) >= stock.shape[2]

    def interrupt():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), computing(model.decoder, strip, interrupt, done.append):
        model.decode(z)
    assert [dict(vars(module)) for module in model.modules()] == attributes
    assert torch.equal(model.decode(z), stock)


def test_attention_in_parts_is_attention(monkeypatch):
    monkeypatch.setattr("skein.vae.layers.SCORES", 600)  # 16 queries at a time, and a rest
    q, k, v = (torch.randn(2, 8, *frame) for frame in [(1, 5, 7), (1, 5, 9), (1, 5, 9)])
    rows = (each.flatten(2).transpose(1, 2) for each in (q, k, v))
    expected = nn.functional.scaled_dot_product_attention(*rows).transpose(1, 2).reshape(q.shape)
    assert float((attention(q, k, v) - expected).abs().max()) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_moments_of_values_far_from_zero(dtype):
    """Sums of squares lose digits where the mean is large; what is lost is less than a value of 16 bits holds."""
    x = (10 + torch.randn(2, 64, 3, 20, 20)).to(dtype)
    mean, variance = moments(x, 32)
    exact = x.double().reshape(2, 32, -1)
    assert mean.dtype == variance.dtype == torch.float32
    assert float((mean - exact.mean(-1)).abs().max()) < 1e-5
    assert float((variance / exact.var(-1, correction=0) - 1).abs().max()) < 1e-3


def test_decoders_of_another_form_are_refused():
    assert all(refusal(vaes.build(name).decoder) is None for name in vaes.FAMILIES)
    for layer in (nn.Conv3d(4, 4, 3, stride=2, padding=1), nn.Conv2d(4, 4, 5, padding=2), nn.BatchNorm3d(4)):
        assert "0 is a" in refusal(nn.Sequential(layer))
