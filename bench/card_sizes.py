"""The 13 B model at full size in ComfyUI's own process, on this GPU as it is and as if it had less memory.

    python3 -m bench.card_sizes [--gb 24 16 12] [--links 25 12] [--when-needed 16] [--blocks-whole 24] [--stock 16]
        [--decode] [--frames 129] [--steps 3]

All 60 blocks, random weights; FP8, attention and compiled blocks. ComfyUI is told that the card has so many GB, and the
allocator fails beyond that. The first step counts in `run_s` alone: it compiles. --links: on each card again, with
weights that come from the host at so many GB a second (each is copied so many times as takes so long). --when-needed:
cards on which they come when a block needs them, too, and not ahead, by the slowest link. --blocks-whole: cards on
which blocks run whole, too, and not in slices; --stock: on which ComfyUI samples alone, too. --decode: the result is
decoded, too, by a random VAE of true size.
Each row: seconds a step and of the whole run, peaks of tensors and of what the allocator kept with a CUDA context, what
Skein expects of tensors, the weights that stay on the card, what ComfyUI has pinned meanwhile, the host's memory, the
relative difference to the whole card's result. Ends with one JSON line.
"""

import argparse
import json
import logging
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

# A limit can be told to this allocator, and not to the one that ComfyUI chooses (cudaMallocAsync), which loses more
# memory to pieces: bench/dynamic_card.py.
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
from pack import load_pack  # noqa: E402

load_pack()

import comfy.model_management as memory  # noqa: E402
import comfy.sd  # noqa: E402
import torch  # noqa: E402
from skein import engine, offloaded  # noqa: E402
from skein.attributes import changed  # noqa: E402
from skein.bench import random_model as models  # noqa: E402
from skein.bench.errors import relative_error  # noqa: E402
from skein.bench.other_card.sitecustomize import CONTEXT, limited  # noqa: E402
from skein.bench.runs import FAST, decoded, estimated_gb, link, link_of, peaks, stepped  # noqa: E402
from skein.bench.scaling import host_gib  # noqa: E402
from skein.bench.timing import device_name  # noqa: E402
from skein.bench.vae import random_vae  # noqa: E402
from skein.out_of_memory import is_out_of_memory  # noqa: E402
from skein.plan import DecodeConfig, SlicesConfig  # noqa: E402

BLOCKS_WHOLE = replace(FAST, slices=SlicesConfig(1))
PLANS = {"skein": FAST, "when needed": FAST, "blocks whole": BLOCKS_WHOLE}


@contextmanager
def card_of(gb: float) -> Iterator[None]:
    """Within: the GPU has so many GB; 0: as many as it has."""
    memory.unload_all_models()
    memory.soft_empty_cache()
    torch.cuda.reset_peak_memory_stats()
    if not gb:
        yield
        return
    size, whole = int(gb * 1e9), torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((size - CONTEXT) / whole)
    told = [(torch.cuda, "mem_get_info", lambda device=None: limited(size, device))]
    try:
        with changed(told):
            yield
            memory.unload_all_models()
            memory.soft_empty_cache()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def measured(
    name: str, gb: float, model, arguments: dict, vae: comfy.sd.VAE | None
) -> tuple[dict, torch.Tensor | None]:
    """A row, and the result; None where memory ran out."""
    row: dict = {"path": name, "gb": gb}
    with card_of(gb):
        try:
            out, times = stepped(model, arguments)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            return row | {"out_of_memory": str(error).partition("\n")[0]}, None
        row |= times | peaks() | host_gib([os.getpid()])
        if name in PLANS:
            row["estimate_gb"] = estimated_gb(PLANS[name], model, arguments["latent"])
        if vae is not None:
            row |= decoded(vae, out, None if name == "stock" else DecodeConfig())
    return row, out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in dict(
        width=1280, height=720, frames=129, steps=3, double=models.DOUBLE, single=models.SINGLE
    ).items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--gb", type=float, nargs="*", default=[24.0, 16.0, 12.0])
    parser.add_argument("--links", type=float, nargs="*", default=[])
    parser.add_argument("--decode", action="store_true")
    parser.add_argument("--when-needed", type=float, nargs="*", default=[])
    parser.add_argument("--blocks-whole", type=float, nargs="*", default=[])
    parser.add_argument("--stock", type=float, nargs="*", default=[])
    options = parser.parse_args()
    if options.steps < 2:
        parser.error("--steps must be 2 or more: the first one compiles.")
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("skein").setLevel(logging.INFO)
    latent = torch.zeros(models.latent_shape(options.width, options.height, options.frames))
    arguments = {"latent": latent, "steps": options.steps}
    rows: list[dict] = []
    with torch.inference_mode(), tempfile.TemporaryDirectory() as folder:
        model = comfy.sd.load_diffusion_model(
            models.random_checkpoint(folder, models.hunyuan_video(options.double, options.single))
        )
        paths = {
            **{name: engine.edit(model, **vars(plan)) for name, plan in PLANS.items()},
            "stock": model,
        }
        vae = random_vae("HunyuanVideo") if options.decode else None
        there = link()
        cards = [("skein", gb, 0.0) for gb in (0.0, *options.gb)]
        cards += [("skein", gb, rate) for gb in options.gb for rate in options.links]
        cards += [("when needed", gb, min(options.links, default=0.0)) for gb in options.when_needed]
        cards += [("blocks whole", gb, 0.0) for gb in options.blocks_whole]
        cards += [("stock", gb, 0.0) for gb in options.stock]
        whole = None
        for name, gb, rate in cards:
            ahead = {} if name == "when needed" else offloaded.COPIES
            with link_of(rate, there), changed([(offloaded, "COPIES", ahead)]):
                row, out = measured(name, gb, paths[name], arguments, vae)
            row["link_gb_s"] = rate or there["pinned"]
            whole = out if whole is None else whole
            if out is not None and whole is not None:
                row |= {"error": relative_error(out, whole), "finite": bool(out.isfinite().all())}
            rows.append(row)
            print(row, flush=True)
    print(
        json.dumps({
            "device": device_name(), "random": "weights and conditioning", "sizes": vars(options), "runs": rows,
            "link_gb_s": there,
        })
    )  # fmt: skip


if __name__ == "__main__":
    main()
