"""A whole run on this GPU: all blocks, stock ComfyUI and Skein in one process.

    python3 -m bench.full_run [--model "FLUX.1 dev"] [--latent 1 16 17 68 120] [--steps 30] [--blocks 2 4]

Weights are random (bench/random_model.py), so times and memory are true and the share of reused calls is that of
random weights; "half reused" reuses every second call, whatever has changed. No classifier-free guidance. Each path
samples two steps first, which loads, compiles and quantizes; then the run that is what every later prompt takes. Prints
wall seconds of both, peak memory and reused calls; ends with one JSON line.
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
from skein.bench.random_model import add_arguments, chosen, inputs, random_model  # noqa: E402
from skein.bench.timing import device_name  # noqa: E402
from skein.demo.sampling import sample  # noqa: E402
from skein.plan import AttentionConfig, CacheConfig, CompileConfig, FP8Config, Plan, SparseConfig  # noqa: E402
from skein.report import recent_runs  # noqa: E402

EVERY_SECOND = CacheConfig(threshold=1.0, max_consecutive_hits=1)
QUARTER = SparseConfig(rule="density", density=0.25)
PATHS = {
    "stock": Plan(),
    "cache": Plan(cache=CacheConfig()),
    "attention + compile": Plan(attention=AttentionConfig(), compile=CompileConfig()),
    "attention + compile + fp8": Plan(None, AttentionConfig(), FP8Config(), CompileConfig()),
    "half reused": Plan(cache=EVERY_SECOND),
    "half reused + attention + compile": Plan(EVERY_SECOND, AttentionConfig(), None, CompileConfig()),
    "half reused + attention + compile + fp8": Plan(EVERY_SECOND, AttentionConfig(), FP8Config(), CompileConfig()),
    "cache + attention + compile": Plan(CacheConfig(), AttentionConfig(), None, CompileConfig()),
    "cache + attention + compile + fp8": Plan(CacheConfig(), AttentionConfig(), FP8Config(), CompileConfig()),
    "attention + compile + fp8, density 0.25": Plan(
        None, AttentionConfig(), FP8Config(), CompileConfig(), None, QUARTER
    ),
    "half reused + attention + compile + fp8, density 0.25": Plan(
        EVERY_SECOND, AttentionConfig(), FP8Config(), CompileConfig(), None, QUARTER
    ),
    "all, 8-bit attention": Plan(CacheConfig(), AttentionConfig(allow_8bit=True), FP8Config(), CompileConfig()),
}


def measure(name: str, plan: Plan, model, inputs: dict) -> dict:
    cuda = model.load_device.type == "cuda"
    comfy.model_management.unload_all_models()
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    planned, seconds = engine.edit(model, **vars(plan)), []
    for steps in (2, inputs["steps"]):
        started = time.perf_counter()
        output = sample(planned, **{**inputs, "steps": steps})
        seconds.append(time.perf_counter() - started)
    run = recent_runs()[-1] if plan.cache else None
    row = {
        "path": name, "first_s": seconds[0], "wall_s": seconds[1],
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if cuda else None,
        "calls": len(run.calls) if run else inputs["steps"], "reused": run.reused if run else 0,
        "finite": bool(torch.isfinite(output).all()),
    }  # fmt: skip
    print(row, flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--paths", nargs="*", default=list(PATHS))
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("skein").setLevel(logging.INFO)
    case = chosen(options)
    with torch.inference_mode():
        model = random_model(case)
        rows = [measure(name, PATHS[name], model, inputs(case, options.steps)) for name in options.paths]
    print(
        json.dumps({
            "device": device_name(), "comfyui": comfyui_version.__version__, "torch": torch.__version__,
            "random": "weights and conditioning", "sizes": vars(options), "runs": rows,
        })
    )  # fmt: skip


if __name__ == "__main__":
    main()
