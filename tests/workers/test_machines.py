"""Workers on several machines, here two launchers that meet on loopback: three ranks give what one process gives.

The second machine is `joiner`, which does what the README tells people to do there: the launcher in a loop.
"""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import comfy
import psutil
import pytest
import torch
from random_checkpoints import SMALL, random_model, text
from skein import engine
from skein.bench.errors import relative_error
from skein.demo.sampling import sample
from skein.plan import ParallelConfig
from skein.workers import GroupError, group, release
from skein.workers.environment import ENDPOINT, NODES, machines

LAUNCHER = Path(__file__).resolve().parents[2] / "worker" / "launch.py"


class Joiner:
    """A machine that joins again and again, with one CPU worker."""

    def __init__(self, port, nodes=2):
        comfyui = Path(next(iter(comfy.__path__))).parent
        self.command = [
            sys.executable, str(LAUNCHER), "--join", f"127.0.0.1:{port}", f"--nnodes={nodes}", "--node-rank=1",
            "--comfyui", str(comfyui), "--devices", "cpu",
        ]  # fmt: skip
        self.ended = False
        self.process = None
        threading.Thread(target=self.join_in, daemon=True).start()

    def join_in(self):
        while not self.ended:
            self.process = subprocess.Popen(self.command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            self.process.wait()

    def workers(self):
        try:
            return [child.pid for child in psutil.Process(self.process.pid).children(recursive=True)]
        except psutil.Error:
            return []

    def end(self):
        self.ended = True
        self.process.terminate()
        self.process.wait(20)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    with torch.inference_mode():
        return random_model(tmp_path_factory.mktemp("checkpoints"), 3)


@pytest.fixture
def joiner(monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setenv(NODES, "2")
    monkeypatch.setenv(ENDPOINT, f"127.0.0.1:{port}")
    machine = Joiner(port)
    yield machine
    machine.end()
    release()


def run(model):
    return sample(engine.edit(model, parallel=ParallelConfig("cpu,cpu")), positive=text(7), **SMALL)


def gone(pids, seconds):
    deadline = time.monotonic() + seconds
    while any(psutil.pid_exists(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.1)
    return not any(psutil.pid_exists(pid) for pid in pids)


def test_two_machines(joiner, model):
    """The same result; the second run finds the workers; a worker lost there is told of, and the machine joins again;
    releasing ends the workers on both."""
    expected = sample(model, text(7), **SMALL)
    assert relative_error(run(model), expected) < 2e-6
    first = joiner.workers()
    assert len(first) == 1 and relative_error(run(model), expected) < 2e-6 and joiner.workers() == first

    os.kill(first[0], signal.SIGKILL)
    with pytest.raises(GroupError, match="Worker"):
        for _ in range(20):
            run(model)
    assert relative_error(run(model), expected) < 2e-6

    again = joiner.workers() + list(group._group.pids.values())
    joiner.ended = True
    release()
    assert gone(again, 10)


@pytest.mark.parametrize(
    ("nodes", "endpoint", "message"),
    [
        ("two", "", "SKEIN_NNODES must be a number of machines, not 'two'"),
        ("0", "", "SKEIN_NNODES must be a number"),
        ("2", "", "set SKEIN_RDZV_ENDPOINT to this machine's host:port"),
        ("2", "somewhere", "host:port, not 'somewhere'"),
        ("2", "0.0.0.0:29500", "must be one address of this machine"),
    ],
)
def test_a_bad_environment_gets_a_sentence(nodes, endpoint, message, monkeypatch):
    monkeypatch.setenv(NODES, nodes)
    monkeypatch.setenv(ENDPOINT, endpoint)
    with pytest.raises(ValueError, match=message):
        machines()


def test_one_machine_needs_no_endpoint(monkeypatch):
    monkeypatch.delenv(NODES, raising=False)
    assert machines() == (1, "")


def test_an_address_that_is_another_machines_gets_a_sentence(model, monkeypatch):
    monkeypatch.setenv(NODES, "2")
    monkeypatch.setenv(ENDPOINT, "192.0.2.1:29500")  # of no machine: RFC 5737
    with pytest.raises(
        ValueError, match=r"192.0.2.1:29500, where ComfyUI cannot listen \(.*\); set it to this machine's"
    ):
        run(model)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--join", "127.0.0.1:1", "--nnodes", "2", "--node-rank", "0", "--devices", "cpu"], "must be from 1 to 1"),
        (["--nnodes", "2", "--node-rank", "1", "--devices", "cpu"], "--join"),
    ],
)
def test_what_a_person_types_wrong_on_the_other_machine(arguments, sentence):
    done = subprocess.run([sys.executable, str(LAUNCHER), *arguments], capture_output=True, text=True)
    assert done.returncode == 2 and sentence in done.stderr
