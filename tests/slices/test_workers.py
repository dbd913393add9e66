"""Slices of what each of several processes has of a video: the same result, and a real worker runs them."""

from pathlib import Path

import comfy.sd
import pytest
import torch
from ranks import run_ranks
from safetensors.torch import save_file
from skein import engine, live
from skein.bench.errors import relative_error
from skein.plan import FP8Config, ParallelConfig, SlicesConfig
from skein.workers import group, release
from tiny_models import CASES, sample

SCRIPT = Path(__file__).parent / "sharing.py"
SHARES = {"HunyuanVideo": 18, "Wan 2.1": 18, "FLUX.1": 15}  # image tokens of a rank


@pytest.mark.parametrize("degrees", ["2,1", "1,2"], ids=["Ulysses", "ring"])
def test_each_rank_runs_its_share_in_slices(degrees):
    done = run_ranks(SCRIPT, 2, degrees)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line.split("|") for line in done.stdout.splitlines() if "|" in line]
    assert len(lines) == 2 * len(SHARES)
    for name, technique, error, tokens in lines:
        assert float(error) < 1e-5 and tokens == str([SHARES[name] // 3] * 3), (name, technique, error, tokens)


def test_a_worker_runs_the_slices_that_it_is_sent(tmp_path):
    """Which shows in FP8 with one scale per tensor: each slice has its own. Whole blocks would give the same bits."""
    case, path = CASES["FLUX.1"], tmp_path / "model.safetensors"
    weights = case.patcher().model.diffusion_model.state_dict()
    save_file({key: value.contiguous() for key, value in weights.items()}, path)
    model = comfy.sd.load_diffusion_model(str(path), model_options={"dtype": torch.float32})
    shared = engine.edit(model, parallel=ParallelConfig("cpu"), fp8=FP8Config("per_tensor"))
    try:
        whole, again, sliced = (
            sample(case, engine.edit(shared, slices=SlicesConfig(count))) for count in (1, 1, 3)
        )  # fmt: skip
        assert torch.equal(whole, again) and 1e-3 < relative_error(sliced, whole) < 0.03
        assert group._group.last_run["calls"] == 2
        assert live.snapshot()["sampling"]["notes"]["slices"].startswith("Blocks in 3 slices of tokens: ")
    finally:
        release()
