"""The maps are complete on models of their released sizes: ComfyUI takes each for the right class, which has just these
weights. Without numbers: all is on PyTorch's meta device."""

import comfy.supported_models
import diffusers
import pytest
import torch
from comfy import model_detection
from released import RELEASED
from skein.checkpoints.keys import make, plan
from skein.checkpoints.maps import MAPS


@pytest.mark.parametrize("name", RELEASED)
def test_the_weights_are_those_of_comfyuis_class(name):
    of, config, expected = RELEASED[name]
    if not hasattr(comfy.supported_models, expected):
        pytest.skip("this ComfyUI does not have it")
    with torch.device("meta"):
        weights = getattr(diffusers, of)(**config).state_dict()
    known = next((each for each in MAPS if of in each.classes), None)
    if known:
        planned, strange = plan(known, weights)
        assert not strange
        weights = {key: make(made, weights) for key, made in planned.items()}
    found = model_detection.model_config_from_unet(weights, "")
    if not found:
        weights = model_detection.convert_diffusers_mmdit(dict(weights))
        found = model_detection.model_config_from_unet(weights, "")
    assert type(found).__name__ == expected
    with torch.device("meta"):
        network = found.get_model(weights, "", device=torch.device("meta")).diffusion_model
    want = {key: weight.shape for key, weight in network.state_dict().items()}
    assert {key: weight.shape for key, weight in weights.items()} == want
