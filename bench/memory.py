"""Peaks of memory while sampling, beside what estimate.py says: sizes, techniques, batch.

    python3 -m bench.memory [--slices | --worlds 2 4]

A HunyuanVideo of true width with 2 + 2 blocks and random weights (bench/random_model.py); five steps each, so that the
cache is full. Prints the peak without the weights, the estimate, and a step's seconds after the first; ends with one
JSON line. "sliced": the blocks in slices of tokens, and how far that latent is from the one of whole blocks; --slices:
these pairs alone. --worlds: only the first worker of groups of so many, on one GPU
(bench/one_card.py), their first run, in which all is compiled and measured.
"""

import argparse
import json
import logging
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
from pack import load_pack  # noqa: E402

load_pack()

import comfy.model_management  # noqa: E402
import comfy.sd  # noqa: E402
import comfyui_version  # noqa: E402
import torch  # noqa: E402
from skein import engine  # noqa: E402
from skein.bench import random_model as models  # noqa: E402
from skein.bench.errors import relative_error  # noqa: E402
from skein.bench.one_card import workers_on_one_card  # noqa: E402
from skein.bench.timing import device_name  # noqa: E402
from skein.demo.sampling import sample  # noqa: E402
from skein.estimate import SLICES, Load, work_bytes  # noqa: E402
from skein.forecast import TIMES  # noqa: E402
from skein.plan import (  # noqa: E402
    AttentionConfig,
    CacheConfig,
    CompileConfig,
    FP8Config,
    ParallelConfig,
    Plan,
    SlicesConfig,
)
from skein.workers import group  # noqa: E402

TEXT, STEPS = 60, 5
PLANS = {
    "stock": Plan(),
    "attention": Plan(attention=AttentionConfig()),
    "attention + compile": Plan(attention=AttentionConfig(), compile=CompileConfig()),
    "cache + attention + compile": Plan(CacheConfig(), AttentionConfig(), None, CompileConfig()),
    "all": Plan(CacheConfig(), AttentionConfig(), FP8Config(), CompileConfig()),
}
PLANS = {path: replace(plan, slices=SlicesConfig(1)) for path, plan in PLANS.items()}
SLICED = ", sliced"  # with the blocks in slices of tokens
PLANS |= {path + SLICED: replace(plan, slices=SlicesConfig(SLICES)) for path, plan in PLANS.items() if path != "stock"}
PAIRS = [(path, 1280, 720, 129, 1.0) for path in sorted(PLANS) if path.removesuffix(SLICED) + SLICED in PLANS]
SETTINGS = [  # path, width, height, frames, guidance (1: one sample a call, more: two)
    ("stock", 1280, 720, 129, 1.0),
    *PAIRS,
    ("attention", 1280, 720, 65, 1.0),
    ("attention", 960, 544, 65, 3.0),
    ("cache + attention + compile", 960, 544, 65, 3.0),
    ("all", 960, 544, 129, 1.0),
    ("all", 848, 480, 97, 3.0),
    ("attention", 640, 368, 33, 1.0),
]
SHARED = [
    ("attention", 1280, 720, 129, 1.0),
    ("attention, sliced", 1280, 720, 129, 1.0),
    ("cache + attention + compile", 960, 544, 65, 3.0),
]


def run(model, plan: Plan, width: int, height: int, frames: int, cfg: float) -> tuple[Load, torch.Tensor]:
    """Samples; the size of a call, and the sampled latent."""
    latent, text = torch.zeros(models.latent_shape(width, height, frames)), models.conditioning(TEXT)
    out = sample(engine.edit(model, **vars(plan)), text, negative=text, cfg=cfg, latent=latent, steps=STEPS)
    tokens = latent.shape[2] * (latent.shape[3] // 2) * (latent.shape[4] // 2)
    return Load(tokens, TEXT, models.HIDDEN, batch=1 if cfg == 1.0 else 2), out


def row_of(setting: tuple, load: Load, world: int, weights: int, peak: int, **more: Any) -> dict:
    estimate = work_bytes(load, PLANS[setting[0]], world)
    row = {
        "path": setting[0], "size": "{} x {} x {}".format(*setting[1:4]), "batch": load.batch, "tokens": load.tokens,
        "world": world, "weights_gb": weights / 1e9, "peak_gb": peak / 1e9, "estimate_gb": estimate / 1e9,
        "ratio": estimate / peak if peak > 0 else None,
        "states": peak * world / (load.batch * load.tokens * models.HIDDEN * 2),
        "step_s": TIMES.times[-1].step if PLANS[setting[0]].techniques else None, **more,
    }  # fmt: skip
    print({name: round(value, 3) if isinstance(value, float) else value for name, value in row.items()}, flush=True)
    return row


def measure(model, setting: tuple, sampled: dict[tuple, torch.Tensor]) -> dict:
    """In this process. sampled: the latents so far, by setting."""
    cuda = torch.cuda.is_available()
    comfy.model_management.unload_all_models()
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    load, out = run(model, PLANS[setting[0]], *setting[1:])
    sampled[setting], whole = out, sampled.get((setting[0].removesuffix(SLICED), *setting[1:]), out)
    weights = 0 if not cuda else min(torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated())
    peak = torch.cuda.max_memory_allocated() - weights if cuda else 0
    return row_of(setting, load, 1, weights, peak, error_of_slices=relative_error(out, whole))


def measure_shared(model, setting: tuple, world: int) -> dict:
    """In the first of some workers that are running, its first run of this setting."""
    load, _ = run(model, replace(PLANS[setting[0]], parallel=ParallelConfig("all")), *setting[1:])
    assert group._group is not None
    weights = model.model_size()
    return row_of(setting, load, world, weights, max(group._group.last_run["peak_bytes"] - weights, 0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worlds", type=int, nargs="*", default=[])
    parser.add_argument("--slices", action="store_true", help="blocks in slices beside whole ones, at the largest size")
    parser.add_argument("--small", action="store_true", help="a hundredth of the tokens, to see that it runs")
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    settings, hidden, rows = SHARED if options.worlds else PAIRS if options.slices else SETTINGS, models.HIDDEN, []
    if options.small:
        settings, hidden = [(setting[0], 128, 80, 9, setting[-1]) for setting in settings[-2:]], 256
    sampled: dict[tuple, torch.Tensor] = {}
    with torch.inference_mode(), tempfile.TemporaryDirectory() as folder:
        model = comfy.sd.load_diffusion_model(models.random_checkpoint(folder, models.hunyuan_video(2, 2, hidden)))
        for world in options.worlds:
            with workers_on_one_card(world, "0" if torch.cuda.is_available() else "cpu"):
                rows += [measure_shared(model, setting, world) for setting in settings]
        if not options.worlds:
            rows = [measure(model, setting, sampled) for setting in settings]
    print(
        json.dumps({
            "device": device_name(), "comfyui": comfyui_version.__version__, "torch": torch.__version__,
            "random": "weights and conditioning", "blocks": "2 + 2", "runs": rows,
        })
    )  # fmt: skip


if __name__ == "__main__":
    main()
