"""Seconds and memory of loading a folder in diffusers' format, beside Load Diffusion Model on the same weights.

    python3 -m bench.loading [--gb 2.5] [--shards 4] [--dtype bfloat16] [--dynamic] [--workers] [--folder PATH]

Makes a HunyuanVideo of true width with so many blocks as come nearest to --gb, with random weights in bfloat16, in
diffusers' format and in ComfyUI's. Each loader runs in a fresh process. Ends with one JSON line: seconds; the most that
the process had of its own (anonymous) memory while it loaded, of files' and of shared memory, beyond what it had
before; and after it.
--dtype: the type in the model, or an option of Load Diffusion Model's; "default" is float32 on a CPU.
--workers: also what ComfyUI's process and two workers on the CPU have together after a step in the workers; memory that
several processes have is counted once.
--dynamic: with ComfyUI's dynamic VRAM, as its server switches it on for NVIDIA GPUs.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

DYNAMIC, WORKERS = "--dynamic", "--workers"
if DYNAMIC in sys.argv:
    import comfy_aimdo.control

    comfy_aimdo.control.init()  # before torch, as ComfyUI does

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
from pack import load_pack  # noqa: E402

load_pack()

import comfy.memory_management  # noqa: E402
import comfy.model_management  # noqa: E402
import comfy.model_patcher  # noqa: E402
import comfy.sd  # noqa: E402
import comfyui_version  # noqa: E402
import psutil  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from skein import engine  # noqa: E402
from skein.bench.random_model import conditioning  # noqa: E402
from skein.checkpoints.keys import make, plan  # noqa: E402
from skein.checkpoints.loading import WEIGHT_TYPES, load_diffusers  # noqa: E402
from skein.checkpoints.maps.hunyuan_video import HUNYUAN_VIDEO  # noqa: E402
from skein.demo.sampling import sample  # noqa: E402
from skein.plan import ParallelConfig  # noqa: E402
from skein.workers import release  # noqa: E402

NAME = "diffusion_pytorch_model"
LOADERS = {"ours": load_diffusers, "stock": comfy.sd.load_diffusion_model}
OPTIONS = {"bfloat16": {"dtype": torch.bfloat16}, **WEIGHT_TYPES}
DRAWN = 1 << 24  # random numbers, which are repeated


def shapes(doubles: int) -> dict[str, torch.Size]:
    """Of diffusers' HunyuanVideo with so many double blocks, and twice as many single ones."""
    import diffusers

    with torch.device("meta"):
        network = diffusers.HunyuanVideoTransformer3DModel(num_layers=doubles, num_single_layers=2 * doubles)
    return {key: weight.shape for key, weight in network.state_dict().items()}


