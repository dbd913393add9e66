"""Random VAEs of every family: real architectures of small width. Weights of sensible scale, norms near one."""

import math

import comfy.sd
import torch
from comfy.ldm.models.autoencoder import AutoencoderKL, AutoencodingEngine
from comfy.ldm.wan import vae as wan
from comfy.ldm.wan import vae2_2 as wan22

KL = {
    "double_z": True, "z_channels": 16, "resolution": 256, "in_channels": 3, "out_ch": 3, "ch_mult": [1, 2, 4, 4],
    "num_res_blocks": 2, "attn_resolutions": [], "dropout": 0.0, "conv3d": True, "time_compress": 4,
}  # fmt: skip
WAN = {
    "dim_mult": [1, 2, 4, 4], "num_res_blocks": 2, "attn_scales": [], "temperal_downsample": [False, True, True],
}  # fmt: skip


def hunyuan(ch=32):
    return AutoencoderKL(ddconfig={**KL, "ch": ch}, embed_dim=16)


def refiner(**changes):
    settings = {
        "block_out_channels": [32, 32, 64, 64, 64], "in_channels": 3, "out_channels": 3, "num_res_blocks": 2,
        "ffactor_spatial": 16, "ffactor_temporal": 4, "z_channels": 32, **changes,
    }  # fmt: skip
    room = "comfy.ldm.hunyuan_video.vae_refiner"
    return AutoencodingEngine(
        regularizer_config={"target": "comfy.ldm.models.autoencoder.EmptyRegularizer"},
        encoder_config={"target": f"{room}.Encoder", "params": settings},
        decoder_config={"target": f"{room}.Decoder", "params": settings},
    )


# Name -> (how to build it, latent channels).
FAMILIES = {
    "HunyuanVideo": (hunyuan, 16),
    "HunyuanVideo 1.5": (refiner, 32),
    "HunyuanImage": (lambda: refiner(refiner_vae=False), 32),
    "Wan 2.1": (lambda: wan.WanVAE(dim=8, z_dim=16, **WAN), 16),
    "Wan 2.2": (lambda: wan22.WanVAE(dim=8, dec_dim=8, z_dim=48, **WAN), 48),
}


def build(name):
    """A family's first stage model on the CPU, the same in every process."""
    return randomized(FAMILIES[name][0]()).eval()


def randomized(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        values = torch.randn(parameter.shape, generator=generator)
        if "gamma" in name or (parameter.ndim == 1 and "norm" in name and name.endswith("weight")):
            values = 1 + 0.1 * values
        elif parameter.ndim == 1:
            values = 0.1 * values
        else:
            values = values / math.sqrt(parameter[0].numel())
        parameter.data = values
    return model


def latent(name, shape, seed=1):
    """(B, C, T, H, W) for (B, T, H, W)."""
    batch, *rest = shape
    return torch.randn(batch, FAMILIES[name][1], *rest, generator=torch.Generator().manual_seed(seed))


def vae(name="Wan 2.1", **changes):
    """ComfyUI's VAE by its own detection: Wan 2.1 of small width, HunyuanVideo of its real width."""
    model = hunyuan(ch=128) if name == "HunyuanVideo" else FAMILIES[name][0]()
    return comfy.sd.VAE(sd=randomized(model).state_dict(), **changes)
