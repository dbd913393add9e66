"""What ComfyUI's process takes of the host's memory, with ComfyUI's dynamic VRAM and without: stock, FP8, compiled
blocks, both with attention.

    python3 -m bench.host_memory [--double 20 --single 40] [--folder PATH]

Writes a random HunyuanVideo as one file, 25.6 GB with all 60 blocks; 480 x 272 x 17 frames, 2 steps. Two fresh
processes load it, one of them with dynamic VRAM as ComfyUI's server switches it on (not on a CPU, which has none). In
each, plan by plan: GB that the process has of its own (anonymous and shared) after the run, at most during it, and once
the plan's node is gone and the models are off the device, all beyond what it had before it loaded the model; GB of
files' pages, each counted once, which the system takes back when it needs them; what ComfyUI has pinned; and by how
much the memory went down that is available on the machine. Ends with one JSON line. --gb: what is loaded without
dynamic VRAM finds a card of this size.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

DYNAMIC = "--dynamic"
if DYNAMIC in sys.argv:
    import comfy_aimdo.control

    comfy_aimdo.control.init()  # before torch, as ComfyUI does

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
from pack import load_pack  # noqa: E402

load_pack()

import ctypes  # noqa: E402
import gc  # noqa: E402

import comfy.model_management as management  # noqa: E402
import comfy.sd  # noqa: E402
import comfyui_version  # noqa: E402
import psutil  # noqa: E402
import torch  # noqa: E402
from skein import engine  # noqa: E402
from skein.attributes import changed  # noqa: E402
from skein.bench import random_model as models  # noqa: E402
from skein.bench.errors import relative_error  # noqa: E402
from skein.bench.loading import Peak, memory, switch_dynamic_on  # noqa: E402
from skein.bench.other_card.sitecustomize import limited  # noqa: E402
from skein.bench.timing import device_name  # noqa: E402
from skein.demo.sampling import sample  # noqa: E402
from skein.plan import AttentionConfig, CompileConfig, FP8Config, Plan  # noqa: E402

PLANS = {
    "stock": Plan(),
    "fp8": Plan(fp8=FP8Config()),
    "compile": Plan(compile=CompileConfig()),
    "fp8 + compile + attention": Plan(None, AttentionConfig(), FP8Config(), CompileConfig()),
}
SIZES = dict(double=models.DOUBLE, single=models.SINGLE, hidden=models.HIDDEN, width=480, height=272, frames=17)


def own(memory: dict[str, float]) -> float:
    return memory["own"] + memory["shared"]


def file_pages() -> float:
    """GB of files in this process's memory; one that two mappings have is counted once."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 / 1e9 for line in lines if line.startswith("Pss_File:"))


def tidy() -> None:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def measure(path: str, given: argparse.Namespace) -> list[dict]:
    """A row for each plan; own memory beyond what this process had before it loaded the model."""
    arguments = dict(
        positive=models.conditioning(60),
        latent=torch.zeros(models.latent_shape(given.width, given.height, given.frames)),
    )
    tidy()
    before, available = own(memory()), psutil.virtual_memory().available
    model = comfy.sd.load_diffusion_model(path)
    rows, stock = [], None
    for name, plan in PLANS.items():
        planned = engine.edit(model, **vars(plan)) if plan.techniques else model
        with Peak() as peak:
            out = sample(planned, steps=2, **arguments)
            tidy()
            row = {"plan": name, "own_gb": own(memory()) - before, "file_gb": file_pages()}
            row["pinned_gb"] = management.TOTAL_PINNED_MEMORY / 1e9
            row["taken_gb"] = (available - psutil.virtual_memory().available) / 1e9
        row["own_peak_gb"] = own(peak.most) - before
        stock = out if stock is None else stock
        row["error"] = relative_error(out, stock)
        del planned
        management.unload_all_models()
        tidy()
        row["own_after_gb"] = own(memory()) - before
        rows.append({key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()})
        print(rows[-1], file=sys.stderr, flush=True)
    return [{"own_before_gb": round(before, 2), "dynamic": model.is_dynamic()}, *rows]


def in_a_fresh_process(*options: str) -> list[dict]:
    """This benchmark with the options given and these; its rows."""
    done = subprocess.run(
        [sys.executable, "-m", "bench.host_memory", *sys.argv[1:], *options],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in SIZES.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--folder", help="where to make the file; a temporary folder is removed again")
    parser.add_argument("--gb", type=float)
    for name in ("--write", "--measure"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    parser.add_argument(DYNAMIC, action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    case = models.hunyuan_video(given.double, given.single, given.hidden)
    with torch.inference_mode(), ExitStack() as stack:
        if given.write:
            print(json.dumps([{"file": models.random_checkpoint(given.write, case)}]))
            return
        if given.measure:
            if given.dynamic:
                switch_dynamic_on()
            if given.gb:
                size = int(given.gb * 1e9)
                stack.enter_context(changed([(torch.cuda, "mem_get_info", lambda device=None: limited(size, device))]))
            print(json.dumps(measure(given.measure, given)))
            return
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        (written,) = in_a_fresh_process("--write", folder)
        rows = {"off": in_a_fresh_process("--measure", written["file"])}
        if torch.cuda.is_available():
            rows["on"] = in_a_fresh_process("--measure", written["file"], DYNAMIC)
        size = Path(written["file"]).stat().st_size / 1e9
    print(
        json.dumps({
            "device": device_name(), "comfyui": comfyui_version.__version__, "file_gb": round(size, 2),
            "random": "weights and conditioning", "dynamic_vram": rows,
            "sizes": {name: getattr(given, name) for name in SIZES},
        })
    )  # fmt: skip


if __name__ == "__main__":
    main()
