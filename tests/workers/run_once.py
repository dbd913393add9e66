"""Samples once in one process and once in two workers, and says whether they agree. Runs as a script."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
from pack import load_pack

load_pack()

import torch  # noqa: E402
from skein import engine  # noqa: E402
from skein.demo.sampling import load_demo_model, sample  # noqa: E402
from skein.plan import ParallelConfig  # noqa: E402

with torch.inference_mode():
    model, arguments = load_demo_model(), dict(shape=(1, 16, 3, 8, 8), steps=2)
    one = sample(model, "a red circle", **arguments)
    two = sample(engine.edit(model, parallel=ParallelConfig("cpu,cpu")), "a red circle", **arguments)
    print("same as one process" if (one - two).norm() < 2e-6 * one.norm() else "different")