def make_folder(folder: Path, gb: float, shards: int) -> int:
    """A transformer's folder; its bytes."""
    base, more = (2 * sum(shape.numel() for shape in shapes(blocks).values()) for blocks in (1, 2))
    doubles = max(1, 1 + round((gb * 1e9 - base) / (more - base)))
    wanted = shapes(doubles)
    total = 2 * sum(shape.numel() for shape in wanted.values())
    drawn = torch.randn(DRAWN).mul(0.02).bfloat16()
    parts: list[dict[str, torch.Tensor]] = [{}]
    index = {}
    files = [f"{NAME}-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
    done = 0
    for key, shape in wanted.items():
        number = min(done * shards // total, shards - 1)
        if number == len(parts):
            save_file(parts[-1], folder / files[number - 1])
            parts[-1] = {}
            parts.append({})
        repeats = -(-shape.numel() // DRAWN)
        parts[-1][key] = drawn.repeat(repeats)[: shape.numel()].reshape(shape)
        index[key] = files[number]
        done += 2 * shape.numel()
    save_file(parts[-1], folder / files[len(parts) - 1])
    (folder / f"{NAME}.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    config = {"_class_name": HUNYUAN_VIDEO.classes[0], "num_layers": doubles, "num_single_layers": 2 * doubles}
    (folder / "config.json").write_text(json.dumps(config))
    return total


def make_single(folder: Path, file: Path) -> None:
    """The same weights as ComfyUI has them."""
    weights = {key: weight for shard in sorted(folder.glob("*-of-*")) for key, weight in load_file(shard).items()}
    planned, _strange = plan(HUNYUAN_VIDEO, weights)
    save_file({name: make(made, weights) for name, made in planned.items()}, file)


def memory() -> dict[str, float]:
    """GB that this process has of its own, of files, and of memory that others can share."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    kinds = {"own": "RssAnon", "files": "RssFile", "shared": "RssShmem"}
    return {name: int(lines[key].split()[0]) * 1024 / 1e9 for name, key in kinds.items()}


def memory_of_all() -> dict[str, float]:
    """GB that this process and all those below it have, each page once (PSS)."""
    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
    total = {"own": 0.0, "files": 0.0, "shared": 0.0}
    for process in processes:
        text = Path(f"/proc/{process.pid}/smaps_rollup").read_text()
        lines = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
        for name, key in (("own", "Pss_Anon"), ("files", "Pss_File"), ("shared", "Pss_Shmem")):
            total[name] += int(lines[key].split()[0]) * 1024 / 1e9
    return total


class Peak:
    """Within: the most memory, looked at each few milliseconds."""

    def __enter__(self) -> "Peak":
        self.before = self.most = memory()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(0.003):
            now = memory()
            self.most = {name: max(now[name], self.most[name]) for name in now}


def switch_dynamic_on() -> None:
    """As ComfyUI's main.py does; the caller has initialized comfy_aimdo before it imported PyTorch."""
    import comfy_aimdo.control

    device = comfy.model_management.get_torch_device()
    if not comfy_aimdo.control.init_devices([(device.index, 0)]):
        sys.exit("This machine's comfy-aimdo does not work, so there is no dynamic VRAM.")
    comfy.model_patcher.CoreModelPatcher = comfy.model_patcher.ModelPatcherDynamic
    comfy.memory_management.aimdo_enabled = True


def load(name: str, path: str, dtype: str) -> dict[str, float]:
    with Peak() as peak:
        started = time.perf_counter()
        patcher = LOADERS[name](path, dict(OPTIONS[dtype]))
        seconds = time.perf_counter() - started
    after = memory()
    del patcher
    gb = {f"peak_{each}_gb": peak.most[each] - peak.before[each] for each in after}
    gb |= {f"after_{each}_gb": after[each] - peak.before[each] for each in after}
    return {"seconds": round(seconds, 2)} | {key: round(value, 3) for key, value in gb.items()}


def sample_in_workers(name: str, path: str, dtype: str) -> dict[str, float]:
    """What all processes have after one step of a small latent in two workers."""
    patcher = LOADERS[name](path, dict(OPTIONS[dtype]))
    before = memory_of_all()
    started = time.perf_counter()
    sample(
        engine.edit(patcher, parallel=ParallelConfig("cpu,cpu")),
        conditioning(8), conditioning(8), shape=(1, 16, 1, 8, 8), steps=1,
    )  # fmt: skip
    seconds, after = time.perf_counter() - started, memory_of_all()
    release()
    gb = {f"{each}_gb": round(after[each], 3) for each in after}
    return {"first_step_s": round(seconds, 2), "before_gb": round(sum(before.values()), 3)} | gb


def in_a_fresh_process(name: str, path: Path, given: argparse.Namespace, *more: str) -> dict[str, float]:
    options = ["--load", name, "--folder", str(path), "--dtype", given.dtype, *more]
    options += [DYNAMIC] if given.dynamic else []
    done = subprocess.run(
        [sys.executable, "-m", "bench.loading", *options], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gb", type=float, default=2.5)
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--dtype", choices=list(OPTIONS), default="bfloat16")
    parser.add_argument(DYNAMIC, action="store_true")
    parser.add_argument(WORKERS, action="store_true")
    parser.add_argument("--folder", type=Path, help="where to make the files; a temporary folder is removed again")
    parser.add_argument("--load", choices=list(LOADERS), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.load:
        if given.dynamic:
            switch_dynamic_on()
        with torch.inference_mode():
            how = sample_in_workers if given.workers else load
            print(json.dumps(how(given.load, str(given.folder), given.dtype)))
        return
    with tempfile.TemporaryDirectory(dir=given.folder) as place:
        folder, single = Path(place) / "transformer", Path(place) / "single.safetensors"
        folder.mkdir()
        size = make_folder(folder, given.gb, given.shards)
        make_single(folder, single)
        paths = {"stock": single, "ours": folder}
        rows = {name: in_a_fresh_process(name, path, given) for name, path in paths.items()}
        if given.workers:
            rows |= {f"{name}, workers": in_a_fresh_process(name, path, given, WORKERS) for name, path in paths.items()}
    for name, row in rows.items():
        print(f"{name:14} " + ", ".join(f"{key} {value}" for key, value in row.items()))
    shown = {"gb": round(size / 1e9, 2), "shards": given.shards, "dtype": given.dtype, "dynamic": given.dynamic}
    print(json.dumps({"comfyui": comfyui_version.__version__, **shown, **rows}))


if __name__ == "__main__":
    main()
