"""Context parallelism in a real ComfyUI server: previews, progress, unloading, and servers that are killed."""

import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from graphs import SAMPLER, custom_sampling, frames, seeded
from skein.demo.run import in_workers, node_id
from skein.demo.server import ComfyServer, PromptError, comfyui_path

CPUS = "cpu,cpu"


def workers_of(server):
    """Process numbers of a server's workers."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if b"bootstrap.py" not in (process / "cmdline").read_bytes():
                continue
            environment = dict(item.partition(b"=")[::2] for item in (process / "environ").read_bytes().split(b"\0"))
            launcher = Path("/proc") / environment[b"SKEIN_LAUNCHER_PID"].decode()
            if int((launcher / "stat").read_text().rsplit(")", 1)[1].split()[1]) == server.process.pid:
                found.append(int(process.name))
        except (OSError, KeyError):
            continue
    return found


def gone(pids, seconds=5.0):
    deadline = time.monotonic() + seconds
    while any(Path(f"/proc/{pid}").exists() for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not any(Path(f"/proc/{pid}").exists() for pid in pids)


@pytest.mark.parametrize("cfg", [None, 3.0], ids=["KSampler", "SamplerCustomAdvanced"])
def test_the_same_video_with_previews_and_progress(server, prompt, cfg):
    alone, shared = seeded(prompt, 71), in_workers(seeded(prompt, 71), CPUS)
    if cfg:
        alone, shared = custom_sampling(alone, cfg), custom_sampling(shared, cfg)
    stock = frames(server, alone)
    reused = server.get("/skein/runs")["runs"][-1]["reused"]
    events = []
    video = frames(server, shared, events.append)
    assert abs(video - stock).max() < 2 / 255  # a rounding at most
    sampler = node_id(shared, "SamplerCustomAdvanced" if cfg else SAMPLER)
    steps = [e["data"]["value"] for e in events if e["type"] == "progress" and e["data"]["node"] == sampler]
    assert steps[-1] == 6 and sum(e["type"] == "preview" for e in events) >= 3
    run = server.get("/skein/runs")["runs"][-1]
    assert run["finished"] and run["reused"] == reused and len(workers_of(server)) == 2
    said = [e["data"]["text"] for e in events if e["type"] == "progress_text" and e["data"]["node"] == "parallel"]
    assert "calls on cpu, cpu" in said[-1]


@pytest.mark.parametrize(
    ("inputs", "sentence"),
    [
        (dict(devices="97,98"), "no GPU 97, 98 here"),
        (dict(devices="0,0"), "names a GPU twice"),
        (dict(devices="all"), "found no GPU"),
        (dict(devices="fast ones"), "devices must be"),
        (dict(ulysses_degree=3), "do not multiply to 2"),
        (dict(devices="cpu,cpu,cpu,cpu", ulysses_degree=4), "2 heads, which 4 devices cannot share"),
    ],
)
def test_bad_input_gets_a_sentence(server, prompt, inputs, sentence):
    with pytest.raises(PromptError, match=sentence):
        server.run(in_workers(prompt, **{"devices": CPUS, **inputs}))
    assert server.alive()


def test_unloading_the_models_ends_the_workers(server, prompt):
    frames(server, in_workers(seeded(prompt, 72), CPUS))
    pids = workers_of(server)
    assert len(pids) == 2
    server.post("/free", {"unload_models": True})
    assert gone(pids)
    frames(server, in_workers(seeded(prompt, 73), CPUS))


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM], ids=["SIGKILL", "SIGTERM"])
def test_two_servers_and_one_of_them_killed(server, prompt, how, _round):
    """Each has workers of its own; those of the killed one end, the other goes on."""
    seed, videos = 1000 + 100 * _round + how, {}

    def run(on, seed):  # by Ulysses: each would measure, and one might find a ring to be faster
        videos[on] = frames(on, in_workers(seeded(prompt, seed), CPUS, ulysses_degree=2))

    with ComfyServer(comfyui_path()) as other:
        threads = [threading.Thread(target=run, args=(each, seed)) for each in (server, other)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert (videos[server] == videos[other]).all()
        ours, theirs = workers_of(server), workers_of(other)
        assert len(ours) == len(theirs) == 2
        other.process.send_signal(how)
        assert gone(theirs)
    assert workers_of(server) == ours
    run(server, seed + 50)


def test_a_server_killed_at_a_random_moment(prompt, _round):
    """Of a prompt in workers, from their start on: they end with it."""
    moment = random.Random(_round).uniform(0, 12)
    with ComfyServer(comfyui_path()) as server:
        server.submit(in_workers(seeded(prompt, 1), CPUS))
        while len(pids := workers_of(server)) < 2:
            time.sleep(0.05)
        time.sleep(moment)
        launcher = int(psutil.Process(pids[0]).ppid())
        server.process.kill()
        assert gone([*pids, launcher]), moment


def test_a_full_shared_memory_folder_does_no_harm(_round):
    """In a mount namespace of its own, where /dev/shm has 64 KiB."""
    if not shutil.which("unshare") or subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        pytest.skip("this machine does not let a process have mounts of its own")
    script = Path(__file__).parent / "run_once.py"
    command = f"mount -t tmpfs -o size=64k tmpfs /dev/shm && exec {sys.executable} {script}"
    done = subprocess.run(["unshare", "-rm", "sh", "-c", command], capture_output=True, text=True, env=dict(os.environ))
    assert "same as one process" in done.stdout, done.stdout + done.stderr
