"""What workers are started with, and when they have ended."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
from skein.workers import group, setting

OLD, NEW = setting.ALLOCATOR


@pytest.mark.parametrize(
    ("system", "given", "workers"),
    [
        ("6.8.0-generic", {}, {OLD: setting.SEGMENTS, NEW: setting.SEGMENTS}),
        ("6.8.0-generic", {OLD: "backend:cudaMallocAsync"}, {OLD: setting.SEGMENTS, NEW: setting.SEGMENTS}),
        ("6.8.0-generic", {NEW: "max_split_size_mb:512"}, {NEW: "max_split_size_mb:512"}),
        ("5.15.167.4-microsoft-standard-WSL2", {OLD: "backend:cudaMallocAsync"}, {}),
    ],
)
def test_the_allocator(system, given, workers, monkeypatch):
    monkeypatch.setattr("platform.release", lambda: system)
    environment = {"HOME": "/root", **given}
    setting.choose_allocator(environment)
    assert environment == {"HOME": "/root", **workers}


def test_a_process_runs_until_its_last_thread_has_ended():
    """Of one whose first thread has ended the system tells the same as of one that has ended; it still has its GPU."""
    code = "import threading, time, ctypes; threading.Thread(target=time.sleep, args=(60,)).start(); "
    with subprocess.Popen([sys.executable, "-c", f"{code}ctypes.CDLL(None).pthread_exit(None)"]) as process:
        while ") Z " not in Path(f"/proc/{process.pid}/stat").read_text():
            time.sleep(0.01)
        assert group._runs(process.pid)
        process.kill()
        deadline = time.monotonic() + 5
        while group._runs(process.pid) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not group._runs(process.pid)
