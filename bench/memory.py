"""Peaks of memory while sampling, beside what estimate.py says: sizes, techniques, batch.

    python3 -m bench.memory

A HunyuanVideo of true width with 2 + 2 blocks and random weights (bench/random_model.py); five steps each, so that the
cache is full. Prints the peak without the weights, and the estimate; ends with one JSON line.
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

import comfy.model_management  # noqa: E402
import comfyui_version  # noqa: E402
import torch  # noqa: E402
from skein import engine  # noqa: E402
from skein.bench import random_model as models  # noqa: E402
from skein.bench.timing import device_name  # noqa: E402
from skein.demo.sampling import sample  # noqa: E402
from skein.estimate import Load, work_bytes  # noqa: E402
from skein.plan import AttentionConfig, CacheConfig, CompileConfig, FP8Config, Plan  # noqa: E402

TEXT, STEPS = 60, 5
PLANS = {
    "stock": Plan(),
    "attention": Plan(attention=AttentionConfig()),
    "attention + compile": Plan(attention=AttentionConfig(), compile=CompileConfig()),
    "cache + attention + compile": Plan(CacheConfig(), AttentionConfig(), None, CompileConfig()),
    "all": Plan(CacheConfig(), AttentionConfig(), FP8Config(), CompileConfig()),
}
SETTINGS = [  # path, width, height, frames, guidance (1: one sample a call, more: two)
    *((path, 1280, 720, 129, 1.0) for path in PLANS),
    ("attention", 1280, 720, 65, 1.0),
    ("attention", 960, 544, 65, 3.0),
    ("cache + attention + compile", 960, 544, 65, 3.0),
    ("all", 960, 544, 129, 1.0),
    ("all", 848, 480, 97, 3.0),
    ("attention", 640, 368, 33, 1.0),
]


def measure(model, path: str, width: int, height: int, frames: int, cfg: float) -> dict:
    plan, cuda = PLANS[path], torch.cuda.is_available()
    comfy.model_management.unload_all_models()
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    latent = torch.zeros(models.latent_shape(width, height, frames))
    text = models.conditioning(TEXT)
    sample(engine.edit(model, **vars(plan)), text, negative=text, cfg=cfg, latent=latent, steps=STEPS)
    weights = 0 if not cuda else min(torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated())
    peak = torch.cuda.max_memory_allocated() - weights if cuda else 0
    tokens = latent.shape[2] * (latent.shape[3] // 2) * (latent.shape[4] // 2)
    load = Load(tokens, TEXT, models.HIDDEN, batch=1 if cfg == 1.0 else 2)
    estimate = work_bytes(load, plan)
    row = {
        "path": path, "size": f"{width} x {height} x {frames}", "batch": load.batch, "tokens": tokens,
        "weights_gb": weights / 1e9, "peak_gb": peak / 1e9, "estimate_gb": estimate / 1e9,
        "ratio": estimate / peak if peak else None, "states": peak / (load.batch * tokens * models.HIDDEN * 2),
    }  # fmt: skip
    print({name: round(value, 3) if isinstance(value, float) else value for name, value in row.items()}, flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a hundredth of the tokens, to see that it runs")
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    settings = SETTINGS if not options.small else [(path, 128, 80, 9, cfg) for path, _, _, _, cfg in SETTINGS[-2:]]
    with torch.inference_mode():
        model = models.random_model(2, 2, models.HIDDEN if not options.small else 256)
        rows = [measure(model, *setting) for setting in settings]
    print(
        json.dumps({
            "device": device_name(), "comfyui": comfyui_version.__version__, "torch": torch.__version__,
            "random": "weights and conditioning", "blocks": "2 + 2", "runs": rows,
        })
    )  # fmt: skip


if __name__ == "__main__":
    main()
