"""Record runs of the embedded model at several thresholds, to hold the panel's estimates against (tests/ui).

    python3 scripts/dev.py -m bench.estimates

Each prompt is sampled at each threshold with one seed, so every run says what another threshold would have done. Writes
tests/ui/recorded_runs.json (the changes and decisions of each run), ends with one JSON line. The model is trained;
nothing is random but the seeded noise.
"""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
from pack import load_pack  # noqa: E402

load_pack()

import torch  # noqa: E402
from skein import engine  # noqa: E402
from skein.demo.sampling import PROMPTS, load_demo_model, sample  # noqa: E402
from skein.plan import CacheConfig  # noqa: E402
from skein.report import recent_runs  # noqa: E402

FILE = ROOT / "tests" / "ui" / "recorded_runs.json"
THRESHOLDS = (0.03, 0.06, 0.09, 0.12, 0.16, 0.2, 0.25, 0.3)
# Name -> sampling, cache, prompts by number.
FAMILIES: dict[str, tuple[dict, dict, range]] = {
    "euler": (dict(steps=24), {}, range(5)),
    "dpmpp_2m": (dict(steps=12, sampler="dpmpp_2m"), {}, range(5, 8)),
    "order 0": (dict(steps=24), dict(order=0), range(8, 10)),
}


def recorded(model, prompt: int, threshold: float, sampling: dict, cache: dict) -> dict:
    patched = engine.edit(model, cache=CacheConfig(threshold=threshold, **cache))
    sample(patched, PROMPTS[prompt], seed=100 + prompt, shape=(1, 16, 3, 16, 16), **sampling)
    run = recent_runs()[-1]
    calls = [
        {
            "change": None if call.change is None else round(call.change, 5),
            "threshold": threshold,
            "reused": call.reused,
            "admitted": call.admitted,
            "parts": call.parts,
        }
        for call in run.calls
    ]
    return {"limit": run.limit, "accumulate": run.accumulate, "reused": run.reused, "calls": calls}


def main() -> None:
    runs = []
    with torch.inference_mode():
        model = load_demo_model()
        for family, (sampling, cache, prompts) in FAMILIES.items():
            for prompt in prompts:
                for threshold in THRESHOLDS:
                    run = recorded(model, prompt, threshold, sampling, cache)
                    runs.append({"family": family, "prompt": prompt, **run})
    FILE.write_text("[\n" + ",\n".join(json.dumps(run, separators=(",", ":")) for run in runs) + "\n]\n")
    print(json.dumps({"runs": len(runs), "file": str(FILE.relative_to(ROOT))}))


if __name__ == "__main__":
    main()
