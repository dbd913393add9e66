"""A channel: messages do not wait. Its shared memory: another process reaches it, it has no name that could be left,
it may be refused."""

import subprocess
import sys
import tempfile
import threading
import time
from multiprocessing.connection import Client, Listener
from pathlib import Path

import pytest
import torch
from skein.parallel.transport import SHARED_MEMORY, Channel, shared_file

SIZE = 1 << 20
WRITE = "import sys; file = open(sys.argv[1], 'r+b'); file.seek(7); file.write(b'skein')"


def conversation(listener, rounds):
    """The other side of one: an answer of two messages to each question."""
    channel = Channel(Client(listener.address))
    for _ in range(rounds):
        kind, _ = channel.receive()
        channel.send("report", "x" * 300)
        channel.send("done", kind)


def test_an_answer_after_a_report_does_not_wait_for_tcp():
    """It did, 40 ms in each call: the kernel held it back until the report had been acknowledged."""
    rounds = 25
    with Listener(("127.0.0.1", 0)) as listener:
        other = threading.Thread(target=conversation, args=(listener, rounds))
        other.start()
        channel = Channel(listener.accept())
        started = time.perf_counter()
        for _ in range(rounds):
            channel.send("question", {})
            assert [channel.receive()[0] for _ in range(2)] == ["report", "done"]
        each = (time.perf_counter() - started) / rounds
        other.join()
        channel.close()
    assert each < 0.02


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
