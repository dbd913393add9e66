"""The 13 B model on a card of so many GB under ComfyUI's dynamic VRAM, as its server has it: ComfyUI alone, and Skein.

    python3 -m bench.dynamic_card [--gb 24 16 12] [--ways skein stock] [--width 1280 --height 720 --frames 129]
        [--steps 2] [--cache] [--again] [--links 25 12] [--tiles] [--no-decode] [--folder PATH]

All 60 blocks and a VAE of true size, random weights. Each row is a fresh process with ComfyUI's dynamic VRAM and
allocator, while this one holds the rest of the GPU's memory: no limit is told to any allocator. skein: FP8, attention,
compiled blocks, and Skein's VAE Decode. --cache: with a cache that keeps its states and reuses no call; --again: a
second run, and decode; --links: more runs with blocks' weights that come from the host at so many GB a second; --tiles:
another decode, in tiles.
Each row: seconds a step (the first one counts in `run_s` alone: it compiles), of the whole run and of the decode, peaks
of PyTorch's tensors after that step and what Skein expects of them, what the process took of the card at most (dynamic
VRAM takes what is free), ComfyUI's pins and the host's memory; after both ways, how far the results are apart. Ends
with one JSON line. On a CPU there is neither a limit nor dynamic VRAM.
"""

import argparse
import json
import logging
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

WAY = "--way"
if WAY in sys.argv:
    import comfy_aimdo.control

    comfy_aimdo.control.init()  # before torch, as ComfyUI does
    comfy_aimdo.control.set_log_warning()

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
from pack import load_pack  # noqa: E402

load_pack()

import os  # noqa: E402

import comfy.sd  # noqa: E402
import comfyui_version  # noqa: E402
import torch  # noqa: E402
from skein import engine  # noqa: E402
from skein.attributes import changed  # noqa: E402
from skein.bench import random_model as models  # noqa: E402
from skein.bench.errors import relative_error  # noqa: E402
from skein.bench.loading import switch_dynamic_on  # noqa: E402
from skein.bench.runs import FAST, decoded, estimated_gb, link, link_of, peaks, stepped  # noqa: E402
from skein.bench.scaling import host_gib  # noqa: E402
from skein.bench.timing import device_name  # noqa: E402
from skein.bench.vae import random_vae  # noqa: E402
from skein.out_of_memory import is_out_of_memory  # noqa: E402
from skein.plan import CacheConfig, DecodeConfig  # noqa: E402

SIZES = dict(width=1280, height=720, frames=129, steps=2, double=models.DOUBLE, single=models.SINGLE, hidden=3072)
ALLOCATOR = {"PYTORCH_CUDA_ALLOC_CONF": "backend:cudaMallocAsync"}  # which ComfyUI's main.py chooses
LOOK_SECONDS = 0.02


def row(given: argparse.Namespace) -> dict:
    """What this process measures."""
    size = int(given.gb[0] * 1e9)
    plan = replace(FAST, cache=CacheConfig(threshold=1e-9)) if given.cache else FAST
    model = comfy.sd.load_diffusion_model(given.file)
    planned = engine.edit(model, **vars(plan)) if given.way == "skein" else model
    latent = torch.zeros(models.latent_shape(given.width, given.height, given.frames))
    vae = None if given.no_decode else random_vae("HunyuanVideo")
    arguments, measured = {"latent": latent, "steps": given.steps}, {"dynamic": model.is_dynamic()}
    skein, free = given.way == "skein" and torch.cuda.is_available(), torch.cuda.mem_get_info
    with changed([(torch.cuda, "mem_get_info", lambda device=None: (free(device)[0], size))]):
        try:
            for run in ("", "again_")[: 1 + given.again]:
                out, took = stepped(planned, arguments)
                took |= peaks() | host_gib([os.getpid()]) | {"finite": bool(out.isfinite().all())}
                if skein:
                    took["estimate_gb"] = estimated_gb(plan, model, latent)
                torch.save(out, given.out)
                if vae is not None:
                    took |= decoded(vae, out, DecodeConfig() if given.way == "skein" else None)
                measured |= {run + name: value for name, value in took.items()}
            there = link() if skein and given.links else {}
            for rate in given.links if there else ():
                with link_of(rate, there):
                    measured[f"step_s_at_{rate:g}_gb_s"] = stepped(planned, arguments)[1]["step_s"]
            if given.tiles and vae is not None:
                took = decoded(vae, out, DecodeConfig("tiled"))
                measured |= {f"tiles_{name}": value for name, value in took.items()}
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            traceback.print_exc()
            measured |= {"out_of_memory": str(error).partition("\n")[0], **peaks()}
    return measured


