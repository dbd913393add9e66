"""The worker processes, seen from ComfyUI's: started by torchrun, asked one thing at a time, ended when anything is
wrong.

ComfyUI's process never joins the process group, so nothing that happens there can hang it. Every wait looks at
ComfyUI's interrupt, at the workers' connections and at the clock.
"""

import atexit
import collections
import json
import logging
import os
import platform
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Listener, wait
from pathlib import Path
from typing import Any

import torch

from .. import live, report
from .protocol import EVERYBODY
from .transport import Channel

logger = logging.getLogger("skein")

WORKER = Path(__file__).resolve().parent.parent / "worker"
START_SECONDS = 300.0
ROOM_SECONDS = 600.0
END_SECONDS = 5.0
LOOK_SECONDS = 0.05  # how often a wait looks at the interrupt
TELL_SECONDS = 0.5  # how long after a failure others may still tell of theirs, which may be the cause
NOT_INHERITED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID")
STATES = {  # of workers asked to
    "load": live.LOADING, "begin": live.LOADING, "call": live.RUNNING, "end": live.READY,
    "take_vae": live.LOADING, "decode_strip": live.RUNNING, "decode_tile": live.RUNNING,
    "room": live.READY, "make_room": live.READY,
}  # fmt: skip
ALLOCATOR = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")  # before and since PyTorch 2.9
SEGMENTS = "expandable_segments:True"  # 0.9 of 24 GB were free and too scattered to be used without
RELEASED = "The workers were released while they were at work. The next prompt starts new ones."


class GroupError(RuntimeError):
    """A worker failed; the message says which and how. The group has ended."""


