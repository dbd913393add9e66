"""Who may talk to the workers: nobody but ComfyUI's process. Attacks with harmless payloads.

On the CPU, or on the two GPUs that SKEIN_DEVICES names ("0,1").
"""

import ipaddress
import json
import os
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import torch
from random_checkpoints import SMALL, random_model, text
from skein import engine
from skein.bench.errors import relative_error
from skein.demo.sampling import sample
from skein.plan import CPU_PROCESSES, ParallelConfig
from skein.workers import group, release
from torch.distributed import TCPStore

STRANGER = Path(__file__).parent / "stranger.py"
DEVICES = os.environ.get("SKEIN_DEVICES", "cpu,cpu")
TWO = ParallelConfig(DEVICES)
TOLERANCE = 2e-6 if DEVICES == "cpu,cpu" else 1e-2  # ComfyUI computes in bfloat16 on GPUs
RUNS_WITHIN = 15.0  # seconds: PyTorch's rendezvous looked at what a stranger had written every five


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    with torch.inference_mode():
        return random_model(tmp_path_factory.mktemp("checkpoints"), 2)


@pytest.fixture(autouse=True)
def _ended():
    yield
    release()


def run(model):
    return sample(engine.edit(model, parallel=TWO), text(7), **SMALL)


def tree():
    """This process, which stands for ComfyUI's, the launcher, the workers and what these have started."""
    own = psutil.Process()
    return [own, *own.children(recursive=True)]


def sockets():
    """(address, port) of everything that listens in these processes."""
    found = [each for process in tree() for each in process.net_connections("inet")]
    return {tuple(each.laddr) for each in found if each.status in (psutil.CONN_LISTEN, psutil.CONN_NONE)}


@contextmanager
def stranger(leaves):
    """Somebody else, who has tried all ports and still holds what connections he got."""
    leaves.parent.chmod(0o777)
    pids = [str(process.pid) for process in tree()]
    command = [sys.executable, str(STRANGER), str(leaves), *pids]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield json.loads(process.stdout.readline())
        process.stdin.close()


def test_with_workers_up_everything_that_listens_is_on_the_loopback(model):
    run(model)
    there = sockets()
    assert all(ipaddress.ip_address(address).is_loopback for address, _ in there), there


def test_the_stranger_knows_a_store_when_he_finds_one(tmp_path):
    """Without this the next test would say nothing."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with stranger(tmp_path / "payload") as found:
        assert store.port in found["stores"] and store.check(["stranger", "torch.rendezvous.none"])
        assert found["uid"] != 0
    del store


def test_a_stranger_finds_no_store_and_nothing_that_he_sends_is_run(model, tmp_path):
    expected = sample(model, text(7), **SMALL)
    run(model)
    pids, leaves = dict(group._group.pids), tmp_path / "payload"
    with stranger(leaves) as found:
        assert found["ports"] and found["stores"] == []
        deadline = time.monotonic() + RUNS_WITHIN
        while time.monotonic() < deadline and not leaves.exists():
            assert relative_error(run(model), expected) < TOLERANCE
        assert not leaves.exists()
    assert relative_error(run(model), expected) < TOLERANCE and group._group.pids == pids


def test_strangers_at_every_port_do_not_stop_a_start(model):
    """Connections that say nothing, or something else, from the first moment that a port is open."""
    expected, ended, held, reached = sample(model, text(7), **SMALL), threading.Event(), [], set()

    def call():
        while not ended.is_set():
            for address, port in sockets() - reached:
                reached.add((address, port))
                for said in (b"", b"GET / HTTP/1.1\r\n\r\n", b"\x7f\xff\xff\xff", b"\xff\xff\xff\xff", b"\0\0\0\7"):
                    try:
                        held.append(socket.create_connection((address, port), 1))
                        held[-1].sendall(said)
                    except OSError:
                        continue
            time.sleep(0.01)

    thread = threading.Thread(target=call)
    thread.start()
    try:
        started = time.monotonic()
        assert relative_error(run(model), expected) < TOLERANCE
        assert time.monotonic() - started < 100 and reached
    finally:
        ended.set()
        thread.join()


@pytest.mark.parametrize(
    ("devices", "sentence"),
    [
        ("cpu," * 99_999 + "cpu", f"100000 processes on the CPU; {CPU_PROCESSES} is the most"),
        ("9" * 5000, r'devices must be "all"'),
        ("0," * 5000 + "x", r'devices must be "all"'),
        ("\u0661", r'devices must be "all"'),
    ],
)
def test_devices_that_cannot_be_get_a_short_sentence(devices, sentence):
    with pytest.raises(ValueError, match=sentence) as error:
        ParallelConfig(devices)
    assert len(str(error.value)) < 200


@pytest.mark.parametrize(
    "mistake",
    [dict(shape=(1, 16, 1, 2, 2)), dict(positive=text(0))],
    ids=["one image token for two devices", "no text at all"],
)
def test_a_mistake_leaves_the_workers_where_they_are(model, mistake):
    """And is told of in the words that one process has, where that cannot do it either."""
    arguments = {"positive": text(7), **SMALL, **mistake}
    expected = sample(model, text(7), **SMALL)
    run(model)
    pids = dict(group._group.pids)
    alone = None
    try:
        sample(model, **arguments)
    except RuntimeError as error:
        alone = str(error)
    with pytest.raises(RuntimeError if alone else ValueError) as error:
        sample(engine.edit(model, parallel=TWO), **arguments)
    assert str(error.value) == (alone or "1 image tokens cannot be spread over 2 devices; use fewer devices.")
    assert relative_error(run(model), expected) < TOLERANCE and group._group.pids == pids
