"""The memory estimate of a decode against what was measured, and how it grows."""

from types import SimpleNamespace

import pytest
import torch
from skein.vae.families import FAMILIES
from skein.vae.memory import sliced_bytes, whole_bytes

GIB = 2**30
SIZE = (1, 16, 33, 90, 160)  # 129 frames of 1280 x 720
HUNYUAN = FAMILIES["comfy.ldm.modules.diffusionmodules.model.Decoder"]


@pytest.fixture
def vae():
    """What the estimate asks of ComfyUI's HunyuanVideo VAE in bf16."""
    return SimpleNamespace(
        memory_used_decode=lambda shape, dtype: (
            2800 * min(8, (shape[2] - 1) * 4 + 1) * shape[3] * shape[4] * 64 * dtype.itemsize
        ),
        vae_dtype=torch.bfloat16,
        upscale_ratio=(lambda frames: max(0, 4 * frames - 3), 8, 8),
        output_channels=3,
    )


def test_it_holds_the_measured_peak_and_not_much_more(vae):
    """28.7 GiB on an H200, frames in bf16; the frames in float32 are 1.3 GiB more."""
    assert 28.7 * GIB < whole_bytes(vae, HUNYUAN, SIZE, 1) < 31.5 * GIB


def test_it_shrinks_with_the_devices_and_grows_with_size_and_type(vae):
    needs = [whole_bytes(vae, HUNYUAN, SIZE, world) for world in (1, 2, 4, 8)]
    assert needs == sorted(needs, reverse=True) and needs[0] / 2 == pytest.approx(needs[1], rel=0.01)
    assert needs[3] >= 5 * GIB  # attention scores are held in pieces of one size, however many share them
    assert (
        whole_bytes(vae, HUNYUAN, (1, 16, 65, 90, 160), 1)
        > needs[0]
        > whole_bytes(vae, HUNYUAN, (1, 16, 33, 60, 90), 1)
    )
    assert whole_bytes(vae, HUNYUAN, (4, *SIZE[1:]), 1) == needs[0]  # one video after another
    vae.vae_dtype = torch.float32
    assert whole_bytes(vae, HUNYUAN, SIZE, 1) > 1.9 * needs[0]


def test_slices_take_what_was_measured_and_fit_small_cards(vae):
    """One H100 (bench/dynamic_card.py): 9.38 GB with what the allocator lost, without the weights, on a card of 12 GB.
    Counted (bench/vae_memory.py): 6.1 GiB of carried frames."""
    least, carried = sliced_bytes(vae, HUNYUAN, SIZE)
    assert 9.38e9 < least < 9.8e9 and 6.1 * GIB < carried < 7 * GIB
