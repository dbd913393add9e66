"""The 13 B model at full size on cards smaller than this machine's: each worker may take so many GB and no more.

    python3 -m bench.small_card [--gb 24] [--world 1] [--steps 2]

Workers get an allocator that fails beyond that share of the card, and ComfyUI's --reserve-vram for the rest, so that
its partial loading knows. All 60 blocks, random weights; FP8, attention and compiled blocks. Prints what the workers
hold at the end of the run (their allocators keep what the peak took) and the estimate; ends with one JSON line.
"""

import argparse
import json
import logging
import os
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
from pack import load_pack  # noqa: E402

load_pack()

import comfy.cli_args  # noqa: E402
import comfy.sd  # noqa: E402
import torch  # noqa: E402
from skein import engine, live  # noqa: E402
from skein.bench import random_model as models  # noqa: E402
from skein.bench.timing import device_name  # noqa: E402
from skein.demo.sampling import sample  # noqa: E402
from skein.estimate import Load, work_bytes  # noqa: E402
from skein.parallel import release  # noqa: E402
from skein.plan import AttentionConfig, CompileConfig, FP8Config, ParallelConfig, Plan  # noqa: E402

TEXT = 60


def shrink(gb: float, context: float = 0.7e9) -> None:
    """Have workers that start from here on take so much at most, a CUDA context included."""
    total = torch.cuda.get_device_properties(0).total_memory
    os.environ["PYTORCH_ALLOC_CONF"] = f"per_process_memory_fraction:{(gb * 1e9 - context) / total:.4f}"
    comfy.cli_args.args.reserve_vram = (total - gb * 1e9) / 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in dict(
        width=1280, height=720, frames=129, world=1, steps=2, double=models.DOUBLE, single=models.SINGLE
    ).items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--gb", type=float, default=24.0)
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("skein").setLevel(logging.INFO)
    shrink(options.gb)
    devices = ",".join(map(str, range(options.world)))
    plan = Plan(None, AttentionConfig(), FP8Config(), CompileConfig(), ParallelConfig(devices))
    latent = torch.zeros(models.latent_shape(options.width, options.height, options.frames))
    tokens = latent.shape[2] * latent.shape[3] * latent.shape[4] // 4
    estimate = work_bytes(Load(tokens, TEXT, models.HIDDEN), plan, options.world)
    with torch.inference_mode(), tempfile.TemporaryDirectory() as folder:
        model = comfy.sd.load_diffusion_model(models.random_checkpoint(folder, options.double, options.single))
        started = time.perf_counter()
        out = sample(engine.edit(model, **vars(plan)), models.conditioning(TEXT), latent=latent, steps=options.steps)
        seconds = time.perf_counter() - started
        held = [each["memory_used"] for each in live.snapshot()["processes"] if each["rank"] is not None]
        release()
    print(
        json.dumps({
            "device": device_name(), "gb": options.gb, "world": options.world, "finite": bool(out.isfinite().all()),
            "run_s": seconds, "held_gb": [value / 1e9 for value in held], "estimated_work_gb": estimate / 1e9,
            "random": "weights and conditioning", "sizes": vars(options),
        })
    )  # fmt: skip


if __name__ == "__main__":
    main()
