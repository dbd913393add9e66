"""The worker processes, seen from ComfyUI's: started by a launcher, asked one thing at a time, ended when anything is
wrong.

ComfyUI's process never joins the process group, so nothing that happens there can hang it. No address is opened for the
workers of this machine: each is handed one end of a pair of sockets.
"""

import atexit
import collections
import logging
import subprocess
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from .. import live, processes
from .conversation import Conversation, Failed, GroupError, Progress, Refused
from .held import HeldModels, HeldVAE
from .setting import Setting, launch

logger = logging.getLogger("skein")

START_SECONDS = 300.0
END_SECONDS = 5.0


class Group:
    """Running workers, and what they hold. Not for several threads at once.

    in_use: whether somebody works with them, between two questions too; they are not to be taken away then.
    last_run: in numbers, see Caller.figures. pids: of the workers on this machine, by rank.
    """

    def __init__(self, setting: Setting, check_interrupt: Callable[[], None]):
        """Start the workers; await_ready is next."""
        self.setting = setting
        self.closed = self.in_use = False
        asked: Any = weakref.proxy(self)  # or it would outlive its end, until the garbage collector comes
        self.models = HeldModels(asked)
        self.vae = HeldVAE(asked)
        self.last_run: dict = {}
        self.pids: dict[int, int] = {}
        self._log: collections.deque[str] = collections.deque(maxlen=200)
        self._process, channels = launch(setting)
        self.conversation = Conversation(setting, channels, self._process, check_interrupt)
        processes.started(setting.devices)
        atexit.register(self.close)
        threading.Thread(target=self._read_log, daemon=True).start()

    def await_ready(self) -> None:
        """Wait until all workers are ready. Raises GroupError, and what check_interrupt raises."""
        deadline, doing = time.monotonic() + START_SECONDS, "starting"
        if self.setting.nodes > 1:
            doing = f"waiting for {self.setting.nodes - 1} more machines to join at {self.setting.endpoint}"
            logger.warning("Skein workers: %s; without encryption or a password, so only on networks you trust.", doing)
        ready: set[int] = set()
        with live.activity("Starting the worker processes") as progress:
            while len(ready) < len(self.setting.devices):
                with self._ended_by_failure():
                    kind, value, rank = self.conversation.next_message(deadline, doing)
                if kind == "ready":
                    ready.add(rank)
                    self.pids[rank] = value["pid"]
                    processes.changed(rank, pid=value["pid"])
                    progress(len(ready) / len(self.setting.devices))
        processes.changed(state=processes.READY)

    def ask(self, kind: str, value: dict) -> Any:
        """Have all workers do something; rank 0's answer, its tensors as views of shared memory. Raises as ask_all."""
        return self.ask_all(kind, value)[0]

    def ask_all(self, kind: str, value: dict, progress: Progress = lambda amount: None) -> dict[int, Any]:
        """Have all workers do something (a question of QUESTIONS); the answers by rank, of every rank or the first.
        Their tensors are views of shared memory, until the next question.

        progress: told of what is done, as rank 0 sees it.
        Raises the error that all of them have raised alike (a ValueError, say), GroupError if one fails or takes
        longer, torch.OutOfMemoryError if one has no memory left, and what check_interrupt raises: the workers then
        finish what they are at, and the next question waits for that.
        """
        try:
            with self.used(), self._ended_by_failure():
                return self.conversation.ask(kind, value, progress)
        except Refused as refused:
            raise refused.error from None

    def end_run(self) -> None:
        """Have all workers end their run when they are done with what they are at; neither waits nor raises."""
        with suppress(GroupError), self._ended_by_failure():
            self.conversation.say("end", {})

    @contextmanager
    def used(self) -> Iterator[None]:
        """Within: the workers are in use."""
        before, self.in_use = self.in_use, True
        try:
            yield
        finally:
            self.in_use = before

    def give_room(self) -> int:
        """Have the workers take their models off the devices; bytes that this frees where it frees least."""
        self.models.on_devices = 0.0
        return min(answer["freed"] for answer in self.ask_all("make_room", {}).values())

    @property
    def alive(self) -> bool:
        """Whether all workers are there, as far as is known without asking them."""
        return not self.closed and self.conversation.intact

    def close(self) -> None:
        """End all workers, now."""
        if not self.closed:
            _gone(None, processes.ENDED)
        self.closed = True
        atexit.unregister(self.close)
        with suppress(OSError):
            self._process.stdin.close()  # type: ignore[union-attr]
        self.conversation.close()
        try:
            self._process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        deadline = time.monotonic() + END_SECONDS
        while time.monotonic() < deadline and any(map(_runs, self.pids.values())):
            time.sleep(0.01)  # until a worker's end, its GPU is as full as before

    @contextmanager
    def _ended_by_failure(self) -> Iterator[None]:
        """Within: a worker's failure ends all. Raises GroupError, torch.OutOfMemoryError."""
        try:
            yield
        except Failed as failed:
            self.close()
            logger.error("Skein workers: the end of their log:\n%s", "\n".join(self._log))
            _gone(failed.rank, processes.FAILED, failed.said)
            if failed.full:
                raise torch.OutOfMemoryError(f"{failed.who} ran out of memory: {failed.text}") from None
            raise GroupError(
                f"{failed.who} {failed.said.rstrip('.')}. The next prompt starts new workers; the log has more."
            ) from None

    def _read_log(self) -> None:
        for line in self._process.stdout:  # type: ignore[union-attr]
            text = line.decode(errors="replace").rstrip()
            self._log.append(text)
            logger.log(logging.INFO if text.startswith("[0] Skein") else logging.DEBUG, "%s", text)
        if not self.closed:
            _gone(None, processes.FAILED, "It ended unexpectedly; the next prompt starts new worker processes.")


def _gone(rank: int | None, state: str, text: str = "") -> None:
    """Tell that the workers are gone; `rank` is the one that it began with."""
    processes.gone(rank, state, text)
    live.worker_activity(None)


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
        with group.used():
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


def in_use() -> bool:
    """Whether there are workers that somebody works with now."""
    group = _group  # another thread may release it
    return group is not None and group.in_use


def release() -> bool:
    """End the workers; whether there were any."""
    global _group
    group, _group = _group, None
    if group is not None:
        group.close()
    return group is not None
