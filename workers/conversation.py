"""What ComfyUI's process asks of its workers and hears from them: one question at a time, and what goes wrong.

Every wait looks at ComfyUI's interrupt, at the workers' connections and at the clock.
"""

import collections
import logging
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from typing import Any, NoReturn

from .. import processes, report
from .questions import QUESTIONS
from .setting import Setting
from .transport import Channel

logger = logging.getLogger("skein")

LOOK_SECONDS = 0.05  # how often a wait looks at the interrupt
AGREE_SECONDS = 5.0  # for all workers to refuse what one refuses
TELL_SECONDS = 0.5  # how long after a failure others may still tell of theirs, which may be the cause
ERRORS = {"RuntimeError": RuntimeError, "TypeError": TypeError}  # that all may raise alike; others are a ValueError
FAILURES = ("gone", "error", "full")
RELEASED = "The workers were released while they were at work. The next prompt starts new ones."

Progress = Callable[[int], None]


class GroupError(RuntimeError):
    """A worker failed; the message says which and how. The group has ended."""


class Refused(Exception):
    """All workers have raised the same error, which is in `error`. They go on."""

    def __init__(self, error: Exception):
        self.error = error


class Failed(Exception):
    """A worker has failed: its rank (None: all, or one that nobody knows), whether it is gone or full, and its words.

    elsewhere: whether it is one on another machine, told of by the first.
    """

    def __init__(self, setting: Setting, rank: int | None, kind: str, value: dict | None):
        value = value or {}
        self.elsewhere, self.full = "who" in value, kind == "full"
        self.rank = None if self.elsewhere else rank
        who = "The workers" if rank is None else f"Worker {rank} ({setting.devices[rank]})"
        self.who = value.get("who", who)
        self.text = value.get("text", "")
        gone = "ended without a message (killed, or out of host memory?)"
        self.said = gone if kind == "gone" else f"failed: {self.text}"


@dataclass
class _Asked:
    """What the workers have been asked. missing: the ranks that have not answered yet; an interrupt may come between
    two answers."""

    kind: str
    missing: set[int]
    answers: dict[int, Any] = field(default_factory=dict)

    def take(self, rank: int, value: Any) -> None:
        self.missing.remove(rank)
        self.answers[rank] = value


class Conversation:
    """With the workers of this machine, by rank. Not for several threads at once, but that another may close it.

    process: their launcher. Raises Failed if a worker fails, GroupError if another thread has closed it, and what
    check_interrupt raises.
    """

    def __init__(
        self,
        setting: Setting,
        channels: dict[int, Channel],
        process: subprocess.Popen,
        check_interrupt: Callable[[], None],
    ):
        self.channels, self.closed = channels, False
        self.pending: collections.deque[_Asked] = collections.deque()  # in the order in which they were asked
        self._setting, self._process, self._check_interrupt = setting, process, check_interrupt

    def close(self) -> None:
        """Hang up."""
        self.closed = True
        for channel in self.channels.values():
            channel.close()

    @property
    def intact(self) -> bool:
        """Whether all workers listen, as far as is known without asking them."""
        if self.closed or self._process.poll() is not None:
            return False
        if self.pending:
            return True  # what they have to say is for the next question
        return not wait([channel.connection for channel in self.channels.values()], 0)  # nobody asked: they are gone

    def ask(self, kind: str, value: dict, progress: Progress) -> dict[int, Any]:
        """The answers to a question by rank, of those who answer it. First those to what was asked before an interrupt.

        progress: told of what is done, as rank 0 sees it. Raises Refused too.
        """
        seconds = QUESTIONS[kind].seconds
        while self.pending:
            logger.info("Skein workers: waiting for what was interrupted (%s)", self.pending[0].kind)
            with suppress(Refused):
                self._answers(seconds)
        self.say(kind, value)
        processes.stand(QUESTIONS[kind].state)
        return self._answers(seconds, progress)

    def say(self, kind: str, value: dict) -> None:
        """Ask a question whose answers the next one waits for."""
        try:
            self.channels[0].send(kind, value)
        except OSError:
            self._fail(0, "gone")
        ranks = range(len(self._setting.devices) if QUESTIONS[kind].everybody else 1)
        self.pending.append(_Asked(kind, set(ranks)))

    def _answers(self, seconds: float, progress: Progress = lambda amount: None) -> dict[int, Any]:
        """The answers to the first question that is pending."""
        deadline, question = time.monotonic() + seconds, self.pending[0]
        while question.missing:
            kind, value, rank = self.next_message(deadline, question.kind)
            if kind == "done":
                next(each for each in self.pending if rank in each.missing).take(rank, value)
            elif kind == "progress":
                progress(value)
            elif kind in report.KINDS:
                report.receive(kind, value)
        self.pending.popleft()
        return question.answers

    def next_message(self, deadline: float, doing: str) -> tuple[str, Any, int]:
        """The next message of a worker that is not of a failure, and its rank. doing: what is waited for."""
        while not self.closed:
            self._check_interrupt()
            ranks = {channel.connection: rank for rank, channel in self.channels.items()}
            for connection in self._wait(list(ranks), LOOK_SECONDS):
                rank = ranks[connection]
                message = self._read(rank)
                if message[0] == "refused":
                    self._refuse(rank, message[1])
                if message[0] in FAILURES:
                    self._fail(rank, *message)
                return *message, rank
            if self._process.poll() is not None:
                self._fail(None, "gone")
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
            return self.channels[rank].receive()
        except (EOFError, OSError):
            return "gone", None

    def _refuse(self, rank: int, value: dict) -> NoReturn:
        """All workers refuse the question alike, or it is a failure: one that alone refuses has left the others waiting
        for it."""
        if self._setting.nodes > 1:
            self._fail(rank, "error", value)  # those on other machines have no channel to agree through
        missing, deadline = set(self.channels) - {rank}, time.monotonic() + AGREE_SECONDS
        while missing and (left := deadline - time.monotonic()) > 0:
            ranks = {self.channels[other].connection: other for other in missing}
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
        self.pending.popleft()
        processes.stand(processes.READY)
        raise Refused(ERRORS.get(value["error"], ValueError)(value["words"]))

    def _fail(self, rank: int | None, kind: str, value: Any = None) -> NoReturn:
        """Wait a moment for a better explanation, and raise.

        When one dies, the others fail for lack of it. So one that has gone without a message comes first, then what was
        told first.
        """
        if self.closed:
            raise GroupError(RELEASED)
        failures = [(rank, kind, value)]
        deadline = time.monotonic() + TELL_SECONDS
        told = {rank}
        while (left := deadline - time.monotonic()) > 0 and kind != "gone":
            ranks = {channel.connection: r for r, channel in self.channels.items() if r not in told}
            for connection in self._wait(list(ranks), left):
                other = ranks[connection]
                told.add(other)
                failures.append((other, *self._read(other)))
            if not ranks:
                break
        raise Failed(self._setting, *next((failure for failure in failures if failure[1] == "gone"), failures[0]))
