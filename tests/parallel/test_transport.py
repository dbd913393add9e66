"""Shared memory between processes: another one reaches it, it has no name that could be left, it may be refused."""

import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from skein.parallel.transport import SHARED_MEMORY, shared_file

SIZE = 1 << 20
WRITE = "import sys; file = open(sys.argv[1], 'r+b'); file.seek(7); file.write(b'skein')"


def named():
    return {path for folder in (SHARED_MEMORY, Path(tempfile.gettempdir())) for path in folder.glob("skein-*")}


def test_another_process_writes_into_it_and_no_name_is_left():
    before = named()
    with shared_file(SIZE) as path:
        memory = torch.from_file(path, shared=True, size=SIZE, dtype=torch.uint8)
        subprocess.run([sys.executable, "-c", WRITE, path], check=True)
        if sys.platform == "linux":
            assert named() == before  # so nothing can be left by a process that is killed
    assert bytes(memory[7:12].tolist()) == b"skein" and int(memory.sum()) == sum(b"skein")
    assert named() == before


def test_no_room_is_told_with_a_sentence():
    before = named()
    with pytest.raises(RuntimeError, match=r"There is no room for .* GB in .*; make some, or"), shared_file(1 << 60):
        pass
    assert named() == before
