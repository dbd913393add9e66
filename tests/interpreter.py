"""Triton kernels on a CPU, by Triton's interpreter, in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


def interpret(script: str, folder: Path) -> None:
    """Run a script that is told the kernels' folder, and prints "same" in the end."""
    pytest.importorskip("triton", reason="no Triton for this platform")
    command = [sys.executable, "-c", script, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "TRITON_INTERPRET": "1"})
    assert done.stdout.strip() == "same", done.stderr[-2000:]
