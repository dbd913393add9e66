"""Context parallelism on the GPUs of this machine: seconds a step against one process, start-up, memory.

    python3 -m bench.scaling [--model "FLUX.1 dev"] [--worlds 1 2 4 8] [--steps 4] [--paths exact all] [--blocks 2 4]
    python3 -m bench.scaling --paths exact --no-stock --arrangements 8x1 4x2 2x4 [--blocks 2 4]
    python3 -m bench.scaling --cpu --latent 1 16 3 16 16 --blocks 1 1

A model of true size with random weights (bench/random_model.py) is written to a temporary file, as a checkpoint that
every process loads. A step is the time between two of the sampler's callbacks: the median without the first, and all
but the first together. The one process runs the same plan, in this process; stock ComfyUI runs too. Arrangements are
degrees, Ulysses x ring; without them the workers measure which is fastest. Of random weights the cache reuses nothing
by its own decision, so "half reused" reuses every second call, whatever has changed. Exchange shares are of each rank,
with what it waits for slower ones. Random: weights and conditioning. Ends with one JSON line.
"""

import argparse
import json
import logging
import os
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
from pack import load_pack  # noqa: E402

load_pack()

import comfy.model_management  # noqa: E402
import comfy.sd  # noqa: E402
import comfyui_version  # noqa: E402
import torch  # noqa: E402
from skein import engine  # noqa: E402
from skein.bench.errors import relative_error  # noqa: E402
from skein.bench.random_model import add_arguments, chosen, inputs, random_checkpoint  # noqa: E402
from skein.bench.timing import device_name  # noqa: E402
from skein.demo.sampling import sample  # noqa: E402
from skein.plan import AttentionConfig, CacheConfig, CompileConfig, FP8Config, ParallelConfig, Plan, SparseConfig  # noqa: E402
from skein.report import recent_runs  # noqa: E402
from skein.runs import Run  # noqa: E402
from skein.workers import group, release  # noqa: E402

EVERY_SECOND = CacheConfig(threshold=1.0, max_consecutive_hits=1)
PATHS = {
    "stock": Plan(),
    "exact": Plan(attention=AttentionConfig(), compile=CompileConfig()),
    "all": Plan(CacheConfig(), AttentionConfig(), FP8Config(), CompileConfig()),
    "density 0.25": Plan(
        None,
        AttentionConfig(),
        FP8Config(),
        CompileConfig(),
        None,
        SparseConfig(rule="density", density=0.25, start_percent=0.0),
    ),
    "half reused": Plan(EVERY_SECOND, AttentionConfig(), FP8Config(), CompileConfig()),
}


class Steps:
    """The times of a run's callbacks."""

    def __init__(self, begin: float):
        self.times = [begin]

    def __call__(self, *_) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())

    @property
    def row(self) -> dict:
        seconds = [later - earlier for earlier, later in zip(self.times, self.times[1:])]
        return {"step_s": statistics.median(seconds[1:]), "others_s": sum(seconds[1:]), "first_step_s": seconds[0]}


def cached(runs: list[Run]) -> dict:
    """What the cache did, and its calls' times: medians without the first of each kind."""
    calls = [call for each in runs for call in each.calls]
    row: dict = {"reused": sum(call.reused for call in calls)} if calls else {}
    for name, reused in (("computed_ms", False), ("reused_ms", True)):
        times = [call.ms for call in calls if call.reused is reused and call.ms is not None]
        if len(times) > 1:
            row[name] = statistics.median(times[1:])
    return row


def run(model, plan: Plan, arguments: dict) -> tuple[torch.Tensor, dict]:
    steps, known = Steps(time.perf_counter()), recent_runs()
    out = sample(engine.edit(model, **vars(plan)), callback=steps, **arguments)
    return out, steps.row | cached([each for each in recent_runs() if each not in known])


def host_gib(pids: list[int]) -> dict[str, float]:
    """The host's memory that processes have together, what they share counted once, and of it what is not a file's."""
    names = {"Pss:": "host_gib", "Pss_Anon:": "host_own_gib"}
    row = dict.fromkeys(names.values(), 0.0)
    for pid in pids:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            name, *rest = line.split()
            if name in names:
                row[names[name]] += int(rest[0]) / 2**20
    return row


