"""Several ranks on one GPU: is what many GPUs compute together right, where there is but one?

    python3 -m bench.one_card
    python3 -m bench.one_card --cpu --small

NCCL refuses a GPU that two ranks of one host name. So each worker says that it is a host of its own (NCCL_HOSTID), and
they talk over the loopback. What they compute, how NCCL is asked and what memory it takes are as on several GPUs; times
are not, and none is printed. The 13 B model's width, 2 + 2 blocks, random weights; a VAE of true size, random weights.
Prints relative errors to one process; ends with one JSON line.
"""

import argparse
import json
import logging
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
from pack import load_pack  # noqa: E402

load_pack()

import comfy.sd  # noqa: E402
import comfyui_version  # noqa: E402
import torch  # noqa: E402
from skein import engine  # noqa: E402
from skein.attributes import changed  # noqa: E402
from skein.bench import random_model as models  # noqa: E402
from skein.bench.errors import relative_error  # noqa: E402
from skein.bench.timing import device_name  # noqa: E402
from skein.bench.vae import random_vae  # noqa: E402
from skein.demo.sampling import sample  # noqa: E402
from skein.plan import AttentionConfig, CacheConfig, CompileConfig, DecodeConfig, FP8Config, ParallelConfig  # noqa: E402
from skein.report import recent_runs  # noqa: E402
from skein.vae import decode  # noqa: E402
from skein.workers import release, wanted  # noqa: E402

OTHER_CARD = Path(__file__).resolve().parent / "other_card"
EXACT = dict(attention=AttentionConfig())
EVERYTHING = dict(EXACT, cache=CacheConfig(threshold=0.6, start_percent=0.0), fp8=FP8Config(), compile=CompileConfig())
CASES = [  # plan, workers, Ulysses degree (0: measured)
    ("exact", EXACT, 2, 2), ("exact", EXACT, 2, 1), ("exact", EXACT, 3, 3), ("exact", EXACT, 4, 2),
    ("exact", EXACT, 4, 0), ("everything", EVERYTHING, 2, 2), ("everything", EVERYTHING, 2, 1),
]  # fmt: skip
SIZES = {"exact": (1280, 720, 33), "everything": (1280, 720, 33), "small": (128, 96, 9)}


@contextmanager
def workers_on_one_card(world: int, device: str = "0", **environment: str) -> Iterator[None]:
    """Within: "all" devices are `world` times the same one, for workers that start here. environment: more for them."""
    path = [str(OTHER_CARD), *filter(None, [os.environ.get("PYTHONPATH")])]
    told = {"PYTHONPATH": os.pathsep.join(path), "SKEIN_HOST_EACH": "1", "NCCL_SOCKET_IFNAME": "lo", **environment}
    names = (device,) * world
    try:
        with (
            mock.patch.dict(os.environ, told),
            changed([(module, "visible_devices", lambda _: names) for module in (engine, wanted, decode)]),
        ):
            yield
    finally:
        release()


def sampled(model, plan: dict, size: tuple[int, int, int]) -> tuple[torch.Tensor, list[bool]]:
    """The result, and which calls the cache reused."""
    latent, known = torch.zeros(models.latent_shape(*size)), recent_runs()
    out = sample(engine.edit(model, **plan), models.conditioning(60), latent=latent, steps=6)
    return out, [call.reused for run in recent_runs() if run not in known for call in run.calls]


def sampling(model, device: str, small: bool) -> list[dict]:
    rows = []
    for name, plan, world, ulysses in CASES:
        size = SIZES["small" if small else name]
        one, decisions = sampled(model, plan, size)
        with workers_on_one_card(world, device):
            many, theirs = sampled(model, {**plan, "parallel": ParallelConfig("all", ulysses)}, size)
        error = relative_error(many, one)
        rows.append({"plan": name, "world": world, "ulysses": ulysses, "error": error})
        if decisions:
            rows[-1] |= {"reused": sum(theirs), "as_one": theirs == decisions}
        print(rows[-1], flush=True)
    return rows


def decoding(device: str, small: bool) -> list[dict]:
    rows, vae = [], random_vae("HunyuanVideo")
    size = (64, 96, 5) if small else (1280, 720, 33)
    latent = torch.randn(models.latent_shape(*size), generator=torch.Generator().manual_seed(1))
    stock = vae.decode(latent)
    for world in (2, 3):
        with workers_on_one_card(world, device):
            for mode in ("whole", "tiled"):
                config = replace(DecodeConfig(), mode=mode, devices=",".join(map(str, range(world))))
                apart = (decode.decode(vae, latent, config) - stock).abs()
                row = {"decode": mode, "world": world, "mean": float(apart.mean()), "largest": float(apart.max())}
                rows.append(row)
                print(row, flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu", action="store_true", help="workers on the CPU")
    parser.add_argument("--small", action="store_true", help="a small model and sizes, to see that it runs")
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("skein").setLevel(logging.INFO)
    device, hidden = "cpu" if options.cpu else "0", 512 if options.small else models.HIDDEN
    with torch.inference_mode(), tempfile.TemporaryDirectory() as folder:
        model = comfy.sd.load_diffusion_model(models.random_checkpoint(folder, models.hunyuan_video(2, 2, hidden)))
        rows = sampling(model, device, options.small) + decoding(device, options.small)
    print(
        json.dumps({
            "device": device_name(), "comfyui": comfyui_version.__version__, "torch": torch.__version__,
            "random": "weights, conditioning and latents", "runs": rows,
        })
    )  # fmt: skip


if __name__ == "__main__":
    main()
