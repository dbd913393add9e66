"""A whole run of the 13 B model on this GPU: all blocks, 30 steps, stock ComfyUI and Skein in one process.

    python3 -m bench.full_run [--width 960 --height 544 --frames 65 --steps 30]

Weights are random (bench/random_model.py), so times and memory are true and the share of reused calls is that of random
weights. Prints wall seconds, peak memory and reused calls of each path; ends with one JSON line.
"""

import argparse
import json
import logging
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
from pack import load_pack  # noqa: E402

load_pack()

import comfy.model_management  # noqa: E402
import comfyui_version  # noqa: E402
import torch  # noqa: E402
from skein import engine  # noqa: E402
from skein.bench import random_model as models  # noqa: E402
from skein.bench.timing import device_name  # noqa: E402
from skein.demo.sampling import sample  # noqa: E402
from skein.plan import AttentionConfig, CacheConfig, CompileConfig, FP8Config, Plan  # noqa: E402
from skein.report import recent_runs  # noqa: E402

PATHS = {
    "stock": Plan(),
    "cache": Plan(cache=CacheConfig()),
    "cache + attention + compile": Plan(CacheConfig(), AttentionConfig(), None, CompileConfig()),
    "cache + attention + compile + fp8": Plan(CacheConfig(), AttentionConfig(), FP8Config(), CompileConfig()),
    "all, 8-bit attention": Plan(CacheConfig(), AttentionConfig(allow_8bit=True), FP8Config(), CompileConfig()),
}


def measure(name: str, plan: Plan, model, latent: torch.Tensor, steps: int) -> dict:
    cuda = model.load_device.type == "cuda"
    comfy.model_management.unload_all_models()
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    output = sample(engine.edit(model, **vars(plan)), models.conditioning(60), latent=latent, steps=steps)
    seconds = time.perf_counter() - started
    run = recent_runs()[-1] if plan.cache else None
    row = {
        "path": name, "wall_s": seconds,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if cuda else None,
        "calls": len(run.calls) if run else steps, "reused": run.reused if run else 0,
        "finite": bool(torch.isfinite(output).all()),
    }  # fmt: skip
    print(row, flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in dict(
        width=960, height=544, frames=65, steps=30, double=models.DOUBLE, single=models.SINGLE, hidden=models.HIDDEN
    ).items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--paths", nargs="*", default=list(PATHS))
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("skein").setLevel(logging.INFO)
    with torch.inference_mode():
        model = models.random_model(options.double, options.single, options.hidden)
        latent = torch.zeros(models.latent_shape(options.width, options.height, options.frames))
        rows = [measure(name, PATHS[name], model, latent, options.steps) for name in options.paths]
    print(
        json.dumps({
            "device": device_name(), "comfyui": comfyui_version.__version__, "torch": torch.__version__,
            "random": "weights and conditioning", "sizes": vars(options), "runs": rows,
        })
    )  # fmt: skip


if __name__ == "__main__":
    main()
