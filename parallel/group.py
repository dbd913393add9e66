"""The worker processes, seen from ComfyUI's: started by a launcher, asked one thing at a time, ended when anything is
wrong.

ComfyUI's process never joins the process group, so nothing that happens there can hang it. Every wait looks at
ComfyUI's interrupt, at the workers' connections and at the clock. No address is opened for the workers of this machine:
each is handed one end of a pair of sockets.
"""

import atexit
import collections
import logging
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch

from .. import live, report
from .protocol import EVERYBODY
from .setting import Setting, launch

logger = logging.getLogger("skein")

START_SECONDS = 300.0
ROOM_SECONDS = 600.0
END_SECONDS = 5.0
LOOK_SECONDS = 0.05  # how often a wait looks at the interrupt
AGREE_SECONDS = 5.0  # for all workers to refuse what one refuses
ERRORS = {"RuntimeError": RuntimeError, "TypeError": TypeError}  # that all may raise alike; others are a ValueError
FAILURES = ("gone", "error", "full")
TELL_SECONDS = 0.5  # how long after a failure others may still tell of theirs, which may be the cause
STATES = {  # of workers asked to
    "load": live.LOADING, "begin": live.LOADING, "call": live.RUNNING, "end": live.READY,
    "take_vae": live.LOADING, "decode_strip": live.RUNNING, "decode_tile": live.RUNNING,
    "room": live.READY, "make_room": live.READY,
}  # fmt: skip
RELEASED = "The workers were released while they were at work. The next prompt starts new ones."


class GroupError(RuntimeError):
    """A worker failed; the message says which and how. The group has ended."""


class _Refused(Exception):
    """All workers have raised the same error, which is in `error`. They go on."""

    def __init__(self, error: Exception):
        self.error = error


@dataclass
class _Question:
    """What the workers have been asked. missing: the ranks that have not answered yet; an interrupt may come between
    two answers."""

    kind: str
    missing: set[int]
    answers: dict[int, Any] = field(default_factory=dict)

    def take(self, rank: int, value: Any) -> None:
        self.missing.remove(rank)
        self.answers[rank] = value


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
        self._pending: collections.deque[_Question] = collections.deque()  # in the order in which they were asked
        self._log: collections.deque[str] = collections.deque(maxlen=200)
        self._process, self._channels = launch(setting)
        live.workers_started(setting.devices)
        atexit.register(self.close)
        threading.Thread(target=self._read_log, daemon=True).start()

    def await_ready(self) -> None:
        """Wait until all workers are ready. Raises GroupError, and what check_interrupt raises."""
        deadline, doing = time.monotonic() + START_SECONDS, "starting"
        if self.setting.nodes > 1:
            doing = f"waiting for {self.setting.nodes - 1} more machines to join at {self.setting.endpoint}"
            logger.warning("Skein workers: %s; without encryption or a password, so only on networks you trust.", doing)
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
        Raises the error that all of them have raised alike (a ValueError, say), GroupError if one fails or takes
        longer, torch.OutOfMemoryError if one has no memory left, and what check_interrupt raises: the workers then
        finish what they are at, and the next question waits for that.
        """
        while self._pending:
            logger.info("Skein workers: waiting for what was interrupted (%s)", self._pending[0].kind)
            with suppress(_Refused):
                self._answer(seconds)
        self._send(kind, value)
        live.workers_stand(STATES[kind])
        try:
            return self._answer(seconds, progress)
        except _Refused as refused:
            raise refused.error from None

    def end_run(self) -> None:
        """Have all workers end their run when they are done with what they are at; neither waits nor raises."""
        with suppress(GroupError):
            self._send("end", {})

    def _send(self, kind: str, value: dict) -> None:
        try:
            self._channels[0].send(kind, value)
        except OSError:
            self._fail(0, "gone")
        ranks = range(len(self.setting.devices) if kind in EVERYBODY else 1)
        self._pending.append(_Question(kind, set(ranks)))

    def give_room(self) -> int:
        """Have the workers take their models off the devices; bytes that this frees where it frees least."""
        self.resident = False
        return min(answer["freed"] for answer in self.ask_all("make_room", {}, ROOM_SECONDS).values())

    @property
    def alive(self) -> bool:
        """Whether all workers are there, as far as is known without asking them."""
        if self.closed or self._process.poll() is not None:
            return False
        if self._pending:
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

    def _read_log(self) -> None:
        for line in self._process.stdout:  # type: ignore[union-attr]
            text = line.decode(errors="replace").rstrip()
            self._log.append(text)
            logger.log(logging.INFO if text.startswith("[0] Skein") else logging.DEBUG, "%s", text)
        if not self.closed:
            live.workers_gone(None, live.FAILED, "They have ended by themselves; the next prompt starts new ones.")

    def _answer(self, seconds: float, progress: Callable[[int], None] = lambda amount: None) -> dict[int, Any]:
        """The answers to the first question that is pending."""
        deadline, question = time.monotonic() + seconds, self._pending[0]
        while question.missing:
            kind, value, rank = self._next_message(deadline, question.kind)
            if kind == "done":
                next(each for each in self._pending if rank in each.missing).take(rank, value)
            elif kind == "progress":
                progress(value)
            elif kind in report.KINDS:
                report.receive(kind, value)
        self._pending.popleft()
        return question.answers

    def _next_message(self, deadline: float, doing: str) -> tuple[str, Any, int]:
        """The next message of a worker that is not of a failure, and its rank."""
        while not self.closed:
            self._check_interrupt()
            ranks = {channel.connection: rank for rank, channel in self._channels.items()}
            for connection in self._wait(list(ranks), LOOK_SECONDS):
                rank = ranks[connection]
                message = self._read(rank)
                if message[0] == "refused":
                    self._refuse(rank, message[1])
                if message[0] in FAILURES:
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

    def _refuse(self, rank: int, value: dict) -> None:
        """All workers refuse the question alike, or the group ends: one that alone refuses has left the others waiting
        for it. Raises _Refused or what _fail raises."""
        if self.setting.nodes > 1:
            self._fail(rank, "error", value)  # those on other machines have no channel to agree through
        missing, deadline = set(self._channels) - {rank}, time.monotonic() + AGREE_SECONDS
        while missing and (left := deadline - time.monotonic()) > 0:
            ranks = {self._channels[other].connection: other for other in missing}
            for connection in self._wait(list(ranks), left):
                kind, told = self._read(ranks[connection])
                if kind in FAILURES:
                    self._fail(ranks[connection], kind, told)
                if kind == "refused" and told == value:
                    missing.remove(ranks[connection])
                elif kind in report.KINDS:
                    report.receive(kind, told)
        if missing:
            self._fail(rank, "error", value)
        self._pending.popleft()
        live.workers_stand(live.READY)
        raise _Refused(ERRORS.get(value["error"], ValueError)(value["words"]))

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
        raise GroupError(f"{who} {said.rstrip('.')}. The next prompt starts new workers; the log has more.")


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
