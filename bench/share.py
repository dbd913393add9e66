"""A share of calls asked for: what was reached, and at what loss, on a trained model, the embedded one.

    python3 scripts/dev.py -m bench.share [--checkpoint FILE] [--prompts 12] [--only quality reached thresholds]

Quality: the prompts of demo/sampling.py with fixed seeds (20 steps euler, CFG 1, 17 frames of 192 x 192), through
ComfyUI's own sampler in this process, against the same without the cache, as RGB previews: with a share asked for, by
order 2 and by plain reuse (order 0), and with one threshold for all prompts. Reached: the share of a run's calls under
several samplers, numbers of steps and CFG (9 frames of 128 x 128, two prompts), and by how many points it misses what
was asked. The model is trained; nothing is random but the seeded noise. Ends with one JSON line.
"""

import argparse
import itertools
import json
import sys
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
from pack import load_pack  # noqa: E402

load_pack()

import torch  # noqa: E402
from skein import engine  # noqa: E402
from skein.bench.cache_curve import measure  # noqa: E402
from skein.bench.previews import compare, sampled  # noqa: E402
from skein.bench.timing import device_name  # noqa: E402
from skein.bench.trained import EMBEDDED, load_trained_model  # noqa: E402
from skein.demo.sampling import PROMPTS, sample  # noqa: E402
from skein.plan import CacheConfig  # noqa: E402
from skein.report import recent_runs  # noqa: E402

SHARES = (1 / 3, 0.45, 0.5, 0.55, 0.66)
WAYS = {
    "order 2": [dict(reuse_share=share) for share in SHARES],
    "plain reuse": [dict(reuse_share=share, order=0) for share in SHARES],
    "one threshold": [dict(threshold=threshold) for threshold in (0.04, 0.06, 0.07, 0.08, 0.1, 0.12, 0.15, 0.2, 0.25)],
}
PARTS = ("quality", "reached", "thresholds")
STEPS = 20
SAMPLERS, COUNTS, CFGS = ("euler", "heun", "dpmpp_2m"), (12, 20, 30, 50), (1.0, 3.0)
SMALL = (1, 16, 3, 16, 16)
THRESHOLDS, FEW_TO_MANY, SHORT = (0.04, 0.06, 0.08, 0.12), (12, 20, 35), (1, 16, 3, 24, 24)


def reused_calls() -> int:
    return recent_runs()[-1].reused


def quality(model, prompts: int) -> list[dict]:
    references = sampled(model, STEPS, prompts)
    rows = []
    for way, settings in ((way, each) for way, all_settings in WAYS.items() for each in all_settings):

        def prepare(patcher, settings=settings):
            return engine.edit(patcher, cache=CacheConfig(**settings))

        row = {"way": way, **settings, **measure(prepare, reused_calls, model, references, STEPS)}
        rows.append(row)
        value = settings.get("reuse_share", settings.get("threshold"))
        print(
            f"{way:14s} {value:5.2f}  reused {100 * row['reused']:5.1f} % ({100 * row['least']:.0f} to "
            f"{100 * row['most']:.0f})  mean {row['psnr_mean']:5.2f} dB  worst {row['psnr_worst']:5.2f} dB",
            flush=True,
        )
    return rows


def reached(model) -> list[dict]:
    rows: list[dict] = []
    for sampler, steps in itertools.product(SAMPLERS, COUNTS):
        own = []
        for cfg, share, (seed, prompt) in itertools.product(CFGS, (1 / 3, 1 / 2, 2 / 3), enumerate(PROMPTS[:2], 100)):
            patched = engine.edit(model, cache=CacheConfig(reuse_share=share))
            sample(patched, prompt, seed=seed, steps=steps, cfg=cfg, sampler=sampler, shape=SMALL)
            run = recent_runs()[-1]
            own.append({"cfg": cfg, "asked": share, "reached": run.reused / len(run.calls)})
        misses = [100 * (row["reached"] - row["asked"]) for row in own]
        print(f"{sampler:10s} {steps:3d} steps: {min(misses):+5.1f} to {max(misses):+5.1f} points", flush=True)
        rows += [{"sampler": sampler, "steps": steps, **row} for row in own]
    return rows


def thresholds(model) -> list[dict]:
    rows: list[dict] = []
    for steps in FEW_TO_MANY:
        references = sampled(model, steps, 4, shape=SHORT)
        for threshold in THRESHOLDS:
            reused: list[float] = []
            quality = compare(
                lambda patcher, threshold=threshold: engine.edit(patcher, cache=CacheConfig(threshold)),
                *(model, references, steps, lambda reused=reused, steps=steps: reused.append(reused_calls() / steps)),
                shape=SHORT,
            )
            rows.append({"steps": steps, "threshold": threshold, "reused": sum(reused) / len(reused), **quality})
            print(
                f"{steps:3d} steps, {threshold:5.2f}  reused {100 * rows[-1]['reused']:5.1f} %  "
                f"mean {quality['psnr_mean']:5.2f} dB  worst {quality['psnr_worst']:5.2f} dB",
                flush=True,
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=EMBEDDED, help="another that demo/train.py has made")
    parser.add_argument("--prompts", type=int, default=len(PROMPTS))
    parser.add_argument("--only", nargs="*", choices=PARTS, default=PARTS, help="parts of it")
    options = parser.parse_args()
    parts = {"quality": partial(quality, prompts=options.prompts), "reached": reached, "thresholds": thresholds}
    with torch.inference_mode():
        model = load_trained_model(options.checkpoint)
        found: dict[str, list[dict]] = {name: parts[name](model) if name in options.only else [] for name in PARTS}
    misses = [abs(row["reached"] - row["asked"]) for row in found["reached"]]
    print(json.dumps({"device": device_name(), **found, "largest_miss": max(misses, default=None)}))


if __name__ == "__main__":
    main()
