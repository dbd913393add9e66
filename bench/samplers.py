"""What the cache does under each of ComfyUI's samplers: share of reused calls and PSNR on the embedded model.

    python3 -m bench.samplers [--threshold 0.06] [--steps 20] [--prompts 2] [--cfg 1] [NAME ...]

Through ComfyUI's own sampler in this process, scheduler "simple", 9 frames of 128 x 128, fixed seeds, against the same
run without the cache, as RGB previews. Gain is what a sampler makes of a small lasting fault of the model: the relative
error of its latent where each output is off by 0.1 %, by channel, the same in all calls of a conditioning, in units of
that. A sampler with a large gain loses more by the same cache. The model is trained; nothing is random but the seeded
noise. Ends with one JSON line.
"""

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
from pack import load_pack  # noqa: E402

load_pack()

import comfy.samplers  # noqa: E402
import comfyui_version  # noqa: E402
import torch  # noqa: E402
from skein import engine  # noqa: E402
from skein.bench.errors import relative_error  # noqa: E402
from skein.bench.previews import frames  # noqa: E402
from skein.bench.timing import device_name  # noqa: E402
from skein.demo.sampling import PROMPTS, load_demo_model, sample  # noqa: E402
from skein.demo.video import psnr  # noqa: E402
from skein.plan import CacheConfig  # noqa: E402
from skein.report import recent_runs  # noqa: E402

SHAPE = (1, 16, 3, 16, 16)
FAULT = 1e-3


def faulty(model):
    """The model with a small fault in each output: one of its own for each conditioning."""

    def around(call, given):
        outputs = call(given["input"], given["timestep"], **given["c"]).chunk(len(given["cond_or_uncond"]))
        faults = [off_by(out, which) for out, which in zip(outputs, given["cond_or_uncond"])]
        return torch.cat([out + fault for out, fault in zip(outputs, faults)])

    def off_by(out, seed):
        channels = torch.randn(out.shape[1], generator=torch.Generator().manual_seed(seed)).to(out)
        return FAULT * out.std() * channels.view(1, -1, *[1] * (out.ndim - 2))

    model = model.clone()
    model.set_model_unet_function_wrapper(around)
    return model


def measure(model, name: str, options: argparse.Namespace) -> dict:
    cached = engine.edit(model, cache=CacheConfig(threshold=options.threshold))
    calls, reused, qualities, gains = 0, 0, [], []
    for seed, prompt in enumerate(PROMPTS[: options.prompts], 100):
        arguments = dict(seed=seed, steps=options.steps, cfg=options.cfg, sampler=name, shape=SHAPE)
        stock = sample(model, prompt, **arguments)
        out = sample(cached, prompt, **arguments)
        run = recent_runs()[-1]
        calls, reused = calls + len(run.calls), reused + run.reused
        qualities.append(psnr(frames(out, model), frames(stock, model)))
        gains.append(relative_error(sample(faulty(model), prompt, **arguments), stock) / FAULT)
    return {
        "sampler": name,
        "calls": calls // options.prompts,
        "reused": round(reused / calls, 3),
        "psnr_mean": round(sum(qualities) / len(qualities), 2),
        "psnr_worst": round(min(qualities), 2),
        "gain": round(sum(gains) / len(gains), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("samplers", nargs="*", metavar="NAME", help="all by default")
    parser.add_argument("--threshold", type=float, default=0.06)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--prompts", type=int, default=2)
    parser.add_argument("--cfg", type=float, default=1.0)
    options = parser.parse_args()
    rows = []
    with torch.inference_mode():
        model = load_demo_model()
        for name in options.samplers or comfy.samplers.SAMPLER_NAMES:
            row = measure(model, name, options)
            rows.append(row)
            print(
                f"{name:30s} {row['calls']:3d} calls  reused {100 * row['reused']:5.1f} %  "
                f"mean {row['psnr_mean']:5.2f} dB  worst {row['psnr_worst']:5.2f} dB  gain {row['gain']:5.2f}",
                flush=True,
            )
    settings = {name: value for name, value in vars(options).items() if name != "samplers"}
    print(json.dumps({"device": device_name(), "comfyui": comfyui_version.__version__, **settings, "samplers": rows}))


if __name__ == "__main__":
    main()