@dataclass(frozen=True)
class Setting:
    """What makes a group: another setting is another group.

    devices: of this machine. degrees: see Mesh. options: of ComfyUI's command line, as JSON. nodes, endpoint: machines,
    and host:port of this one's launcher where there are several.
    """

    comfyui: str
    devices: tuple[str, ...]
    degrees: tuple[int, int]
    options: str
    nodes: int = 1
    endpoint: str = ""

    def threads(self) -> int:
        return max((os.cpu_count() or 1) // len(self.devices), 1)

    def rendezvous(self) -> list[str]:
        """Arguments of torchrun: where the machines meet."""
        if self.nodes == 1:
            return ["--standalone", "--local-addr=127.0.0.1"]
        host, port = self.endpoint.rsplit(":", 1)
        return [f"--nnodes={self.nodes}", "--node-rank=0", f"--master-addr={host}", f"--master-port={port}"]


def _choose_allocator(environment: dict[str, str]) -> None:
    """A worker's, in its environment: the user's choice, or segments that grow."""
    for name in ALLOCATOR:
        if "cudaMallocAsync" in environment.get(name, ""):  # ComfyUI's own choice
            del environment[name]
    wsl = "microsoft" in platform.release().lower()  # its driver has not always had what segments need
    if not wsl and not any(name in environment for name in ALLOCATOR):
        environment |= dict.fromkeys(ALLOCATOR, SEGMENTS)


class Group:
    """Running workers. Not for several threads at once."""

    def __init__(self, setting: Setting, check_interrupt: Callable[[], None]):
        """Start the workers; await_ready is next."""
        self.setting = setting
        self.closed = False
        self.model: Any = None  # what the workers have loaded, and the patches on it: for the caller to note
        self.patches: Any = None
        self.holder: Any = None  # whose model it is
        self.resident = False  # whether the model is on the devices, as far as this process has asked for it
        self.vae: Any = None  # what makes the VAE that the workers have
        self.last_run: dict = {}  # in numbers: see remote.figures
        self.pids: dict[int, int] = {}  # of the workers on this machine, by rank
        self._check_interrupt = check_interrupt
        self._channels: dict[int, Channel] = {}
        self._waiting = ""  # the kind of the message whose answers have not all come yet
        self._answers: dict[int, Any] = {}  # those that have, by rank: an interrupt may come between two
        self._log: collections.deque[str] = collections.deque(maxlen=200)
        key = os.urandom(32)
        live.workers_started(setting.devices)
        self._listener = Listener(("127.0.0.1", 0), backlog=64, authkey=key)
        self._address = self._listener.address
        self._process = self._launch(key)
        atexit.register(self.close)
        threading.Thread(target=self._read_log, daemon=True).start()
        threading.Thread(target=self._accept, daemon=True).start()

    def await_ready(self) -> None:
        """Wait until all workers are ready. Raises GroupError, and what check_interrupt raises."""
        deadline, doing = time.monotonic() + START_SECONDS, "starting"
        if self.setting.nodes > 1:
            doing = f"waiting for {self.setting.nodes - 1} more machines to join at {self.setting.endpoint}"
            logger.info("Skein workers: %s", doing)
        ready: set[int] = set()
        while len(ready) < len(self.setting.devices):
            kind, value, rank = self._next_message(deadline, doing)
            if kind == "ready":
                ready.add(rank)
                self.pids[rank] = value["pid"]
                live.workers_changed(rank, pid=value["pid"])
        live.workers_changed(state=live.READY)

    def ask(self, kind: str, value: dict, seconds: float) -> Any:
        """Have all workers do something; rank 0's answer, its tensors as views of shared memory. Raises as ask_all."""
        return self.ask_all(kind, value, seconds)[0]

    def ask_all(
        self, kind: str, value: dict, seconds: float, progress: Callable[[int], None] = lambda amount: None
    ) -> dict[int, Any]:
        """Have all workers do something; the answers by rank, of every rank where the kind is one of EVERYBODY, and
        else of the first. Their tensors are views of shared memory, until the next question.

        progress: told of what is done, as rank 0 sees it.
        Raises GroupError if one of them fails or takes longer, torch.OutOfMemoryError if one has no memory left, and
        what check_interrupt raises: the workers then finish what they are at, and the next question waits for that.
        """
        if self._waiting:
            logger.info("Skein workers: waiting for the step that was interrupted")
            self._answer(seconds)
        try:
            self._channels[0].send(kind, value)
        except OSError:
            self._fail(0, "gone")
        self._waiting, self._answers = kind, {}
        live.workers_stand(STATES[kind])
        return self._answer(seconds, progress)

    def give_room(self) -> int:
        """Have the workers take their models off the devices; bytes that this frees where it frees least."""
        self.resident = False
        return min(answer["freed"] for answer in self.ask_all("make_room", {}, ROOM_SECONDS).values())

    @property
    def alive(self) -> bool:
        """Whether all workers are there, as far as is known without asking them."""
        if self.closed or self._process.poll() is not None:
            return False
        if self._waiting:
            return True  # what they have to say is for the next question
        return not wait([channel.connection for channel in self._channels.values()], 0)  # nobody asked: they are gone

    def close(self) -> None:
        """End all workers, now."""
        if not self.closed:
            live.workers_gone(None, live.ENDED)
        self.closed = True
        atexit.unregister(self.close)
        with suppress(OSError):
            self._process.stdin.close()  # type: ignore[union-attr]
        self._stop_listening()
        for channel in self._channels.values():
            channel.close()
        try:
            self._process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        deadline = time.monotonic() + END_SECONDS
        while time.monotonic() < deadline and any(map(_runs, self.pids.values())):
            time.sleep(0.01)  # until a worker's end, its GPU is as full as before

    def _launch(self, key: bytes) -> subprocess.Popen:
        setting = self.setting
        told = {
            "comfyui": setting.comfyui,
            "devices": setting.devices,
            "degrees": setting.degrees,
            "options": json.loads(setting.options),
            "address": self._address,
            "key": key.hex(),
        }
        environment = {name: value for name, value in os.environ.items() if name not in NOT_INHERITED}
        _choose_allocator(environment)
        environment.setdefault("OMP_NUM_THREADS", str(setting.threads()))
        environment.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(min(setting.threads(), 32)))  # 32: PyTorch's most
        environment["SKEIN_WORKER"] = json.dumps(told)
        command = [
            sys.executable, str(WORKER / "launch.py"), *setting.rendezvous(),
            f"--nproc-per-node={len(setting.devices)}", "--max-restarts=0",
            f"--log-dir={os.devnull}",  # else torchrun leaves a folder at each start; this process reads the log
            str(WORKER / "bootstrap.py"),
        ]  # fmt: skip
        return subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            start_new_session=True, cwd=setting.comfyui,
        )  # fmt: skip

    def _read_log(self) -> None:
        for line in self._process.stdout:  # type: ignore[union-attr]
            text = line.decode(errors="replace").rstrip()
            self._log.append(text)
            logger.log(logging.INFO if text.startswith("[0] Skein") else logging.DEBUG, "%s", text)
        if not self.closed:
            live.workers_gone(None, live.FAILED, "They have ended by themselves; the next prompt starts new ones.")

    def _accept(self) -> None:
        from multiprocessing import AuthenticationError

        while not self.closed and len(self._channels) < len(self.setting.devices):
            try:
                channel = Channel(self._listener.accept())
                _, hello = channel.receive()
                self._channels[hello["rank"]] = channel
            except (AuthenticationError, EOFError, ConnectionError):
                continue  # somebody else
            except OSError:
                return  # closed

    def _stop_listening(self) -> None:
        """End _accept, which would hold this object for ever: closing what it listens at does not wake it."""
        with suppress(OSError):
            socket.create_connection(self._address, END_SECONDS).close()
        with suppress(OSError):
            self._listener.close()

    def _answer(self, seconds: float, progress: Callable[[int], None] = lambda amount: None) -> dict[int, Any]:
        deadline, answers = time.monotonic() + seconds, self._answers
        ranks = range(len(self.setting.devices) if self._waiting in EVERYBODY else 1)
        while any(rank not in answers for rank in ranks):
            kind, value, rank = self._next_message(deadline, self._waiting)
            if kind == "done":
                answers[rank] = value
            elif kind == "progress":
                progress(value)
            elif kind in report.KINDS:
                report.receive(kind, value)
        self._waiting = ""
        return answers

    def _next_message(self, deadline: float, doing: str) -> tuple[str, Any, int]:
        """The next message of a worker that is not of a failure, and its rank."""
        while not self.closed:
            self._check_interrupt()
            ranks = {channel.connection: rank for rank, channel in list(self._channels.items())}
            if not ranks:
                time.sleep(LOOK_SECONDS)
            for connection in self._wait(list(ranks), LOOK_SECONDS):
                rank = ranks[connection]
                message = self._read(rank)
                if message[0] in ("gone", "error", "full"):
                    self._fail(rank, *message)
                return *message, rank
            if self._process.poll() is not None:
                self._fail(None, "gone", None)
            if time.monotonic() > deadline:
                self._fail(None, "error", {"text": f"no answer in time ({doing})"})
        raise GroupError(RELEASED)

    def _wait(self, connections: list, seconds: float) -> list:
        """Those that have something to say, within so many seconds."""
        try:
            return wait(connections, seconds) if connections else []
        except OSError:
            if self.closed:
                return []  # by another thread, which releases the workers
            raise

    def _read(self, rank: int) -> tuple[str, Any]:
        try:
            return self._channels[rank].receive()
        except (EOFError, OSError):
            return "gone", None

    def _fail(self, rank: int | None, kind: str, value: Any = None) -> None:
        """Wait a moment for a better explanation, end all workers, and raise.

        When one dies, the others fail for lack of it. So one that has gone without a word comes first, then what was
        told first.
        """
        if self.closed:
            raise GroupError(RELEASED)
        failures = [(rank, kind, value)]
        deadline = time.monotonic() + TELL_SECONDS
        told = {rank}
        while (left := deadline - time.monotonic()) > 0 and kind != "gone":
            ranks = {channel.connection: r for r, channel in self._channels.items() if r not in told}
            for connection in self._wait(list(ranks), left):
                other = ranks[connection]
                told.add(other)
                failures.append((other, *self._read(other)))
            if not ranks:
                break
        self.close()
        logger.error("Skein workers: the end of their log:\n%s", "\n".join(self._log))
        rank, kind, value = next((failure for failure in failures if failure[1] == "gone"), failures[0])
        who = "The workers" if rank is None else f"Worker {rank} ({self.setting.devices[rank]})"
        who = (value or {}).get("who", who)  # one on another machine, told of by the first
        said = "ended without a word (killed, or out of host memory?)" if kind == "gone" else f"failed: {value['text']}"
        live.workers_gone(None if "who" in (value or {}) else rank, live.FAILED, said)
        if kind == "full":
            raise torch.OutOfMemoryError(f"{who} ran out of memory: {value['text']}")
        raise GroupError(f"{who} {said}. The next prompt starts new workers; the log has more.")