@contextmanager
def card_of(gb: float) -> Iterator[dict[str, float]]:
    """Within: others find so many GB free on the GPU; afterwards, what they took at most, as `taken_gb`."""
    taken: dict[str, float] = {}
    if not torch.cuda.is_available():
        yield taken
        return
    held = torch.empty(torch.cuda.mem_get_info()[0] - int(gb * 1e9), dtype=torch.uint8, device="cuda")
    free, least, done = torch.cuda.mem_get_info()[0], [1 << 60], threading.Event()

    def look() -> None:
        while not done.wait(LOOK_SECONDS):
            least.append(min(least.pop(), torch.cuda.mem_get_info()[0]))

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield taken
    finally:
        done.set()
        thread.join()
        taken |= {"free_gb": free / 1e9, "taken_gb": (free - least[0]) / 1e9}
        del held
        torch.cuda.empty_cache()


def in_a_fresh_process(way: str, gb: float, file: str, out: Path) -> dict:
    """This benchmark with the options given, one way on a card of this size; its row."""
    options = [WAY, way, "--gb", str(gb), "--file", file, "--out", str(out)]
    command = [sys.executable, "-m", "bench.dynamic_card", *sys.argv[1:], *options]
    with card_of(gb) as taken:
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, env={**os.environ, **ALLOCATOR})
    found = {"way": way, "gb": gb} | taken
    if done.returncode:
        return found | {"ended": done.returncode}
    return found | json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in SIZES.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--gb", type=float, nargs="*", default=[24.0, 16.0, 12.0])
    parser.add_argument("--ways", nargs="*", default=["skein", "stock"], choices=["skein", "stock"])
    parser.add_argument("--links", type=float, nargs="*", default=[])
    for name in ("--cache", "--again", "--tiles", "--no-decode"):
        parser.add_argument(name, action="store_true")
    parser.add_argument("--folder", help="where the model's file is made, or is; a temporary folder is removed again")
    for name in (WAY, "--file", "--out"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.steps < 2:
        parser.error("--steps must be 2 or more: the first one compiles.")
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("skein").setLevel(logging.INFO)
    if given.way:
        if torch.cuda.is_available():
            switch_dynamic_on()
        with torch.inference_mode():
            print(json.dumps(row(given)))
        return
    rows = []
    with torch.inference_mode(), tempfile.TemporaryDirectory() as folder:
        file = f"{given.folder or folder}/random.safetensors"
        if not Path(file).exists():
            Path(file).parent.mkdir(parents=True, exist_ok=True)
            models.random_checkpoint(
                str(Path(file).parent), models.hunyuan_video(given.double, given.single, given.hidden)
            )
        comfy.model_management.soft_empty_cache(force=True)
        for gb in given.gb:
            for way in given.ways:
                rows.append(in_a_fresh_process(way, gb, file, Path(folder) / f"{gb} {way}"))
                print(rows[-1], flush=True)
            outs = [torch.load(path) for path in Path(folder).glob(f"{gb} *")]
            if len(outs) == 2:
                rows[-1]["apart"] = relative_error(*outs)
    print(
        json.dumps({
            "device": device_name(), "comfyui": comfyui_version.__version__, "torch": torch.__version__,
            "random": "weights and conditioning", "sizes": {name: getattr(given, name) for name in SIZES},
            "runs": rows,
        })
    )  # fmt: skip


if __name__ == "__main__":
    main()
