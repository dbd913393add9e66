"""Samples once with compiled blocks in a process of its own, whose compiler the environment may spoil: PyTorch keeps in
memory what a compiler has once told it. Prints the relative error to stock, and logs. Runs as a script."""

import logging
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS), str(TESTS.parent / "scripts")]
from pack import load_pack  # noqa: E402

load_pack()

import torch  # noqa: E402
from skein import engine  # noqa: E402
from skein.bench.errors import relative_error  # noqa: E402
from skein.demo.sampling import sample  # noqa: E402
from skein.plan import CompileConfig  # noqa: E402
from small_models import random_hunyuan_video  # noqa: E402

logging.basicConfig(level=logging.INFO, force=True)
with torch.inference_mode():
    model, arguments = random_hunyuan_video(), dict(shape=(1, 16, 1, 8, 8), steps=2)
    stock = sample(model, "a red circle", **arguments)
    out = sample(engine.edit(model, compile=CompileConfig()), "a red circle", **arguments)
    print(relative_error(out, stock))
