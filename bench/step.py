"""One model call of a diffusion transformer on this GPU: stock ComfyUI, each technique, all together.

    python3 -m bench.step [--model "FLUX.1 dev"] [--blocks 2 4] [--latent 1 16 17 68 120] [--paths ...]
                          [--densities 0.5 0.25]

The model has true sizes and random weights (bench/random_model.py). Every path samples through ComfyUI's own sampler in
this process: one call a step. Blocks are timed one by one with events after a first
call that compiles, and scaled to all that the model has where --blocks says to build fewer. Errors are relative, of the
first call's output against stock, and with --kernels of the attention kernels against float32 on a slice
(bench/attention.py). --padded pads the text to so many tokens, with an attention mask. Ends with one JSON line.
"""

import argparse
import json
import logging
import statistics
import sys
import time
from itertools import chain
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
from pack import load_pack  # noqa: E402

load_pack()

import comfyui_version  # noqa: E402
import torch  # noqa: E402
from comfy.patcher_extension import WrappersMP  # noqa: E402
from skein import engine  # noqa: E402
from skein.bench.attention import measure as measure_kernels  # noqa: E402
from skein.bench.errors import relative_error  # noqa: E402
from skein.bench.random_model import MODELS, add_arguments, chosen, random_model  # noqa: E402
from skein.bench.timing import Clock, ceilings, device_name  # noqa: E402
from skein.demo.sampling import sample  # noqa: E402
from skein.models import Network  # noqa: E402
from skein.plan import AttentionConfig, CompileConfig, FP8Config, Plan, SparseConfig  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

EXACT, EIGHT_BIT, COMPILE = AttentionConfig(), AttentionConfig(allow_8bit=True, exact_steps=0), CompileConfig()
STATIC, TUNED = CompileConfig(dynamic="off"), CompileConfig(mode="max-autotune-no-cudagraphs")
TENSOR, ROW = FP8Config("per_tensor"), FP8Config("per_row")
PROFILED = 4  # calls: the first are not recorded as CUDA graphs yet

PATHS: dict[str, Plan] = {
    "stock": Plan(),
    "cudnn": Plan(attention=AttentionConfig(kernel="cudnn")),
    "attention": Plan(attention=EXACT),
    "compile": Plan(compile=COMPILE),
    "fp8 row": Plan(fp8=ROW),
    "attention + compile": Plan(attention=EXACT, compile=COMPILE),
    "attention + compile, static": Plan(attention=EXACT, compile=STATIC),
    "attention + compile + fp8 tensor": Plan(attention=EXACT, compile=COMPILE, fp8=TENSOR),
    "attention + compile + fp8 row": Plan(attention=EXACT, compile=COMPILE, fp8=ROW),
    "8-bit attention + compile": Plan(attention=EIGHT_BIT, compile=COMPILE),
    "8-bit attention + compile + fp8 row": Plan(attention=EIGHT_BIT, compile=COMPILE, fp8=ROW),
    "8-bit attention + compile + fp8 tensor": Plan(attention=EIGHT_BIT, compile=COMPILE, fp8=TENSOR),
    "attention + compile, autotuned": Plan(attention=EXACT, compile=TUNED),
}


def sparse_paths(densities: list[float]) -> dict[str, Plan]:
    """All together, with sparse attention of a fixed density in all calls."""
    plans = {}
    for density in densities:
        sparse = SparseConfig(rule="density", density=density, start_percent=0.0)
        plans[f"attention + compile + fp8 row, density {density}"] = Plan(None, EXACT, ROW, COMPILE, None, sparse)
    return plans


