"""How much may be reused at what loss: share of reused calls against PSNR on a trained model, the embedded one.

    make curve            (or: python3 scripts/dev.py -m bench.cache_curve [--quick] [--checkpoint FILE])

For every setting, 12 prompts are sampled with fixed seeds (20 steps euler, CFG 1, 17 frames of 192 x 192), through
ComfyUI's own sampler in this process, and compared with the uncached result as RGB previews. Core's EasyCache
runs on the same seeds. Writes bench/out/cache_curve.json and .png, prints a table, ends with one JSON line.
The model is trained; nothing is random but the seeded noise.
"""

import argparse
import itertools
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
from pack import load_pack  # noqa: E402

load_pack()

import comfyui_version  # noqa: E402
import torch  # noqa: E402
from skein import engine  # noqa: E402
from skein.bench.previews import compare, sampled  # noqa: E402
from skein.bench.trained import EMBEDDED, load_trained_model  # noqa: E402
from skein.demo.sampling import PROMPTS  # noqa: E402
from skein.plan import CacheConfig  # noqa: E402
from skein.report import recent_runs  # noqa: E402

OUT = ROOT / "bench" / "out"
THRESHOLDS = (0.02, 0.04, 0.06, 0.08, 0.1, 0.12, 0.15, 0.2, 0.25, 0.3)
QUICK = (0.06, 0.1, 0.15, 0.2)
FAMILIES: dict[str, dict] = {
    "fit, order 2 (default)": dict(order=2, predictor="fit"),
    "fit, order 1": dict(order=1, predictor="fit"),
    "taylor, order 1": dict(order=1, predictor="taylor"),
    "taylor, order 2": dict(order=2, predictor="taylor"),
    "reuse (order 0)": dict(order=0),
    "fit, order 2, accumulate": dict(order=2, predictor="fit", accumulate=True),
    "fit, order 2, 2 hits": dict(order=2, predictor="fit", max_consecutive_hits=2),
    "fit, order 2, 3 hits": dict(order=2, predictor="fit", max_consecutive_hits=3),
}
EASYCACHE = (0.05, 0.1, 0.2)  # reuse thresholds; 0.2 is its default


def measure(prepare: Callable, reused: Callable[[], int], model, references: list, steps: int) -> dict:
    """Share of reused calls (mean, least, most) and PSNR over the prompts."""
    shares: list[float] = []
    quality = compare(prepare, model, references, steps, lambda: shares.append(reused() / steps))
    return {"reused": sum(shares) / len(shares), "least": min(shares), "most": max(shares), **quality}


def easycache(threshold: float) -> tuple[Callable, Callable[[], int]]:
    """Core's EasyCache at its other defaults; its skipped steps are read off its log line's source."""
    from comfy_extras.nodes_easycache import EasyCacheHolder, EasyCacheNode

    skipped = []
    original = EasyCacheHolder.reset

    def prepare(model):
        skipped.clear()
        patched = EasyCacheNode.execute(model, threshold, 0.15, 0.95, False)[0]
        holder = patched.model_options["transformer_options"]["easycache"]

        def clone():
            copy = type(holder).clone(holder)
            copy.reset = lambda: (skipped.append(copy.total_steps_skipped), original(copy))[1]
            return copy

        holder.clone = clone
        return patched

    return prepare, lambda: skipped[0]


def at_share(points: list[dict], share: float, key: str) -> float | None:
    """Linear interpolation of `key` at a share of reused calls; None outside the curve."""
    points = sorted(points, key=lambda point: point["reused"])
    for low, high in itertools.pairwise(points):
        if low["reused"] <= share <= high["reused"] and high["reused"] > low["reused"]:
            part = (share - low["reused"]) / (high["reused"] - low["reused"])
            return round(low[key] + part * (high[key] - low[key]), 2)
    return None


def draw(curves: dict[str, list[dict]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(8, 5), layout="constrained")
    for name, points in curves.items():
        points = sorted(points, key=lambda point: point["reused"])
        axis.plot([100 * p["reused"] for p in points], [p["psnr_mean"] for p in points], marker="o", label=name)
    axis.set_xlabel("model calls reused, %")
    axis.set_ylabel("PSNR of RGB previews, dB (mean of 12 prompts)")
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=f"thresholds {QUICK} only")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--checkpoint", type=Path, default=EMBEDDED, help="another that demo/train.py has made")
    parser.add_argument(
        "--no-easycache", action="store_true", help="leave EasyCache out, where ComfyUI's server cannot be imported"
    )
    options = parser.parse_args()
    thresholds = QUICK if options.quick else THRESHOLDS
    started = time.monotonic()
    with torch.inference_mode():
        model = load_trained_model(options.checkpoint)
        references = sampled(model, options.steps)
        curves: dict[str, list[dict]] = {}
        jobs = [
            (name, threshold, lambda m, s=settings, t=threshold: engine.edit(m, cache=CacheConfig(threshold=t, **s)),
             lambda: recent_runs()[-1].reused)
            for name, settings in FAMILIES.items() for threshold in thresholds
        ]  # fmt: skip
        if not options.no_easycache:
            jobs += [("EasyCache (core)", threshold, *easycache(threshold)) for threshold in EASYCACHE]
        for name, threshold, prepare, reused in jobs:
            point = {"threshold": threshold, **measure(prepare, reused, model, references, options.steps)}
            curves.setdefault(name, []).append(point)
            print(
                f"{name:26s} {threshold:5.2f}  reused {100 * point['reused']:5.1f} %  "
                f"mean {point['psnr_mean']:5.2f} dB  worst {point['psnr_worst']:5.2f} dB",
                flush=True,
            )
    OUT.mkdir(exist_ok=True)
    (OUT / "cache_curve.json").write_text(json.dumps(curves, indent=1))
    draw(curves, OUT / "cache_curve.png")
    result = {
        "prompts": len(PROMPTS),
        "steps": options.steps,
        "checkpoint": options.checkpoint.parent.name,
        "psnr_mean_at_half": {name: at_share(points, 0.5, "psnr_mean") for name, points in curves.items()},
        "psnr_mean_at_two_thirds": {name: at_share(points, 2 / 3, "psnr_mean") for name, points in curves.items()},
        "psnr_worst_at_half": {name: at_share(points, 0.5, "psnr_worst") for name, points in curves.items()},
        "comfyui": comfyui_version.__version__,
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"{platform.machine()} {os.cpu_count()} cores",
        "minutes": round((time.monotonic() - started) / 60, 1),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
