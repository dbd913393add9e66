"""What a run did, as plain data: kept for the last runs, logged in one line, shown on the node."""

import logging
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

import torch

logger = logging.getLogger("skein")


@dataclass
class Call:
    """One model call. `change` is the relative change that decided, None where nothing could be compared;
    `ms` is the time of the call on the device, None until the run has ended."""

    sigma: float
    change: float | None
    threshold: float
    reused: bool
    ms: float | None = None


@dataclass
class Run:
    """The calls of one sampling run under the first-block cache."""

    calls: list[Call] = field(default_factory=list)
    node_id: str | None = None
    started: float = field(default_factory=time.time)  # seconds since the epoch
    seconds: float = 0.0
    finished: bool = False  # False after an exception or an interrupt

    @property
    def reused(self) -> int:
        return sum(call.reused for call in self.calls)

    @property
    def computed(self) -> int:
        return len(self.calls) - self.reused

    @property
    def speedup(self) -> float:
        """Estimated: the time had every call taken what the computed ones took (median), over the time taken."""
        computed = sorted(call.ms for call in self.calls if not call.reused and call.ms is not None)
        total = sum(call.ms for call in self.calls if call.ms is not None)
        if not computed or not total:
            return 1.0
        return computed[len(computed) // 2] * len(self.calls) / total

    def summary(self) -> str:
        return (
            f"{len(self.calls)} model calls: {self.computed} computed, {self.reused} reused, "
            f"about {self.speedup:.2f}x faster"
        )

    def as_dict(self) -> dict:
        """JSON-ready: every field, the summary's numbers included."""
        return {**asdict(self), "reused": self.reused, "computed": self.computed, "speedup": self.speedup}


class Stopwatch:
    """Times calls on the device they run on, without making the host wait for it."""

    def __init__(self, device: torch.device):
        self._cuda = device.type == "cuda"
        self._spans: list[tuple[Call, Callable[[], float]]] = []

    def start(self) -> Callable[[Call], None]:
        """Start a span; call the result with the call that it belongs to when that call has ended."""
        if not self._cuda:
            begun = time.perf_counter()

            def stop(call: Call) -> None:
                elapsed = 1000 * (time.perf_counter() - begun)
                self._spans.append((call, lambda: elapsed))

            return stop
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        first.record()

        def stop_cuda(call: Call) -> None:
            last.record()
            self._spans.append((call, lambda: first.elapsed_time(last)))

        return stop_cuda

    def read(self) -> None:
        """Write all spans into their calls. Waits for the device."""
        if self._cuda:
            torch.cuda.synchronize()
        for call, elapsed in self._spans:
            call.ms = elapsed()
        self._spans.clear()


_recent: deque[Run] = deque(maxlen=16)
_deliver: Callable[[str, dict], None] | None = None  # in a worker process: hands reports to ComfyUI's


def recent_runs() -> list[Run]:
    """The last runs in this process, oldest first."""
    return list(_recent)


def deliver_to(send: Callable[[str, dict], None]) -> None:
    """From now on hand everything that is reported to another process: send("run" or "show", data for receive())."""
    global _deliver
    _deliver = send


def receive(kind: str, data: dict) -> None:
    """Report what another process has delivered."""
    if kind == "run":
        publish(Run(**{**data, "calls": [Call(**call) for call in data["calls"]]}))
    else:
        show(data["node_id"], data["text"])


def publish(run: Run) -> None:
    """Keep a run that has ended, log it, and show it on its node where a ComfyUI server runs."""
    if _deliver is not None:
        return _deliver("run", asdict(run))
    _recent.append(run)
    ended = "" if run.finished else " (stopped early)"
    logger.info("Skein first-block cache: %s%s", run.summary(), ended)
    show(run.node_id, run.summary() + ended)


def show(node_id: str | None, text: str) -> None:
    """Show a line of status on a node, where a ComfyUI server runs."""
    if _deliver is not None:
        return _deliver("show", {"node_id": node_id, "text": text})
    server = sys.modules.get("server")  # present only inside ComfyUI's server process
    instance = getattr(getattr(server, "PromptServer", None), "instance", None)
    if instance is not None and node_id is not None:
        instance.send_progress_text(text, node_id)