class Timer:
    """What a clock shows around each model call and each of its blocks."""

    def __init__(self, clock: Any):
        self.clock = clock
        self.calls: list[dict[str, list]] = []  # of each: path of a stack's blocks, "" for the network -> spans
        self.first_output: torch.Tensor | None = None

    def around_call(self, execute, *args, **kwargs):
        """APPLY_MODEL wrapper: hooks for one call on the network that runs, which may be an FP8 twin."""
        network = Network(execute.class_obj.diffusion_model)
        self.calls.append({"": [], **{block.stack.blocks: [] for block in network.blocks}})
        hooks = [network.module.register_forward_hook(self._keep_first), *self._timed(network.module, "")]
        for block in network.blocks:
            hooks += self._timed(block.module, block.stack.blocks)
        try:
            return execute(*args, **kwargs)
        finally:
            for hook in hooks:
                hook.remove()

    def _timed(self, module: torch.nn.Module, path: str) -> list:
        spans = self.calls[-1][path]
        return [
            module.register_forward_pre_hook(lambda *_: spans.append([self.clock.now()])),
            module.register_forward_hook(lambda *_: spans[-1].append(self.clock.now())),
        ]

    def _keep_first(self, _module, _inputs, output: torch.Tensor) -> None:
        if self.first_output is None:
            self.first_output = output.float().cpu()

    def attach(self, patcher):
        patcher = patcher.clone()
        patcher.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "timer", self.around_call)
        return patcher

    def first(self) -> float:
        """The first call."""
        return self.clock.between(*self.calls[0][""][0])

    def later(self) -> dict[str, float]:
        """A block of each stack, and under "rest" all else of a call: medians without the first call."""
        calls = [
            {path: [self.clock.between(*span) for span in spans] for path, spans in call.items()}
            for call in self.calls[1:]
        ]
        rest = statistics.median(sum(call.pop("")) - sum(map(sum, call.values())) for call in calls)
        blocks = {path: statistics.median(chain.from_iterable(call[path] for call in calls)) for path in calls[0]}
        return {**blocks, "rest": rest}


class Operations(FlopCounterMode):
    """Counts floating-point operations of matrix products and attention, as a clock of a Timer."""

    now = FlopCounterMode.get_total_flops

    def between(self, first: int, last: int) -> int:
        return last - first


def of_all(counts: dict[str, int], each: dict[str, float]) -> float:
    """A call of the whole model, which has so many blocks of each stack."""
    return each["rest"] + sum(count * each[path] for path, count in counts.items())


def count_operations(model, inputs: dict, counts: dict[str, int]) -> float:
    """Floating-point operations of one call of stock ComfyUI."""
    with Operations(display=False) as operations:
        timer = Timer(operations)
        sample(timer.attach(model), **inputs, steps=2)
    return of_all(counts, timer.later())


def measure(name: str, plan: Plan, model, inputs: dict, counts: dict[str, int], repeats: int) -> dict:
    timer = Timer(Clock(model.load_device))
    cuda = model.load_device.type == "cuda"
    patcher = engine.edit(timer.attach(model), **vars(plan))
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    sample(patcher, **inputs, steps=1 + repeats)
    wall, each = time.perf_counter() - started, timer.later()
    return {
        "path": name,
        "step_s": of_all(counts, each),
        "ms": {part: 1000 * seconds for part, seconds in each.items()},
        "first_call_s": timer.first(), "wall_s": wall,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if cuda else None,
        "output": timer.first_output,
    }  # fmt: skip


