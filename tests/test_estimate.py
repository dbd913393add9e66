"""The estimate of memory against peaks that bench/memory.py and bench/card_sizes.py measured, and what it says of a GPU
that is too small."""

from dataclasses import replace

import pytest
from skein.estimate import Load, advice, room_bytes, work_bytes
from skein.plan import AttentionConfig, CacheConfig, CompileConfig, FP8Config, ParallelConfig, Plan, SlicesConfig

ATTENTION = Plan(attention=AttentionConfig())
COMPILED = Plan(attention=AttentionConfig(), compile=CompileConfig())
CACHED = Plan(CacheConfig(), AttentionConfig(), None, CompileConfig())
FP8 = Plan(None, AttentionConfig(), FP8Config(), CompileConfig())
SLICES = SlicesConfig(16)
MEASURED = [  # plan, image tokens, samples in a call, GPUs, GB on each; an H200, torch 2.11, ComfyUI 0.30.0, 2 + 2
    (Plan(), 118_800, 1, 1, 10.736),
    (ATTENTION, 118_800, 1, 1, 10.017),
    (COMPILED, 118_800, 1, 1, 11.466),
    (CACHED, 118_800, 1, 1, 13.803),
    (FP8, 118_800, 1, 1, 12.463),  # 20 + 40 blocks, by bench/card_sizes.py
    (replace(ATTENTION, slices=SLICES), 118_800, 1, 1, 4.174),
    (replace(COMPILED, slices=SLICES), 118_800, 1, 1, 4.174),
    (replace(CACHED, slices=SLICES), 118_800, 1, 1, 6.559),
    (ATTENTION, 61_200, 1, 1, 5.159),
    (ATTENTION, 34_680, 2, 1, 5.767),
    (CACHED, 34_680, 2, 1, 8.144),
    (ATTENTION, 8_280, 1, 1, 0.705),
    (ATTENTION, 118_800, 1, 2, 7.190),
    (ATTENTION, 118_800, 1, 4, 4.234),
    (CACHED, 34_680, 2, 2, 4.860),
    (CACHED, 34_680, 2, 4, 2.711),
]
LARGE = Load(118_800, 256, 3072)


@pytest.mark.parametrize(("plan", "tokens", "batch", "world", "peak"), MEASURED)
def test_measured_peaks(plan, tokens, batch, world, peak):
    assert work_bytes(Load(tokens, 60, 3072, batch), plan, world) / 1e9 == pytest.approx(peak, rel=0.1)


@pytest.mark.parametrize(
    ("plan", "held", "needed"),
    [(FP8, 15.13, 12.93), (replace(FP8, slices=SLICES), 6.58, 5.03), (replace(FP8, slices=SLICES), 11.45, 9.97)],
)
def test_room_for_what_the_allocator_loses(plan, held, needed):
    """GB that cudaMallocAsync held when it had no more for so many: bench/dynamic_card.py, one H100."""
    assert room_bytes(LARGE, plan) - work_bytes(LARGE, plan) > (held - needed) * 1e9


def test_each_gpu_takes_less_of_a_shared_video_and_never_nothing():
    needs = [work_bytes(LARGE, CACHED, world) for world in (1, 2, 4, 8)]
    assert needs == sorted(needs, reverse=True) and needs[3] > LARGE.tokens * LARGE.width * 2


def test_the_sentence():
    assert advice(LARGE, CACHED, 80e9) == ""
    said = advice(LARGE, CACHED, 12e9)
    assert "needs about 14 GB per GPU" in said and "12 GB" in said and "no First-Block Cache" in said
    shared = advice(LARGE, Plan(parallel=ParallelConfig()), 3e9, world=4)
    assert "more than 4 GPUs" in shared and "Cache" not in shared
