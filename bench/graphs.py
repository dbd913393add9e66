"""Compiled blocks with CUDA graphs beside the same without: results, seconds of a run, memory, on this GPU.

    python3 -m bench.graphs [--model "SD3.5 large"] [--blocks 4] [--steps 12]

In a thread, as ComfyUI samples, and with the allocator that PYTORCH_CUDA_ALLOC_CONF names; ComfyUI's own choice, which
has no graphs, is backend:cudaMallocAsync. True sizes, random weights and conditioning. Each path runs without graphs,
which compiles and quantizes, and twice with: errors are relative, to the run without. Ends with one JSON line.
"""

import argparse
import json
import logging
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
from pack import load_pack  # noqa: E402

load_pack()

import comfyui_version  # noqa: E402
import torch  # noqa: E402
from skein import engine  # noqa: E402
from skein.bench.errors import relative_error  # noqa: E402
from skein.bench.full_run import EVERY_SECOND  # noqa: E402
from skein.bench.random_model import add_arguments, chosen, inputs, random_model  # noqa: E402
from skein.bench.timing import device_name  # noqa: E402
from skein.demo.sampling import sample  # noqa: E402
from skein.plan import AttentionConfig, CompileConfig, FP8Config  # noqa: E402

PATHS = {  # what goes with the compilation, and the guidance
    "attention": (dict(attention=AttentionConfig()), 1.0),
    "attention + fp8": (dict(attention=AttentionConfig(), fp8=FP8Config()), 1.0),
    "attention + fp8, half reused": (dict(attention=AttentionConfig(), fp8=FP8Config(), cache=EVERY_SECOND), 1.0),
    "fp8, two conditionings": (dict(fp8=FP8Config()), 4.0),
}


def measure(model, inputs: dict, path: str) -> dict:
    (techniques, cfg), cuda = PATHS[path], torch.cuda.is_available()
    row: dict = {"path": path, "seconds": [], "reserved_gib": []}
    outputs = []
    for mode in ("no-cudagraphs", "default", "default"):
        planned = engine.edit(model, compile=CompileConfig(mode), **techniques)
        started = time.perf_counter()
        outputs.append(sample(planned, **inputs, cfg=cfg))
        row["seconds"].append(time.perf_counter() - started)
        if cuda:
            torch.cuda.empty_cache()
            row["reserved_gib"].append(torch.cuda.memory_reserved() / 2**30)  # after the run
    row["errors"] = [relative_error(output, outputs[0]) for output in outputs[1:]]
    print(row, flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, "SD3.5 large")
    parser.add_argument("--steps", type=int, default=12)
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("skein").setLevel(logging.INFO)
    case = chosen(options)
    rows: list[dict] = []

    def run() -> None:
        with torch.inference_mode():
            model = random_model(case)
            rows.extend(measure(model, inputs(case, options.steps), path) for path in PATHS)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    print(
        json.dumps({
            "device": device_name(), "comfyui": comfyui_version.__version__, "torch": torch.__version__,
            "allocator": torch.cuda.get_allocator_backend() if torch.cuda.is_available() else None,
            "random": "weights and conditioning", "sizes": vars(options), "runs": rows,
        })
    )  # fmt: skip


if __name__ == "__main__":
    main()