def _runs(pid: int) -> bool:
    """Whether a process has a thread that runs, on Linux. One that has ended may wait for its parent to ask."""
    try:
        states = [stat.read_text().rpartition(")")[2].split()[0] for stat in Path(f"/proc/{pid}/task").glob("*/stat")]
    except OSError:  # between two looks
        return Path(f"/proc/{pid}").exists()
    return any(state not in "ZX" for state in states)


_group: Group | None = None  # one at a time: it may fill every GPU


def group_for(setting: Setting, check_interrupt: Callable[[], None]) -> Group:
    """Running workers of this setting: those there are, or new ones in the place of any others."""
    global _group
    group = _group  # another thread may release it
    if group is not None and not group.alive:
        logger.warning("Skein workers: they have ended since the last run; starting new ones.")
    if group is not None and group.alive and group.setting == setting:
        return group
    release()
    _group = group = Group(setting, check_interrupt)
    try:
        group.await_ready()
    except BaseException:
        release()
        raise
    return group


def running_group(devices: Sequence[str] | None = None) -> Group | None:
    """The workers that run now, on these devices (None: any)."""
    group = _group  # another thread may release it
    there = group is not None and group.alive and (devices is None or group.setting.devices == tuple(devices))
    return group if there else None


def release(holder: object = None) -> bool:
    """End the workers, if there are any and they have the holder's model (None: anybody's); whether it was so."""
    global _group
    group = _group
    if group is None or (holder is not None and group.holder is not holder):
        return False
    _group = None
    group.close()
    return True


def name_of(device: torch.device) -> str:
    """A device of this process as plans name it: "0", "cpu"."""
    return str(device.index or 0) if device.type == "cuda" else device.type


def visible_devices(names: Sequence[str]) -> tuple[str, ...]:
    """The devices that a plan names, "all" written out. Raises ValueError on one that is not there."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if list(names) == ["all"]:
        if not count:
            raise ValueError('ComfyUI found no GPU; name "cpu,cpu" as devices to try it on the CPU.')
        return tuple(str(i) for i in range(count))
    missing = [name for name in names if name != "cpu" and int(name) >= count]
    if missing:
        there = f"0 to {count - 1}" if count > 1 else "0 only" if count else "none"
        raise ValueError(f"There is no GPU {', '.join(missing)} here ({there}).")
    return tuple(names)
