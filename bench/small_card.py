"""The 13 B model at full size on cards smaller than this machine's: each worker may take so many GB and no more.

    python3 -m bench.small_card [--gb 24] [--world 1] [--steps 2] [--slices 16]

All workers run on the first GPU (bench/one_card.py); --world 0: no workers, ComfyUI's own process. Each is told that
the card has so many GB, and its allocator fails beyond that. All 60 blocks, random weights; FP8, attention and compiled
blocks. The same is sampled twice, decoded there too by a VAE of true size with random weights, and sampled again.

Prints the fullest worker's peaks, of its tensors and with what its allocator kept and a CUDA context, the estimate, and
what all have of the host's memory; ends with one JSON line. Times of several workers are of workers that take turns.
"""

import argparse
import json
import logging
import os
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
from pack import load_pack  # noqa: E402

load_pack()

import comfy.sd  # noqa: E402
import torch  # noqa: E402
from skein import engine  # noqa: E402
from skein.attributes import changed  # noqa: E402
from skein.bench import random_model as models  # noqa: E402
from skein.bench.errors import relative_error  # noqa: E402
from skein.bench.one_card import workers_on_one_card  # noqa: E402
from skein.bench.other_card.sitecustomize import CONTEXT, limited  # noqa: E402
from skein.bench.runs import FAST, TEXT  # noqa: E402
from skein.bench.scaling import host_gib  # noqa: E402
from skein.bench.timing import device_name  # noqa: E402
from skein.bench.vae import random_vae  # noqa: E402
from skein.demo.sampling import sample  # noqa: E402
from skein.devices import peaks_of  # noqa: E402
from skein.estimate import Load, work_bytes  # noqa: E402
from skein.footprint import with_slices  # noqa: E402
from skein.forecast import TIMES  # noqa: E402
from skein.plan import (  # noqa: E402
    DecodeConfig,
    ParallelConfig,
    SlicesConfig,
)
from skein.vae.decode import decode  # noqa: E402
from skein.workers import group  # noqa: E402


def timed(run: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, float]:
    started = time.perf_counter()
    return run(), time.perf_counter() - started


def peak_of_all() -> int:
    """The largest peak of tensors in bytes since the last question, of this process's device or among the workers."""
    if group._group is None:
        return peaks_of(torch.device("cuda"))["peak_bytes"]
    return max(told["peak_bytes"] for told in group._group.ask_all("room", {}).values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in dict(
        width=1280, height=720, frames=129, world=1, steps=2, double=models.DOUBLE, single=models.SINGLE
    ).items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--gb", type=float, default=24.0)
    parser.add_argument("--slices", type=int, default=0, help="of blocks; 0: as a run decides, by this process's card")
    parser.add_argument("--verbose", action="store_true", help="show all lines of the workers' log")
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("skein").setLevel(logging.DEBUG if options.verbose else logging.INFO)
    size, whole = int(options.gb * 1e9), torch.cuda.get_device_properties(0).total_memory
    limit = {
        "SKEIN_CARD_BYTES": str(size),
        "PYTORCH_ALLOC_CONF": f"per_process_memory_fraction:{(size - CONTEXT) / whole:.4f},expandable_segments:True",
    }
    plan = replace(
        FAST,
        parallel=ParallelConfig("all") if options.world else None,
        slices=SlicesConfig(options.slices) if options.slices else None,
    )
    latent = torch.zeros(models.latent_shape(options.width, options.height, options.frames))
    tokens = latent.shape[2] * latent.shape[3] * latent.shape[4] // 4
    with torch.inference_mode(), tempfile.TemporaryDirectory() as folder, ExitStack() as card:
        model = comfy.sd.load_diffusion_model(
            models.random_checkpoint(folder, models.hunyuan_video(options.double, options.single))
        )
        if options.world:
            card.enter_context(workers_on_one_card(options.world, **limit))
        else:
            torch.cuda.set_per_process_memory_fraction((size - CONTEXT) / whole)
            card.enter_context(changed([(torch.cuda, "mem_get_info", lambda device=None: limited(size, device))]))
        plan = with_slices(plan, model, latent.shape)
        estimate = work_bytes(Load(tokens, TEXT, models.HIDDEN), plan, max(options.world, 1))
        planned, text = engine.edit(model, **vars(plan)), models.conditioning(TEXT)

        def sampled() -> torch.Tensor:
            return sample(planned, text, latent=latent, steps=options.steps)

        out, seconds = timed(sampled)
        peaks = group._group.last_run if group._group is not None else peaks_of(torch.device("cuda"))
        host = host_gib([os.getpid()] if group._group is None else list(group._group.pids.values()))
        host["comfyui_own_gib"] = host_gib([os.getpid()])["host_own_gib"]
        row = {
            "finite": bool(out.isfinite().all()), "run_s": seconds, "step_s": TIMES.times[-1].step,
            "slices": plan.slices.count if plan.slices else 1, "tensors_gb": peaks["peak_bytes"] / 1e9,
            "peak_gb": (peaks["reserved_bytes"] + CONTEXT) / 1e9, "estimated_work_gb": estimate / 1e9, **host,
        }  # fmt: skip
        print(row, flush=True)
        row["error_of_second_run"] = relative_error(sampled(), out)
        if options.world != 1:  # one worker's video is decoded by this process, which may have the whole GPU
            vae = random_vae("HunyuanVideo")
            _, row["decode_s"] = timed(lambda: decode(vae, out, DecodeConfig()))
            row["decode_tensors_gb"] = peak_of_all() / 1e9
        again, row["run_again_s"] = timed(sampled)
        row["error_of_run_again"] = relative_error(again, out)
    print(
        json.dumps({
            "device": device_name(), "gb": options.gb, "world": options.world, **row,
            "random": "weights and conditioning", "sizes": vars(options),
        })
    )  # fmt: skip


if __name__ == "__main__":
    main()
