"""One sampling step of HunyuanVideo 13 B on this GPU: stock ComfyUI, each technique, all together.

    python3 -m bench.step [--frames 129 --width 1280 --height 720] [--double 2 --single 4] [--padded 256]

The model has true sizes and random weights (bench/random_model.py). Every path samples through ComfyUI's own sampler in
this process; blocks are timed one by one with events after a first call that compiles, and scaled to 20 + 40 blocks
where fewer are built. Errors are relative, of the first call's output against stock, and of the attention kernels
against float32 on a slice (bench/attention.py). --padded pads the text to so many tokens, with an attention mask. Ends
with one JSON line.
"""

import argparse
import itertools
import json
import logging
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
from pack import load_pack  # noqa: E402

load_pack()

import comfyui_version  # noqa: E402
import torch  # noqa: E402
from skein import engine  # noqa: E402
from skein.bench import random_model as models  # noqa: E402
from skein.bench.attention import measure as measure_kernels  # noqa: E402
from skein.bench.errors import relative_error  # noqa: E402
from skein.bench.timing import Clock, ceilings, device_name  # noqa: E402
from skein.demo.sampling import sample  # noqa: E402
from skein.plan import AttentionConfig, CompileConfig, FP8Config, Plan  # noqa: E402

EXACT, EIGHT_BIT, COMPILE = AttentionConfig(), AttentionConfig(allow_8bit=True, exact_steps=0), CompileConfig()
STATIC, TUNED = CompileConfig(dynamic="off"), CompileConfig(mode="max-autotune-no-cudagraphs")
TENSOR, ROW = FP8Config("per_tensor"), FP8Config("per_row")
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


class Timer:
    """Times model calls and their blocks."""

    def __init__(self, device: torch.device):
        self.clock = Clock(device)
        self.calls: list[dict[str, list]] = []
        self.first_output: torch.Tensor | None = None

    def around_model(self, execute, *args, **kwargs):
        self.calls.append({"double_block": [], "single_block": []})
        started = self.clock.now()
        output = execute(*args, **kwargs)
        self.calls[-1]["total"] = [(started, self.clock.now())]
        if self.first_output is None:
            self.first_output = output.float().cpu()
        return output

    def around_block(self, kind: str):
        def run(args, extra):
            started = self.clock.now()
            out = extra["original_block"](args)
            self.calls[-1][kind].append((started, self.clock.now()))
            return out

        return run

    def attach(self, patcher, double: int, single: int):
        from comfy.patcher_extension import WrappersMP

        patcher = patcher.clone()
        patcher.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "timer", self.around_model)
        for kind, count in (("double_block", double), ("single_block", single)):
            for i in range(count):
                patcher.set_model_patch_replace(self.around_block(kind), "dit", kind, i)
        return patcher

    def step(self) -> tuple[float, float, float]:
        """Seconds of a double block, a single block and of everything else, medians without the first call."""
        times = [{k: [self.clock.seconds(*span) for span in v] for k, v in call.items()} for call in self.calls[1:]]
        double, single = (
            statistics.median(itertools.chain.from_iterable(call[kind] for call in times))
            for kind in ("double_block", "single_block")
        )
        rest = statistics.median(
            sum(call["total"]) - sum(call["double_block"]) - sum(call["single_block"]) for call in times
        )
        return double, single, rest


def operations(image_tokens: int, text_tokens: int, hidden: int) -> float:
    """Floating-point operations of one step of the 20 + 40 blocks: attention and linear layers."""
    tokens = image_tokens + text_tokens
    attention = 4.0 * tokens**2 * hidden * (models.DOUBLE + models.SINGLE)
    linear = 2.0 * tokens * 12 * hidden**2 * (models.DOUBLE + models.SINGLE)
    return attention + linear


