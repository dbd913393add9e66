"""The nodes of other packs beside each of ours: is the result right, or refused in a sentence?

    python3 -m bench.other_packs FOLDER [--pieces "TeaCache" ...] [--seconds 900]

FOLDER holds ComfyUI-TeaCache, Comfy-WaveSpeed and ComfyUI-KJNodes as they are cloned. Each piece gets a process of
its own, because some change PyTorch or ComfyUI for good. There the embedded model is sampled with the piece alone, with
each of our techniques and the piece in both orders of the nodes, then with the technique alone and without anything.
Right is what is as far from the piece alone as the technique may be from stock, with nothing left behind.

One row a combination: "equal within x", "as near to stock as it is alone" (another cache, which may decide otherwise
for a small difference), "refused: sentence", "not here: why" (where the piece alone fails), or "WRONG: what". Ends with
one JSON line; the exit status is the number of rows that are wrong.
"""

import argparse
import contextlib
import importlib
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SMALL = dict(shape=(1, 16, 3, 8, 8), steps=6, cfg=3.0, negative="a blue square")
PROMPT = "a red circle moves left"
TECHNIQUES = ("cache", "attention", "fp8", "compile", "parallel")
BOUNDS = {"cache": 0.5, "attention": 1e-4, "fp8": 0.3, "compile": 1e-4, "parallel": 1e-4}
# What packs import from ComfyUI for other architectures, and newer ComfyUIs do not have.
GONE = {"comfy.ldm.lightricks.model": "precompute_freqs_cis"}
Piece = Callable[[Any, Path], Any]  # of a model and the folder of packs: the model with a node of another pack's on it


def core(module: str, node: str, *values: Any) -> Piece:
    """A node of ComfyUI's own."""
    return lambda model, packs: getattr(importlib.import_module(f"comfy_extras.{module}"), node).execute(
        model, *values
    )[0]


def other(folder: str, module: str, node: str, function: str, **inputs: Any) -> Piece:
    """A node of a pack, called as ComfyUI calls it."""

    def put_on(model: Any, packs: Path) -> Any:
        name = "other_" + "".join(letter if letter.isalnum() else "_" for letter in folder)
        if name not in sys.modules:  # as a package, without its __init__, which imports what is not needed here
            sys.modules[name] = ModuleType(name)
            sys.modules[name].__path__ = [str(packs / folder)]
            for where, what in GONE.items():
                vars(importlib.import_module(where)).setdefault(what, None)
        nodes = importlib.import_module(f"{name}.{module}")
        return getattr(getattr(nodes, node)(), function)(model, **inputs)[0]

    return put_on


def kj(node: str, **inputs: Any) -> Piece:
    return other("ComfyUI-KJNodes", "nodes.model_optimization_nodes", node, "patch", **inputs)


def kj_compile(blocks_only: bool) -> Piece:
    return kj(
        "TorchCompileModelAdvanced", backend="inductor", fullgraph=False, mode="default", dynamic="false",
        dynamo_cache_size_limit=64, compile_transformer_blocks_only=blocks_only, debug_compile_keys=False,
    )  # fmt: skip


WHOLE = dict(mode="default", backend="inductor", fullgraph=False, dynamic=False)
PIECES: dict[str, Piece] = {
    "core TorchCompileModel": core("nodes_torch_compile", "TorchCompileModel", "inductor"),
    "core EasyCache": core("nodes_easycache", "EasyCacheNode", 0.1, 0.15, 0.95, False),
    "core LazyCache": core("nodes_easycache", "LazyCacheNode", 0.2, 0.15, 0.95, False),
    "core SkipLayerGuidanceDiT": core("nodes_slg", "SkipLayerGuidanceDiT", 3.0, 0.0, 1.0, "1", "2"),
    "core NAGuidance": core("nodes_nag", "NAGuidance", 5.0, 0.5, 1.5),
    "TeaCache": other(
        "ComfyUI-TeaCache", "nodes", "TeaCache", "apply_teacache", model_type="hunyuan_video", rel_l1_thresh=0.15,
        start_percent=0.0, end_percent=1.0, cache_device="cpu",
    ),
    "TeaCache CompileModel": other("ComfyUI-TeaCache", "nodes", "CompileModel", "apply_compile", **WHOLE),
    "WaveSpeed ApplyFBCacheOnModel": other(
        "Comfy-WaveSpeed", "fbcache_nodes", "ApplyFBCacheOnModel", "patch", object_to_patch="diffusion_model",
        residual_diff_threshold=0.3,
    ),
    "WaveSpeed EnhancedCompileModel": other(
        "Comfy-WaveSpeed", "misc_nodes", "EnhancedCompileModel", "patch", is_patcher=True,
        object_to_patch="diffusion_model", compiler="torch.compile", options="", disable=False, **{**WHOLE, "mode": ""},
    ),
    "KJNodes TorchCompileModelAdvanced, blocks": kj_compile(True),
    "KJNodes TorchCompileModelAdvanced, whole": kj_compile(False),
    "KJNodes PathchSageAttentionKJ": kj("PathchSageAttentionKJ", sage_attention="auto"),
    "KJNodes PatchFlashAttentionKJ": kj("PatchFlashAttentionKJ"),
    "KJNodes ModelPatchTorchSettings": kj("ModelPatchTorchSettings", enable_fp16_accumulation=False),
}  # fmt: skip


