"""What ranks send each other arrives, whichever way it goes. On the CPU, real processes."""

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parent / "exchanges.py"


def test_tensors_arrive_by_either_way():
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=3", str(SCRIPT)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count("exchanged") == 3, done.stderr[-3000:]
