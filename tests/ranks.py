"""Scripts that run as several ranks, started as a person would start them."""

import os
import subprocess
import sys
from pathlib import Path


def run_ranks(script: Path, world: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A script by torchrun, one thread a rank; what they have printed."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
    command += [f"--log-dir={os.devnull}", str(script), *arguments]  # else torchrun leaves a folder behind
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
