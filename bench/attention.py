"""Every attention kernel that this machine has, at one size: time, TFLOP/s, error against float32.

    python3 -m bench.attention [--tokens 118860 --heads 24]

Queries, keys and values are Gaussian, in the layout in which HunyuanVideo's blocks hand them over. The error is that of
the first 256 queries against all keys, relative to float32. Ends with one JSON line.
"""

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
from pack import load_pack  # noqa: E402

load_pack()

import torch  # noqa: E402
from skein.attention.kernels import KERNELS, Problem, plain_attention  # noqa: E402
from skein.bench.errors import relative_error  # noqa: E402
from skein.bench.timing import device_name, median_seconds  # noqa: E402

CHECKED = 256


def inputs(tokens: int, heads: int, head_dim: int, device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q and k as new tensors (1, H, S, D), v as a view of the fused projection, as a single block has them."""
    qkv = torch.randn(1, tokens, 3, heads, head_dim, device=device, dtype=torch.bfloat16)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    return q.clone(memory_format=torch.contiguous_format), k.clone(memory_format=torch.contiguous_format), v


def reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """The first queries' output in float32, one head at a time: (1, 256, H, D)."""
    heads = range(q.shape[1])
    return torch.cat([plain_attention(q[:, h : h + 1, :CHECKED], k[:, h : h + 1], v[:, h : h + 1]) for h in heads], 2)


def measure(tokens: int, heads: int, head_dim: int) -> list[dict]:
    """One row a kernel; those that cannot run say why."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    q, k, v = inputs(tokens, heads, head_dim, device)
    expected = reference(q, k, v)
    flops = 4.0 * tokens**2 * heads * head_dim
    rows = []
    for kernel in KERNELS:
        obstacle = kernel.obstacle(Problem.of(q))
        if obstacle is None:
            try:
                seconds = median_seconds(lambda run=kernel.run: run(q, k, v), device, repeats=5)
                error = relative_error(kernel.run(q, k, v)[:, :CHECKED], expected)
                rows.append(
                    {"kernel": kernel.label, "ms": 1000 * seconds, "tflops": flops / seconds / 1e12,
                     "error": error}
                )  # fmt: skip
                continue
            except Exception as problem:  # one kernel must not cost the others their figures
                obstacle = f"{type(problem).__name__}: {str(problem).splitlines()[0]}"
        rows.append({"kernel": kernel.label, "obstacle": obstacle})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in dict(tokens=118860, heads=24, head_dim=128).items():
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args()
    with torch.inference_mode():
        rows = measure(options.tokens, options.heads, options.head_dim)
    for row in rows:
        print(
            f"{row['kernel']:26s} "
            + (row.get("obstacle") or f"{row['ms']:8.1f} ms {row['tflops']:6.0f} TFLOP/s  error {row['error']:.4f}")
        )
    print(json.dumps({"device": device_name(), "torch": torch.__version__, "sizes": vars(options), "kernels": rows}))


if __name__ == "__main__":
    main()
