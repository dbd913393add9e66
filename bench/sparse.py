"""Sparse attention of one layer at one size: each kernel at each density, and the steps around it.

    python3 -m bench.sparse [--tokens 118860 --heads 24] [--densities 0.5 0.25 0.15]

Queries, keys and values are Gaussian with means that drift along the sequence, in the layout of HunyuanVideo's blocks;
so many of the last tokens are text. "whole_ms" has choosing, measuring of the error, the kernel, and what is left out
as means. Errors are of some queries against float32 over the same blocks, without the means. Dense kernels, and
comfy_kitchen.sol_attn where it is installed, run in the same process. Ends with one JSON line.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
from pack import load_pack  # noqa: E402

load_pack()

import torch  # noqa: E402
from skein.attention.kernels import KERNELS, Problem  # noqa: E402
from skein.attention.sparse.kernels import SPARSE_KERNELS, lists  # noqa: E402
from skein.attention.sparse.plain import sparse_attention_of_rows  # noqa: E402
from skein.attention.sparse.selection import choose, parts_for, pool, sampled_rows, shares  # noqa: E402
from skein.bench.attention import inputs  # noqa: E402
from skein.bench.errors import relative_error  # noqa: E402
from skein.bench.timing import device_name, median_seconds  # noqa: E402
from skein.plan import SparseConfig  # noqa: E402

MAX_ERRORS = (0.05, 0.1)  # that choosing is timed for
IN_A_ROW = 3  # layers, as in a step: the host is ahead of the GPU


class Layer:
    """One attention's inputs."""

    def __init__(self, options: argparse.Namespace):
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        torch.manual_seed(0)
        q, k, v = inputs(options.tokens, options.heads, options.head_dim, self.device)
        drift = torch.linspace(0, 20, options.tokens, device=self.device)[:, None]
        waves = (drift * torch.rand(options.head_dim, device=self.device)).sin().to(q.dtype)
        self.q, self.k, self.v = q + waves, k + waves, v
        self.text = range(options.tokens - options.text, options.tokens)

    def ms(self, run: Callable[[], object], repeats: int = 5) -> float:
        return 1000 * median_seconds(run, self.device, repeats=repeats)

    def dense(self) -> dict[str, float]:
        """Milliseconds of each dense kernel, or why it cannot."""
        found = {}
        for kernel in KERNELS:
            if kernel.obstacle(Problem.of(self.q)) is None:
                found[kernel.label] = attempt(lambda run=kernel.run: self.ms(lambda: run(self.q, self.k, self.v)))
        return found

    def steps(self) -> dict[str, float]:
        """Milliseconds of what goes with a kernel."""
        q, k, v = self.q, self.k, self.v
        config = SparseConfig(rule="density", density=0.25)
        chosen = choose(q, k, v, self.text, config)
        parts, rows = parts_for(q.device), sampled_rows(q.shape[2], self.text, q.device)
        out, sums = torch.zeros_like(q).transpose(1, 2).contiguous(), torch.zeros(q.shape[:3], device=q.device)
        pooled = pool(q)
        tail = sums, q, chosen.k.means, chosen.v.means, chosen.k.counts, chosen.kept
        return {
            "means": self.ms(lambda: pool(q)),
            "shares": self.ms(lambda: shares(pooled, chosen.k)),
            "block outputs": self.ms(lambda: parts.block_outputs(q[:, :, rows], k, v)),
            "lists": self.ms(lambda: lists(chosen.kept)),
            "tail": self.ms(lambda: parts.add_tail(out, *tail)),
            "choosing by density": self.ms(lambda: choose(q, k, v, self.text, config)),
            **{
                f"choosing by max_error {error}": self.ms(lambda e=error: choose(q, k, v, self.text, SparseConfig(e)))
                for error in MAX_ERRORS
            },
        }

    def sparse(self, density: float) -> list[dict]:
        """Each kernel at a density."""
        q, k, v = self.q, self.k, self.v
        config = SparseConfig(rule="density", density=density)
        chosen = choose(q, k, v, self.text, config)
        rows = sampled_rows(q.shape[2], self.text, q.device)[::4]
        expected = sparse_attention_of_rows(q, k, v, chosen.kept, rows)
        found = []
        for kernel in SPARSE_KERNELS:
            if kernel.obstacle(Problem.of(q)) is not None:
                continue

            def whole(run=kernel.run):
                chosen = choose(q, k, v, self.text, config)
                out, sums = run(q, k, v, chosen.kept)
                tail = sums, q, chosen.k.means, chosen.v.means, chosen.k.counts, chosen.kept
                return parts_for(q.device).add_tail(out, *tail)

            row = {"kernel": kernel.label, "density": float(chosen.density.mean())}
            row["ms"] = attempt(lambda run=kernel.run: self.ms(lambda: run(q, k, v, chosen.kept)))
            if isinstance(row["ms"], float):
                row["error"] = relative_error(kernel.run(q, k, v, chosen.kept)[0][:, rows], expected)
                before = torch.cuda.memory_allocated() if self.device == "cuda" else 0
                row["whole_ms"] = self.ms(lambda: [whole() for _ in range(IN_A_ROW)]) / IN_A_ROW
                if self.device == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                    whole()
                    row["peak_gib"] = (torch.cuda.max_memory_allocated() - before) / 2**30
            found.append(row)
        return found

    def others(self, density: float) -> dict[str, float]:
        """comfy_kitchen.sol_attn at about this density."""
        try:
            import comfy_kitchen

            run = comfy_kitchen.sol_attn
        except (ImportError, AttributeError):
            return {}
        q, k, v = (x.transpose(1, 2).contiguous() for x in (self.q, self.k, self.v))
        return {"comfy_kitchen.sol_attn": attempt(lambda: self.ms(lambda: run(q, k, v, topk_ratio=density)))}


def attempt(measure: Callable[[], float]) -> float | str:
    """What is measured, or why it is not: one kernel must not cost the others their figures."""
    try:
        return measure()
    except Exception as error:
        return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in dict(tokens=118860, heads=24, head_dim=128, text=60).items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--densities", type=float, nargs="*", default=[0.5, 0.25, 0.15])
    options = parser.parse_args()
    with torch.inference_mode():
        layer = Layer(options)
        dense, steps = layer.dense(), layer.steps()
        for name, ms in {**dense, **steps}.items():
            print(name, ms, flush=True)
        rows: list[dict] = []
        for density in options.densities:
            for row in (*layer.sparse(density), {"density": density, **layer.others(density)}):
                print(row, flush=True)
                rows.append(row)
    print(
        json.dumps({
            "device": device_name(), "torch": torch.__version__, "sizes": vars(options), "random": "q, k and v",
            "dense_ms": dense, "steps_ms": steps, "sparse": rows,
        })
    )  # fmt: skip


if __name__ == "__main__":
    main()
