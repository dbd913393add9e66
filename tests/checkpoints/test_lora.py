"""LoRAs on a model in diffusers' format, in the keys that ComfyUI knows, beside the same merged into diffusers' own."""

import comfy.sd
import pytest
import torch
from einops import rearrange
from judge import CASES, Case, outputs, random_network, randoms, save_in_shards
from skein.checkpoints.loading import load_diffusers

RANK = 4
ATTENTION = ("to_q", "to_k", "to_v")
HUNYUAN_VIDEO = {  # ComfyUI's layer: diffusers' layers that it is made of
    "double_blocks.0.img_attn.qkv": [f"transformer_blocks.0.attn.{name}" for name in ATTENTION],
    "double_blocks.1.txt_mlp.2": ["transformer_blocks.1.ff_context.net.2"],
    "single_blocks.1.linear1": [
        *(f"single_transformer_blocks.1.attn.{name}" for name in ATTENTION),
        "single_transformer_blocks.1.proj_mlp",
    ],
}
FLUX = HUNYUAN_VIDEO


def flux_inputs():
    """A latent of 16 channels, which diffusers is given in tokens of 2 x 2; sigma and guidance are the same in both."""
    latent, text, pooled = randoms((1, 16, 8, 6), (1, 5, 4096), (1, 768))
    place = torch.cartesian_prod(torch.arange(4.0), torch.arange(3.0))
    sigma, guidance = torch.tensor([0.7]), torch.tensor([3.5])
    theirs = dict(
        hidden_states=rearrange(latent, "b c (h p) (w q) -> b (h w) (c p q)", p=2, q=2),
        encoder_hidden_states=text, pooled_projections=pooled, timestep=sigma, guidance=guidance,
        img_ids=torch.cat([torch.zeros(12, 1), place], 1), txt_ids=torch.zeros(5, 3),
    )  # fmt: skip
    return theirs, dict(x=latent, timestep=sigma, context=text, y=pooled, guidance=guidance)


def unpacked(output):
    return rearrange(output, "b (h w) (c p q) -> b c (h p) (w q)", h=4, w=3, p=2, q=2)


FLUX_CASE = Case(
    "FluxTransformer2DModel",
    dict(num_attention_heads=2, attention_head_dim=128, num_layers=2, num_single_layers=2, guidance_embeds=True),
    flux_inputs,
    unpacked,
)


@pytest.fixture(params=[(CASES["HunyuanVideo"], HUNYUAN_VIDEO), (FLUX_CASE, FLUX)], ids=["HunyuanVideo", "FLUX.1"])
def loaded(request, tmp_path):
    """The case, its layers, diffusers' network, the loaded model, and the LoRA's factors (up, down) of each layer."""
    case, layers = request.param
    network = random_network(case)
    save_in_shards(network, tmp_path)
    generator = torch.Generator().manual_seed(5)
    factors = {}
    for name in (each for several in layers.values() for each in several):
        rows, columns = network.get_submodule(name).weight.shape
        up, down = (torch.randn(*shape, generator=generator) / 8 for shape in ((rows, RANK), (RANK, columns)))
        factors[name] = up, down
    return case, layers, network, load_diffusers(str(tmp_path)), factors


def in_comfyuis_keys(layers, factors):
    """Layers that are one in ComfyUI have one pair of factors: those of its parts beside each other."""
    lora = {}
    for name, several in layers.items():
        ups, downs = zip(*(factors[each] for each in several))
        lora[f"diffusion_model.{name}.lora_B.weight"] = torch.block_diag(*ups)
        lora[f"diffusion_model.{name}.lora_A.weight"] = torch.cat(downs)
    return lora


def in_diffusers_keys(layers, factors):
    lora = {f"transformer.{name}.lora_B.weight": up for name, (up, _down) in factors.items()}
    return lora | {f"transformer.{name}.lora_A.weight": down for name, (_up, down) in factors.items()}


def error(loaded, lora, strength=0.7):
    """Of the model with the LoRA on, to diffusers' network with the same merged into its weights."""
    case, _layers, network, model, factors = loaded
    patcher, _clip = comfy.sd.load_lora_for_models(model, None, lora, strength, 0)
    for name, (up, down) in factors.items():
        network.get_submodule(name).weight.add_(strength * up @ down)
    patcher.patch_model()
    try:
        expected, found = outputs(case, network, patcher)
    finally:
        patcher.unpatch_model()
    return float((found - expected).norm() / expected.norm())


def test_in_comfyuis_keys(loaded):
    _case, layers, _network, _model, factors = loaded
    assert error(loaded, in_comfyuis_keys(layers, factors)) <= 1e-5


def test_in_diffusers_keys(loaded):
    case, layers, _network, _model, factors = loaded
    if case is not FLUX_CASE:
        pytest.skip("ComfyUI's LoRA nodes do not know diffusers' keys of HunyuanVideo")
    assert error(loaded, in_diffusers_keys(layers, factors)) <= 1e-5


def test_the_lora_matters(loaded):
    assert error(loaded, {}) > 1e-2