def run_piece(name: str, packs: Path) -> list[dict]:
    """The rows of one piece, in this process."""
    import torch
    from skein import engine
    from skein.bench.errors import relative_error
    from skein.demo.sampling import load_demo_model, sample
    from skein.plan import AttentionConfig, CacheConfig, CompileConfig, FP8Config, ParallelConfig
    from skein.workers import release

    configs = (CacheConfig(threshold=0.3), AttentionConfig(), FP8Config(), CompileConfig(), ParallelConfig("cpu,cpu"))
    model, piece = load_demo_model(), PIECES[name]
    stock = sample(model, PROMPT, **SMALL)
    try:
        alone = sample(piece(model, packs), PROMPT, **SMALL)
    except Exception as error:
        return [{"piece": name, "technique": "alone", "result": f"not here: {_sentence(error)}"}]
    rows = [_row(name, "alone", f"{relative_error(alone, stock):.1e} from stock")]

    def attempt(make: Callable[[], Any], expected: Any, bound: float) -> str:
        try:
            out = sample(make(), PROMPT, **SMALL)
            error = relative_error(out, expected)
        except Exception as error:
            refused = isinstance(error, ValueError) and _raised_in(error).startswith("skein")
            return f"{'refused' if refused else 'WRONG: ' + type(error).__name__}: {_sentence(error)}"
        if error < bound:
            return f"equal within {error:.1e}"
        # A cache of theirs may decide otherwise for a small difference: it must not be further from stock for that.
        now, before = relative_error(out, stock), relative_error(expected, stock)
        if now < 1.25 * before + bound:
            return f"as near to stock as it is alone: {now:.1e}, {before:.1e}"
        return f"WRONG: off by {error:.1e}"

    for technique, config in zip(TECHNIQUES, configs):
        plan, bound = {technique: config}, BOUNDS[technique]
        results = {
            "after it": attempt(lambda plan=plan: engine.edit(piece(model, packs), **plan), alone, bound),
            "before it": attempt(lambda plan=plan: piece(engine.edit(model, **plan), packs), alone, bound),
        }
        later = attempt(lambda plan=plan: engine.edit(model, **plan), stock, bound)
        if not later.startswith("equal"):
            results["alone afterwards"] = f"WRONG: {later.removeprefix('WRONG: ')}"
        try:
            if not torch.equal(sample(model, PROMPT, **SMALL), stock):
                results["stock afterwards"] = "WRONG: another result than before"
        except Exception as error:
            results["stock afterwards"] = f"WRONG: {_sentence(error)}"
        release()
        rows += [_row(name, f"{technique} {order}", result) for order, result in results.items()]
    return rows


def _row(piece: str, technique: str, result: str) -> dict:
    return {"piece": piece, "technique": technique, "result": result}


def report_row(piece: str, technique: str, result: str) -> dict:
    """One row, printed."""
    print(f"{piece:44s} {technique:26s} {result}", flush=True)
    return _row(piece, technique, result)


def _raised_in(error: Exception) -> str:
    """The module that an exception was raised in."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return frame.f_globals["__name__"]


def _sentence(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


def in_own_process(name: str, packs: Path, seconds: float) -> list[dict]:
    """The rows of one piece, in a process of its own."""
    command = [sys.executable, "-m", "bench.other_packs", str(packs), "--here", name]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return [_row(name, "all", f"WRONG: no end after {seconds:.0f} s")]
    with contextlib.suppress(json.JSONDecodeError, IndexError):
        return json.loads(done.stdout.strip().splitlines()[-1])
    return [_row(name, "all", f"WRONG: its process ended with {done.returncode}: {done.stderr.strip()[-300:]}")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packs", type=Path, help="folder that holds the packs")
    parser.add_argument("--pieces", nargs="*", default=list(PIECES), help="only these")
    parser.add_argument("--seconds", type=float, default=1800, help="the longest that one piece may take")
    parser.add_argument("--here", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.here:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # in float32, where equal means equal
        sys.path.insert(0, str(ROOT / "scripts"))
        from pack import load_pack

        load_pack()
        import torch

        with torch.inference_mode():
            rows = run_piece(options.here, options.packs)
        print(json.dumps(rows))
        return
    rows = []
    for name in options.pieces:
        rows += [report_row(**row) for row in in_own_process(name, options.packs.resolve(), options.seconds)]
    wrong = sum(row["result"].startswith("WRONG") for row in rows)
    print(json.dumps({"rows": rows, "wrong": wrong}))
    sys.exit(min(wrong, 100))


if __name__ == "__main__":
    main()
