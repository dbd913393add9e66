"""Decoding a video latent: ComfyUI's own VAE Decode, Skein on one device (whole, in slices), and in the worker group.

    python3 -m bench.vae [--width 1280 --height 720 --frames 129] [--family HunyuanVideo] [--worlds 1 2 4 8]
    python3 -m bench.vae --cpu --small

The VAE has its true size and random weights. Each way runs twice, the second run counts. Peaks are those of this
process, of the group those of its workers (what their allocators took). Random: weights and latent. Ends with one JSON
line.
"""

import argparse
import json
import logging
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
from pack import load_pack  # noqa: E402

load_pack()

import comfy.model_management  # noqa: E402
import comfy.sd  # noqa: E402
import comfyui_version  # noqa: E402
import torch  # noqa: E402
from comfy.ldm.models.autoencoder import AutoencoderKL, AutoencodingEngine  # noqa: E402
from comfy.ldm.wan.vae import WanVAE  # noqa: E402
from skein.bench.timing import device_name  # noqa: E402
from skein.plan import DecodeConfig  # noqa: E402
from skein.vae import shared  # noqa: E402
from skein.vae.decode import decode  # noqa: E402
from skein.vae.families import family_of  # noqa: E402
from skein.vae.memory import sliced_bytes, whole_bytes  # noqa: E402
from skein.vae.tiles import tiling_of  # noqa: E402
from skein.vae.whole import frames_in_slices  # noqa: E402
from skein.workers import release  # noqa: E402
from torch import Tensor, nn  # noqa: E402

KL = dict(
    double_z=True, z_channels=16, resolution=256, in_channels=3, out_ch=3, ch=128, ch_mult=[1, 2, 4, 4],
    num_res_blocks=2, attn_resolutions=[], dropout=0.0, conv3d=True, time_compress=4,
)  # fmt: skip
REFINER = dict(
    block_out_channels=[128, 256, 512, 1024, 1024], in_channels=3, out_channels=3, num_res_blocks=2,
    ffactor_spatial=16, ffactor_temporal=4, z_channels=32,
)  # fmt: skip
WAN = dict(dim=96, z_dim=16, dim_mult=[1, 2, 4, 4], num_res_blocks=2, temperal_downsample=[False, True, True])


def refiner() -> nn.Module:
    room = "comfy.ldm.hunyuan_video.vae_refiner"
    return AutoencodingEngine(
        regularizer_config={"target": "comfy.ldm.models.autoencoder.EmptyRegularizer"},
        encoder_config={"target": f"{room}.Encoder", "params": REFINER},
        decoder_config={"target": f"{room}.Decoder", "params": REFINER},
    )


FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "HunyuanVideo": lambda: AutoencoderKL(ddconfig=KL, embed_dim=16),
    "HunyuanVideo 1.5": refiner,
    "Wan 2.1": lambda: WanVAE(**WAN),
}


def random_vae(name: str) -> comfy.sd.VAE:
    """A VAE by ComfyUI's own detection."""
    with torch.device("meta"):
        shapes = {key: value.shape for key, value in FAMILIES[name]().state_dict().items()}
    generator, state = torch.Generator().manual_seed(0), {}
    for key, shape in shapes.items():
        if len(shape) > 1 and "gamma" not in key:
            state[key] = torch.randn(shape, generator=generator) / math.sqrt(math.prod(shape[1:]))
        else:
            state[key] = torch.full(shape, float("bias" not in key))
    return comfy.sd.VAE(sd=state)


