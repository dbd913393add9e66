"""Models of several architectures in real workers, from checkpoints that ComfyUI's own loader detects. SD3 has no
wrappers of ComfyUI's around its calls.
"""

from dataclasses import replace

import comfy.sd
import pytest
import torch
from safetensors.torch import save_file
from skein import engine
from skein.bench.errors import relative_error
from skein.plan import CacheConfig, ParallelConfig
from skein.report import recent_runs
from skein.workers import group, release
from tiny_models import CASES, sample

TWO = ParallelConfig("cpu,cpu")
WAN = CASES["Wan 2.1"]
DETECTED = {  # the loader takes Wan's text to have 4096 channels
    "FLUX.1": CASES["FLUX.1"],
    "SD3": CASES["SD3"],
    "Wan 2.1": replace(WAN, config=WAN.config | {"text_dim": 4096}, text=(16, 4096)),
}


@pytest.fixture(scope="module", autouse=True)
def _workers_end():
    yield
    release()


@pytest.fixture(params=DETECTED)
def loaded(request, tmp_path):
    """A case, and its model as loaded from a file."""
    case, path = DETECTED[request.param], tmp_path / "model.safetensors"
    weights = case.patcher().model.diffusion_model.state_dict()
    save_file({key: value.contiguous() for key, value in weights.items()}, path)
    return case, comfy.sd.load_diffusion_model(str(path), model_options={"dtype": torch.float32})


def test_workers_compute_what_one_process_computes(loaded):
    case, model = loaded
    assert relative_error(sample(case, engine.edit(model, parallel=TWO)), sample(case, model)) < 3e-6
    assert group._group.last_run["calls"] == 2


def test_workers_reuse_the_same_calls(loaded):
    case, model = loaded
    cached = engine.edit(model, cache=CacheConfig(threshold=0.8, order=0))
    one = sample(case, cached, steps=5, cfg=3.0, near=True)
    reused = [call.reused for call in recent_runs()[-1].calls]
    assert relative_error(sample(case, engine.edit(cached, parallel=TWO), steps=5, cfg=3.0, near=True), one) < 3e-6
    assert group._group.last_run["calls"] >= 5
    assert [call.reused for call in recent_runs()[-1].calls] == reused and any(reused)


def test_the_hollow_model_is_never_sampled_by_itself(loaded):
    """Something that calls the network beside ComfyUI's own way gets a sentence, not numbers."""
    case, model = loaded
    planned = engine.edit(model, parallel=TWO)

    def past_the_wrappers(executor, *args, **kwargs):
        network = executor.class_obj.diffusion_model
        return network(args[0], args[1], context=case.conditioning()[0][0], transformer_options={})

    planned.add_wrapper_with_key("apply_model", "past", past_the_wrappers)
    with pytest.raises((RuntimeError, TypeError)) as told:
        sample(case, planned)
    assert "the weights of this model are in the workers" in str(told.value)
