"""What sparse attention costs in quality: density, errors and PSNR against max_error, on the embedded model.

    python3 -m bench.sparse_curve [--latent 1 16 16 64 64] [--prompts 12] [--steps 20]

Prompts are sampled with fixed seeds (euler, CFG 1) through ComfyUI's own sampler, all but the first 20 % of the steps
sparse, and compared with dense attention as RGB previews. Beside the promised error: that of each layer's output
against dense attention on the same inputs, computed in full. "share p" keeps, for each block of queries, the fewest
blocks whose shares of the softmax reach p, as a rule without a measurement would. The model is trained; nothing is
random but the seeded noise. Ends with one JSON line.
"""

import argparse
import json
import logging
import statistics
import sys
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
from pack import load_pack  # noqa: E402

load_pack()

import torch  # noqa: E402
from skein import engine, live  # noqa: E402
from skein.attention import SparseAttention  # noqa: E402
from skein.attention.sparse import selection  # noqa: E402
from skein.bench.previews import compare, sampled  # noqa: E402
from skein.bench.timing import device_name  # noqa: E402
from skein.demo.sampling import PROMPTS, load_demo_model  # noqa: E402
from skein.plan import SparseConfig  # noqa: E402

MAX_ERRORS = (0.01, 0.02, 0.05, 0.1, 0.15, 0.2)
SHARES = (0.95, 0.9, 0.8)


class Observed(SparseAttention):
    """Computes every attention in full as well, and keeps how far off the sparse one is, beside what was measured."""

    errors: list[tuple[float, float]] = []

    def _sparse(self, dense, key, call, q, k, v, text):
        before = len(call.chosen)
        out = super()._sparse(dense, key, call, q, k, v, text)
        if len(call.chosen) > before:
            exact = dense(q, k, v, None).float()
            off = (out.float() - exact).square().sum(dim=(1, 2, 3)) / exact.square().sum(dim=(1, 2, 3))
            self.errors.append((float(off.max().sqrt()), float(call.chosen[key][2].max())))
        return out


def by_share(p: float):
    """A replacement of the scores: infinite for the blocks that reach the share p, else below all."""
    own = selection._scores

    def scores(q, k, text, by_deviation):
        found = own(q, k, text, by_deviation)
        share = selection.shares(q, k) / found.shape[-1]
        ordered, order = share.sort(dim=-1, descending=True)
        before = torch.zeros_like(share).scatter_(-1, order, ordered.cumsum(dim=-1) - ordered)
        return torch.where((before < p) | found.isinf(), float("inf"), -1.0)

    return mock.patch.object(selection, "_scores", scores)


def measure(name: str, config: SparseConfig, model, references: list, steps: int, shape: list[int]) -> dict:
    Observed.errors = []
    density: list[float] = []
    edited = engine.edit(model, sparse=config)
    quality = compare(
        lambda _: edited, model, references, steps, lambda: density.append(live.sparse_runs()[-1].density), shape=shape
    )
    true, measured = zip(*Observed.errors)
    row = {
        "rule": name, "density": statistics.mean(density), "psnr_mean": quality["psnr_mean"],
        "psnr_worst": quality["psnr_worst"], "error": statistics.mean(true), "largest_error": max(true),
        "measured": statistics.mean(measured), "layer_calls": len(true),
    }  # fmt: skip
    if config.rule == "max_error":
        row["held"] = sum(error <= config.max_error for error in true) / len(true)
    print(row, flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--latent", type=int, nargs="*", default=[1, 16, 16, 64, 64], help="its shape, B C T H W")
    parser.add_argument("--prompts", type=int, default=len(PROMPTS))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--max-errors", type=float, nargs="*", default=MAX_ERRORS)
    parser.add_argument("--shares", type=float, nargs="*", default=SHARES)
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    with torch.inference_mode(), mock.patch("skein.techniques.SparseAttention", Observed):
        model = load_demo_model()
        references = sampled(model, options.steps, options.prompts, shape=options.latent)
        arguments = model, references, options.steps, options.latent
        rows = [
            measure(f"max_error {error}", SparseConfig(error, min_tokens=1), *arguments) for error in options.max_errors
        ]
        for p in options.shares:
            with by_share(p):  # of a limit between the two, by whichever rule
                rows.append(measure(f"share {p}", SparseConfig(rule="tau", tau=0.0, min_tokens=1), *arguments))
        dtype = str(model.model.get_dtype_inference())
    print(json.dumps({"device": device_name(), "dtype": dtype, "sizes": vars(options), "rules": rows}))


if __name__ == "__main__":
    main()