def timed(name: str, run: Callable[[], Tensor], expected: Tensor | None) -> tuple[Tensor, dict]:
    """The second of two runs."""
    cuda = torch.cuda.is_available()
    run()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    out = run()
    row: dict = {"way": name, "seconds": time.perf_counter() - started}
    if cuda:
        row["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    if expected is not None:
        apart = (out - expected).abs()
        row |= {"largest_difference": float(apart.max()), "mean_difference": float(apart.mean())}
    print(row, flush=True)
    return out, row


def in_slices(vae: comfy.sd.VAE, latent: Tensor, carried: int) -> Tensor:
    comfy.model_management.load_models_gpu([vae.patcher])
    return frames_in_slices(vae, latent, lambda: None, lambda count: None, carried)


def measure(vae: comfy.sd.VAE, latent: Tensor, options: argparse.Namespace) -> list[dict]:
    sizes = dict(tile_size=64, overlap=16, temporal_size=8, temporal_overlap=4) if options.small else {}
    tiled = DecodeConfig("tiled", **sizes)
    tiling = tiling_of(vae, tiled)
    (frames, tile, _), (overlap_t, overlap, _) = tiling.tile, tiling.overlap
    own = "cpu" if options.cpu else str(vae.device.index or 0)
    stock, row = timed("ComfyUI, whole", lambda: vae.decode(latent), None)
    in_tiles, tiled_row = timed(
        "ComfyUI, tiled",
        lambda: vae.decode_tiled(latent, tile_x=tile, tile_y=tile, overlap=overlap, tile_t=frames, overlap_t=overlap_t),
        stock,
    )
    rows = [row, tiled_row]
    for mode, expected in (("whole", stock), ("tiled", in_tiles)):
        config = DecodeConfig(mode, own, **sizes)
        rows.append(timed(f"Skein, 1, {mode}", lambda config=config: decode(vae, latent, config), expected)[1])
    family = family_of(vae)
    assert family is not None
    if family.sliced_share is not None:
        least, carried = sliced_bytes(vae, family, latent.shape)
        for kept in (carried, 0):  # bytes of carried frames that stay on the device
            comfy.model_management.soft_empty_cache(force=True)
            name = f"Skein, 1, in slices, {kept / 2**30:.1f} GiB of carried frames on the device"
            row = timed(name, lambda kept=kept: in_slices(vae, latent, kept), stock)[1]
            rows.append(row | {"estimate_gib": (least + kept) / 2**30})
    comfy.model_management.unload_all_models()
    comfy.model_management.soft_empty_cache(force=True)
    for world in options.worlds:
        devices = tuple(["cpu"] * world if options.cpu else map(str, range(world)))
        need = whole_bytes(vae, family, latent.shape, world)
        group = shared.workers(devices, vae)
        ways = {
            "whole": (lambda group=group, need=need: shared.decode_strips(group, vae, latent, need), stock),
            "tiled": (lambda group=group: shared.decode_tiles(group, vae, latent, tiling), in_tiles),
        }
        for mode, (run, expected) in ways.items():
            row = timed(f"group of {world}, {mode}", run, expected)[1]
            peaks = [told["peak_bytes"] / 2**30 for told in group.ask_all("room", {}).values()]
            rows.append(row | {"estimate_gib": need / 2**30, "peak_gib": peaks})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in dict(width=1280, height=720, frames=129).items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--family", choices=list(FAMILIES), default="HunyuanVideo")
    parser.add_argument("--worlds", type=int, nargs="*", default=[1, 2, 4, 8])
    parser.add_argument("--cpu", action="store_true", help="workers on the CPU")
    parser.add_argument("--small", action="store_true", help="5 frames of 96 x 32")
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    if options.small:
        options.width, options.height, options.frames = 96, 32, 5
    there = 2 if options.cpu else torch.cuda.device_count()
    options.worlds = [world for world in options.worlds if world <= there]
    with torch.inference_mode():
        vae = random_vae(options.family)
        side = vae.spacial_compression_decode()
        shape = (1, vae.latent_channels, (options.frames + 3) // 4, options.height // side, options.width // side)
        latent = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        family = family_of(vae)
        assert family is not None
        estimate = whole_bytes(vae, family, shape, 1) / 2**30
        rows = measure(vae, latent, options)
        release()
    print(
        json.dumps({
            "device": device_name(), "gpus": torch.cuda.device_count(), "comfyui": comfyui_version.__version__,
            "torch": torch.__version__, "random": "weights and latent", "sizes": vars(options),
            "dtype": str(vae.vae_dtype), "estimate_gib": estimate, "runs": rows,
        })
    )  # fmt: skip


if __name__ == "__main__":
    main()