def measure(name: str, plan: Plan, model, options, latent: torch.Tensor) -> dict:
    device = model.load_device
    timer = Timer(device)
    patcher = engine.edit(timer.attach(model, options.double, options.single), **vars(plan))
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    positive = models.conditioning(options.text, padded=options.padded)
    sample(patcher, positive, models.conditioning(options.text, seed=1), latent=latent, steps=1 + options.repeats)
    wall = time.perf_counter() - started
    double, single, rest = timer.step()
    return {
        "path": name,
        "step_s": models.DOUBLE * double + models.SINGLE * single + rest,
        "double_ms": 1000 * double, "single_ms": 1000 * single, "rest_ms": 1000 * rest,
        "first_call_s": timer.clock.seconds(*timer.calls[0]["total"][0]), "wall_s": wall,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None,
        "output": timer.first_output,
    }  # fmt: skip


def profile(name: str, model, options, latent: torch.Tensor) -> None:
    """Print which kernels take the time of one call of a path that has run before."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as torch_profile

    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])
    patcher = engine.edit(model, **vars(PATHS[name]))
    with torch_profile(activities=activities) as recorded:
        sample(patcher, models.conditioning(options.text), models.conditioning(options.text, 1), latent=latent, steps=1)
    key = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    averages = recorded.key_averages()
    print(f"one call of {name}, {options.double} + {options.single} blocks:")
    for row in sorted(averages, key=lambda r: -getattr(r, key))[:25]:
        print(f"{getattr(row, key) / 1000:10.1f} ms {row.count:5d} x  {row.key[:110]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in dict(
        width=1280, height=720, frames=129, double=2, single=4, hidden=models.HIDDEN, text=60, padded=0, repeats=3
    ).items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--paths", nargs="*", default=list(PATHS), help="names of paths; stock always runs first")
    parser.add_argument("--profile", nargs="*", default=[], help="paths of which to print the kernels' times")
    options = parser.parse_args()

    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("skein").setLevel(logging.INFO)
    with torch.inference_mode():
        model = models.random_model(options.double, options.single, options.hidden)
        shape = models.latent_shape(options.width, options.height, options.frames)
        image_tokens = shape[2] * (shape[3] // 2) * (shape[4] // 2)
        flops = operations(image_tokens, options.text, options.hidden)
        best = ceilings()
        print(f"{image_tokens} image tokens, {flops:.3g} operations a step, ceilings {best}", flush=True)
        kernels = measure_kernels(image_tokens + options.text, options.hidden // 128, 128)
        for row in kernels:
            print(row, flush=True)
        results: list[dict] = []
        for name in ["stock"] + [name for name in options.paths if name != "stock"]:
            try:
                result = measure(name, PATHS[name], model, options, torch.zeros(shape))
            except Exception as error:  # one path must not cost the others their figures
                print(f"{name:40s} failed: {type(error).__name__}: {error}", flush=True)
                results.append({"path": name, "error": str(error)})
                continue
            output, reference = result.pop("output"), results[0]["output"] if results else None
            reference = output if reference is None else reference
            result["error_to_stock"] = relative_error(output, reference)
            result["x_stock"] = results[0]["step_s"] / result["step_s"] if results else 1.0
            result["tflops"] = flops / result["step_s"] / 1e12
            result["of_ceiling"] = result["tflops"] / best["matmul_tflops"] if best else None
            print(_row(result), flush=True)
            results.append({**result, "output": output} if not results else result)
        results[0].pop("output")
        for name in options.profile:
            profile(name, model, options, torch.zeros(shape))
    print(
        json.dumps({
            "device": device_name(), "comfyui": comfyui_version.__version__, "torch": torch.__version__,
            "random": "weights and conditioning", "sizes": vars(options), "ceilings": best, "kernels": kernels,
            "paths": results,
        })
    )  # fmt: skip


def _row(result: dict) -> str:
    share = f"{100 * result['of_ceiling']:4.0f} %" if result["of_ceiling"] else ""
    peak = f"{result['peak_gib']:5.1f} GiB" if result["peak_gib"] else ""
    return (
        f"{result['path']:40s} {result['step_s']:7.2f} s/step  {result['x_stock']:5.2f}x  "
        f"double {result['double_ms']:6.1f}  single {result['single_ms']:6.1f}  rest {result['rest_ms']:6.1f} ms  "
        f"first {result['first_call_s']:5.1f} s  error {result['error_to_stock']:.4f}  {share} {peak}"
    )


if __name__ == "__main__":
    main()
