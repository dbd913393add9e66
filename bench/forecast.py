"""What the Speed Up node says before a run, beside what came: seconds and memory.

    python3 -m bench.forecast [--model HunyuanVideo] [--blocks 20 40] [--presets balanced exact fastest] [--steps 6]
        [--latents 1,16,17,68,120 1,16,17,90,160]

One process, as after ComfyUI's start: each preset samples each size twice, the second time twice as many steps. So the
first run of all knows nothing beforehand, the first of another size knows it scaled, and each second run has been
measured. Weights are random: times and memory are true, and the cache reuses what it does on random weights. Prints a
row a run; ends with one JSON line.
"""

import argparse
import json
import logging
import sys
import time
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
from pack import load_pack  # noqa: E402

load_pack()

import comfy.model_management  # noqa: E402
import comfyui_version  # noqa: E402
import torch  # noqa: E402
from skein import engine, live  # noqa: E402
from skein.bench.cases import Case  # noqa: E402
from skein.bench.random_model import add_arguments, chosen, inputs, random_model  # noqa: E402
from skein.bench.timing import device_name  # noqa: E402
from skein.demo.sampling import sample  # noqa: E402
from skein.plan import PresetConfig  # noqa: E402

SIZES = ["1,16,17,68,120", "1,16,17,90,160"]


def measure(model, case: Case, steps: int) -> dict:
    """One run under the model's preset."""
    cuda = model.load_device.type == "cuda"
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    sample(model, **inputs(case, steps))
    seconds, said = time.perf_counter() - started, live.snapshot()["sampling"]
    peak = torch.cuda.max_memory_allocated() if cuda else None
    expected, size = said["expected_s"], said["expected_bytes"]
    row = {
        "preset": engine.plan_of(model).preset.preset, "techniques": said["techniques"], "latent": case.latent,
        "steps": steps, "seconds": seconds, "expected_s": expected, "from": said["expected_from"],
        "time_ratio": expected / seconds if expected else None, "peak_bytes": peak, "expected_bytes": size,
        "memory_ratio": size / peak if peak and size else None,
    }  # fmt: skip
    print({name: round(value, 3) if isinstance(value, float) else value for name, value in row.items()}, flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--presets", nargs="*", default=["balanced", "exact", "fastest"])
    parser.add_argument("--latents", nargs="*", default=SIZES)
    parser.add_argument("--steps", type=int, default=6)
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    case, rows = chosen(options), []
    sizes = [tuple(map(int, text.split(","))) for text in options.latents]
    with torch.inference_mode():
        model = random_model(case)
        for preset in options.presets:
            comfy.model_management.unload_all_models()
            sped_up = engine.edit(model, preset=PresetConfig(preset))
            for latent in sizes:
                rows += [measure(sped_up, replace(case, latent=latent), n * options.steps) for n in (1, 2)]
    told = [row["time_ratio"] for row in rows if row["time_ratio"]]
    print(
        json.dumps({
            "device": device_name(), "comfyui": comfyui_version.__version__, "torch": torch.__version__,
            "random": "weights and conditioning", "sizes": vars(options), "runs": rows,
            "furthest": max(told, key=lambda ratio: abs(ratio - 1)) if told else None,
        })
    )  # fmt: skip


if __name__ == "__main__":
    main()