def gpu_gib() -> list[float]:
    """Memory in use on each GPU, by whomever."""
    free = [torch.cuda.mem_get_info(i) for i in range(torch.cuda.device_count())]
    return [round((total - left) / 2**30, 1) for left, total in free]


def measure(model, name: str, degrees: tuple[int, int], world: int, arguments: dict, alone: dict, cpu: bool) -> dict:
    """One path in so many workers: cold, then warm."""
    devices = ",".join(["cpu"] * world if cpu else map(str, range(world)))
    plan = replace(PATHS[name], parallel=ParallelConfig(devices, *degrees))
    _, cold = run(model, plan, {**arguments, "steps": 2})
    out, warm = run(model, plan, arguments)
    assert group._group is not None
    row = {
        "path": name, "world": world, "degrees": degrees, **warm,
        "cold_first_step_s": cold["first_step_s"],
        "warm_start_s": warm["first_step_s"] - warm.get("computed_ms", 1000 * warm["step_s"]) / 1000,
        "over_one_process": alone["step_s"] / warm["step_s"],
        "others_over_one_process": alone["others_s"] / warm["others_s"],
        "exchange_share": [each / group._group.last_run["call_s"] for each in group._group.last_run["exchange_s"]],
        "error_to_one_process": relative_error(out, alone["out"]),
        **host_gib(list(group._group.pids.values())),
        "comfyui_own_gib": host_gib([os.getpid()])["host_own_gib"],
        "gpu_gib": gpu_gib(),
        "peak_gib": group._group.last_run["peak_bytes"] / 2**30,
        "reserved_gib": group._group.last_run["reserved_bytes"] / 2**30,
    }  # fmt: skip
    print(row, flush=True)
    return row


def arrangement(text: str) -> tuple[int, int]:
    """Ulysses and ring degree."""
    ulysses, ring = map(int, text.split("x"))
    return ulysses, ring


def groups(options: argparse.Namespace, there: int) -> list[tuple[tuple[int, int], int]]:
    """Degrees and number of workers of each group to measure."""
    given = {(degrees, degrees[0] * degrees[1]) for degrees in options.arrangements}
    wanted = sorted(given) or [((0, 0), world) for world in options.worlds]
    return [(degrees, world) for degrees, world in wanted if world <= there]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--worlds", type=int, nargs="*", default=[1, 2, 4, 8], help="workers")
    parser.add_argument("--arrangements", nargs="*", default=[], type=arrangement, help="such as 4x2")
    parser.add_argument("--paths", nargs="*", default=["exact", "all"], choices=list(PATHS)[1:])
    parser.add_argument("--cpu", action="store_true", help="workers on the CPU")
    parser.add_argument("--no-stock", action="store_true")
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("skein").setLevel(logging.INFO)
    there = 8 if options.cpu else torch.cuda.device_count()
    case = chosen(options)
    arguments = inputs(case, options.steps)
    rows = []
    with torch.inference_mode(), tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        checkpoint = random_checkpoint(folder, case)
        print(f"wrote the checkpoint in {time.perf_counter() - started:.1f} s", flush=True)
        model = comfy.sd.load_diffusion_model(checkpoint)
        for name in (["stock"] if not options.no_stock else []) + options.paths:
            out, row = run(model, PATHS[name], arguments)
            rows.append({"path": name, "world": 0, **row, "gpu_gib": gpu_gib()})
            print(rows[-1], flush=True)
            comfy.model_management.unload_all_models()
            alone = {**row, "out": out}
            for degrees, world in groups(options, there) if name != "stock" else []:
                rows.append(measure(model, name, degrees, world, arguments, alone, options.cpu))
        release()
    print(
        json.dumps({
            "device": device_name(), "gpus": torch.cuda.device_count(), "comfyui": comfyui_version.__version__,
            "torch": torch.__version__, "random": "weights and conditioning", "sizes": vars(options), "runs": rows,
        })
    )  # fmt: skip


if __name__ == "__main__":
    main()
