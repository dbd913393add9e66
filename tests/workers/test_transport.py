"""A channel: messages do not wait, its shared memory reaches the other process and has no name that could be left."""

import os
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import closing
from multiprocessing import Pipe
from pathlib import Path

import pytest
import torch
from skein.workers.transport import HANDLES, SMALLEST, Channel, nameless_file

ECHO = """
import sys
from multiprocessing.connection import Connection
sys.path.insert(0, sys.argv[2])
from pack import load_pack
load_pack()
from skein.workers.transport import Channel
channel = Channel(Connection(int(sys.argv[1])))
while True:
    kind, value = channel.receive()
    channel.send(kind, value + 1)
"""


def conversation(connection, rounds):
    """The other side of one: an answer of two messages to each question."""
    channel = Channel(connection)
    for _ in range(rounds):
        kind, _ = channel.receive()
        channel.send("report", "x" * 300)
        channel.send("done", kind)


def test_an_answer_after_a_report_does_not_wait_for_tcp():
    """It did, 40 ms in each call: the kernel held it back until the report had been acknowledged."""
    rounds = 25
    own, others = Pipe()
    other = threading.Thread(target=conversation, args=(others, rounds))
    other.start()
    channel = Channel(own)
    started = time.perf_counter()
    for _ in range(rounds):
        channel.send("question", {})
        assert [channel.receive()[0] for _ in range(2)] == ["report", "done"]
    each = (time.perf_counter() - started) / rounds
    other.join()
    channel.close()
    assert each < 0.02


def named():
    """Files, not the folders of servers that start or end meanwhile."""
    folders = Path("/dev/shm"), Path(tempfile.gettempdir())
    return {path for folder in folders for path in folder.glob("skein*") if path.is_file()}


def test_tensors_reach_another_process_through_memory_that_grows_and_has_no_name():
    before, handles = named(), len(os.listdir(HANDLES))
    own, others = Pipe()
    scripts = Path(__file__).resolve().parents[2] / "scripts"
    command = [sys.executable, "-c", ECHO, str(others.fileno()), str(scripts)]
    with subprocess.Popen(command, pass_fds=[others.fileno()]) as process:
        others.close()
        with closing(Channel(own)) as channel:  # else the other process would wait, and this one for it
            for size in (7, SMALLEST, 2 * SMALLEST, 5):
                sent = torch.randn(size)
                channel.send("tensor", sent)
                assert torch.equal(channel.receive()[1], sent + 1)
            assert named() == before  # so nothing can be left by a process that is killed
        assert process.wait(10) == 1  # EOFError
    assert len(os.listdir(HANDLES)) == handles


def test_the_other_side_ends_while_the_memory_grows():
    own, others = Pipe()
    others.close()
    with pytest.raises(OSError):
        Channel(own).send("tensor", torch.ones(7))
    handles = len(os.listdir(HANDLES))
    own, others = Pipe()
    Channel(others).connection.send_bytes(b'{"kind": "memory", "version": 1, "data": 7, "tensors": [], "bytes": 0}')
    others.close()
    with pytest.raises(EOFError):
        Channel(own).receive()
    assert len(os.listdir(HANDLES)) <= handles + 1  # `own`


def test_no_room_is_told_with_a_sentence():
    before = named()
    with pytest.raises(RuntimeError, match=r"There is no room for .* GB of shared memory; close"):
        nameless_file(1 << 60)
    assert named() == before