def profile(name: str, model, inputs: dict) -> None:
    """Print which kernels take the time of calls of a path that has run before; on a CPU, which operators."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as torch_profile

    cuda = torch.cuda.is_available()
    patcher = engine.edit(model, **vars(PATHS[name]))
    with torch_profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as recorded:
        sample(patcher, **inputs, steps=PROFILED)
    rows = recorded.key_averages()
    times = {row: (row.self_device_time_total if cuda else row.self_cpu_time_total) / 1000 for row in rows}
    total = sum(times.values())
    print(f"{name}, {PROFILED} calls of the blocks that were built: {total:.1f} ms in kernels")
    for row in sorted(rows, key=lambda row: -times[row])[:25]:
        print(f"{times[row]:10.1f} ms {100 * times[row] / total:4.0f} % {row.count:5d} x  {row.key[:100]}")


def kernels(model, latent: tuple[int, ...], text: int) -> list[dict]:
    """Each attention kernel at the size of the first blocks' attention."""
    network = Network(model.model.diffusion_model)
    tokens = network.tokens(latent) + (text if network.architecture.stacks[0].order else 0)
    return measure_kernels(tokens, network.heads, network.width // network.heads)


def measure_all(model, inputs: dict, counts: dict[str, int], options) -> list[dict]:
    """All paths, each printed when it is known, with its error against stock and its share of the card's ceiling."""
    best = ceilings()
    flops = count_operations(model, inputs, counts)
    print(f"{options.model}: {flops:.3g} operations a call, ceilings {best}", flush=True)
    results: list[dict] = []
    reference = None
    for name in ["stock"] + [name for name in options.paths if name != "stock"]:
        try:
            result = measure(name, PATHS[name], model, inputs, counts, options.repeats)
        except Exception as error:  # one path must not cost the others their figures
            print(f"{name:40s} failed: {type(error).__name__}: {error}", flush=True)
            results.append({"path": name, "error": str(error)})
            continue
        output = result.pop("output")
        reference = output if reference is None else reference
        result["error_to_stock"] = relative_error(output, reference)
        result["x_stock"] = results[0]["step_s"] / result["step_s"] if results else 1.0
        result["tflops"] = flops / result["step_s"] / 1e12
        result["of_ceiling"] = result["tflops"] / best["matmul_tflops"] if best else None
        print(_row(result), flush=True)
        results.append(result)
    return [{"operations": flops, "ceilings": best}, *results]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--text", type=int, default=0, help="tokens")
    parser.add_argument("--padded", type=int, default=0, help="tokens, with a mask")
    parser.add_argument("--cfg", type=float, default=1.0, help="above 1, a call has two conditionings")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--paths", nargs="*", default=list(PATHS), help="names of paths; stock always runs first")
    parser.add_argument("--densities", type=float, nargs="*", default=[], help="of sparse attention, after the paths")
    parser.add_argument("--profile", nargs="*", default=[], help="paths of which to print the kernels' times")
    parser.add_argument("--kernels", action="store_true", help="measure each attention kernel too")
    options = parser.parse_args()

    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("skein").setLevel(logging.INFO)
    sparse = sparse_paths(options.densities)
    PATHS.update(sparse)
    options.paths += list(sparse)
    case, whole = chosen(options), MODELS[options.model]
    counts = {path: whole.config[entry] for path, entry in whole.blocks.items()}
    latent, text = case.latent, options.text or case.text[0]
    positive, negative = (case.conditioning(seed, options.padded or text) for seed in (0, 1))
    if options.padded:
        positive[0][1]["attention_mask"] = (torch.arange(options.padded) < text).long()[None]
    inputs = {"positive": positive, "negative": negative, "latent": torch.zeros(latent), "cfg": options.cfg}
    with torch.inference_mode():
        model = random_model(case)
        rows = kernels(model, latent, text) if options.kernels else []
        for row in rows:
            print(row, flush=True)
        measured, *results = measure_all(model, inputs, counts, options)
        for name in options.profile:
            profile(name, model, inputs)
    print(
        json.dumps({
            "device": device_name(), "comfyui": comfyui_version.__version__, "torch": torch.__version__,
            "random": "weights and conditioning", "sizes": vars(options), "latent": latent, **measured,
            "kernels": rows, "paths": results,
        })
    )  # fmt: skip


def _row(result: dict) -> str:
    share = f"{100 * result['of_ceiling']:4.0f} %" if result["of_ceiling"] else ""
    peak = f"{result['peak_gib']:5.1f} GiB" if result["peak_gib"] else ""
    parts = "  ".join(f"{part} {ms:6.1f}" for part, ms in result["ms"].items())
    return (
        f"{result['path']:40s} {result['step_s']:8.4f} s/step  {result['x_stock']:5.2f}x  {parts} ms  "
        f"first {result['first_call_s']:5.1f} s  error {result['error_to_stock']:.4f}  {share} {peak}"
    )


if __name__ == "__main__":
    main()
