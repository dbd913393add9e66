"""What the inexact techniques cost: PSNR of RGB previews on the embedded model against the exact run.

    python3 -m bench.quality [--steps 20]

12 prompts, fixed seeds, euler, CFG 1, 17 frames of 192 x 192. The reference runs in the same type on the same machine,
with an exact attention kernel and nothing else. The model is trained; nothing is random but the seeded noise. Ends with
one JSON line.
"""

import argparse
import json
import logging
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
from pack import load_pack  # noqa: E402

load_pack()

import comfyui_version  # noqa: E402
import torch  # noqa: E402
from skein import engine  # noqa: E402
from skein.bench.previews import compare, sampled  # noqa: E402
from skein.bench.timing import device_name  # noqa: E402
from skein.demo.sampling import load_demo_model  # noqa: E402
from skein.plan import AttentionConfig, CacheConfig, CompileConfig, FP8Config, Plan  # noqa: E402
from skein.report import recent_runs  # noqa: E402

EXACT = AttentionConfig()
PLANS: dict[str, Plan] = {
    "stock attention": Plan(),
    "compile": Plan(attention=EXACT, compile=CompileConfig()),
    **{
        f"8-bit attention, {steps} + {steps} exact steps": Plan(
            attention=AttentionConfig(kernel, allow_8bit=True, exact_steps=steps)
        )
        for kernel in ("flash3",)
        for steps in (0, 1, 2, 3, 5)
    },
    "8-bit attention (sage), 2 + 2 exact steps": Plan(attention=AttentionConfig("sage", allow_8bit=True)),
    **{
        f"FP8 {mode}, modulation {'FP8' if modulation else 'as it is'}": Plan(
            attention=EXACT, fp8=FP8Config(mode, modulation)
        )
        for mode in ("per_row", "per_tensor", "weight_only")
        for modulation in (True, False)
    },
    "cache 0.06": Plan(attention=EXACT, cache=CacheConfig(0.06)),
    "cache 0.06 + FP8 per_row": Plan(attention=EXACT, cache=CacheConfig(0.06), fp8=FP8Config()),
    "all: cache, FP8, 8-bit attention, compile": Plan(
        CacheConfig(), AttentionConfig("flash3", allow_8bit=True), FP8Config(), CompileConfig()
    ),
}


def measure(plan: Plan, model, references: list, steps: int) -> dict:
    edited = engine.edit(model, **vars(plan))
    reused: list[int] = []
    after_each = (lambda: reused.append(recent_runs()[-1].reused)) if plan.cache else (lambda: None)
    quality = compare(lambda _: edited, model, references, steps, after_each)
    return {**quality, "reused": sum(reused) / (len(reused) * steps) if reused else None}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    rows = []
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("skein").setLevel(logging.INFO)
    with torch.inference_mode():
        model = load_demo_model()
        exact = engine.edit(model, attention=EXACT)
        references = sampled(exact, options.steps)
        for name, plan in PLANS.items():
            rows.append({"plan": name, **measure(plan, model, references, options.steps)})
            share = f"  reused {100 * rows[-1]['reused']:.0f} %" if plan.cache else ""
            quality = f"mean {rows[-1]['psnr_mean']:5.2f} dB  worst {rows[-1]['psnr_worst']:5.2f} dB"
            print(f"{name:45s} {quality}{share}", flush=True)
        dtype = str(model.model.get_dtype_inference())
    print(json.dumps({"device": device_name(), "comfyui": comfyui_version.__version__, "dtype": dtype, "plans": rows}))


if __name__ == "__main__":
    main()
