"""What ranks send each other arrives, whichever way it goes. On the CPU, real processes."""

from pathlib import Path

import torch
from ranks import run_ranks
from skein.parallel.ulysses import WIDE, wide

SCRIPT = Path(__file__).parent / "exchanges.py"


def test_tensors_arrive_by_either_way():
    done = run_ranks(SCRIPT, 3)
    assert done.returncode == 0 and done.stdout.count("exchanged") == 3, done.stderr[-3000:]


def test_bytes_are_seen_wide_where_they_lie_so():
    """As blocks hand them over: new tensors, and views of a fused projection behind its text. Else as they are."""
    fused = torch.randn(1, 7, 3, 2, 128, dtype=torch.bfloat16).permute(2, 0, 3, 1, 4)
    for x in (fused[1], fused[1, :, :, 3:], fused[0].contiguous()):
        assert wide(x).dtype == WIDE and torch.equal(wide(x).contiguous().view(x.dtype), x.contiguous())
    for x in (
        torch.randn(2, 3, 12).bfloat16(),
        fused[0].transpose(2, 3),
        torch.randn(2, 3, 17)[..., 1:].bfloat16()[..., 1:9],
    ):
        assert wide(x) is x
