"""Every technique under ComfyUI's dynamic VRAM, which its server switches on for NVIDIA GPUs: does each still work?

    python3 -m bench.dynamic_vram

Switches dynamic VRAM on as ComfyUI's main.py does, loads a random HunyuanVideo of true width from a file (2 + 4 blocks,
480 x 272 x 17 frames, 4 steps) and samples with each technique, all of them, one worker, and stock before and after;
then decodes with a random VAE of true size in this process and in that worker. Prints the relative error to stock and
whether stock came back to the bit; ends with one JSON line.
"""

import json
import logging
import sys
import tempfile
from pathlib import Path

import comfy_aimdo.control

comfy_aimdo.control.init()  # before torch, as ComfyUI does

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
from pack import load_pack  # noqa: E402

load_pack()

import comfy.sd  # noqa: E402
import torch  # noqa: E402
from skein import engine  # noqa: E402
from skein.bench import random_model as models  # noqa: E402
from skein.bench.errors import relative_error  # noqa: E402
from skein.bench.loading import switch_dynamic_on  # noqa: E402
from skein.bench.timing import device_name  # noqa: E402
from skein.bench.vae import random_vae  # noqa: E402
from skein.demo.sampling import sample  # noqa: E402
from skein.plan import (  # noqa: E402
    AttentionConfig,
    CacheConfig,
    CompileConfig,
    DecodeConfig,
    FP8Config,
    ParallelConfig,
    Plan,
)  # fmt: skip
from skein.vae import shared  # noqa: E402
from skein.vae.decode import decode  # noqa: E402
from skein.workers import release  # noqa: E402

EVERYTHING = dict(
    cache=CacheConfig(), attention=AttentionConfig(kernel="flash2"), fp8=FP8Config(), compile=CompileConfig()
)
PLANS = {
    **{name: Plan(**{name: config}) for name, config in EVERYTHING.items()},
    "all": Plan(**EVERYTHING),
    "all again": Plan(**EVERYTHING),
    "one worker": Plan(parallel=ParallelConfig("0")),
    "all, one worker": Plan(**EVERYTHING, parallel=ParallelConfig("0")),
}


def decodes() -> list[dict]:
    vae = random_vae("HunyuanVideo")
    latent = torch.randn(models.latent_shape(480, 272, 17), generator=torch.Generator().manual_seed(1))
    stock = vae.decode(latent)
    ways = {
        "decode, this process": lambda: decode(vae, latent, DecodeConfig("whole", "0")),
        "decode, one worker": lambda: shared.decode_strips(shared.workers(("0",), vae), vae, latent, 0),
    }
    rows = []
    for name, run in ways.items():
        error = relative_error(run(), stock)
        rows.append({"plan": name, "error": error, "stock_is_back": torch.equal(vae.decode(latent), stock)})
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("skein").setLevel(logging.INFO)
    switch_dynamic_on()
    comfy_aimdo.control.set_log_warning()
    rows = []
    with torch.inference_mode(), tempfile.TemporaryDirectory() as folder:
        model = comfy.sd.load_diffusion_model(models.random_checkpoint(folder, models.hunyuan_video(2, 4)))
        arguments = dict(latent=torch.zeros(models.latent_shape(480, 272, 17)), steps=4)
        stock = sample(model, models.conditioning(60), **arguments)
        for name, plan in PLANS.items():
            out = sample(engine.edit(model, **vars(plan)), models.conditioning(60), **arguments)
            back = torch.equal(sample(model, models.conditioning(60), **arguments), stock)
            error = relative_error(out, stock)
            rows.append({"plan": name, "error": error, "stock_is_back": back})
            print(rows[-1], flush=True)
        rows += decodes()
        release()
    print(json.dumps({"device": device_name(), "dynamic": model.is_dynamic(), "plans": rows}))


if __name__ == "__main__":
    main()
