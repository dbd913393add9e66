"""What goes on beside model calls, and is waited for: workers that start, a model that loads, blocks that compile."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

TEXT_LENGTH = 200
Progress = Callable[..., None]  # (part, text=None): how much is done, 0 to 1 or None; what goes on now


class Activities:
    """Those of this process, of which the innermost is shown, and before them what its workers tell of.

    One is {"text", "part" (of it done; None: unknown), "since" (seconds since the epoch)}. changed: told what is shown,
    or None, after each change.
    """

    def __init__(self, changed: Callable[[dict | None], None]):
        self.changed = changed
        self._own: list[dict] = []  # the innermost last
        self._workers: dict | None = None

    @property
    def shown(self) -> dict | None:
        shown = self._workers or (self._own[-1] if self._own else None)
        return None if shown is None else dict(shown)

    @contextmanager
    def within(self, text: str) -> Iterator[Progress]:
        """Within: this goes on."""
        own = {"text": text[:TEXT_LENGTH], "part": None, "since": time.time()}

        def progress(part: float | None, text: str | None = None) -> None:
            own.update(part=part, text=own["text"] if text is None else text[:TEXT_LENGTH])
            self.changed(self.shown)

        self._own.append(own)
        self.changed(self.shown)
        try:
            yield progress
        finally:
            self._own[:] = [each for each in self._own if each is not own]
            self.changed(self.shown)

    def in_workers(self, told: dict | None) -> None:
        """What the workers tell of, or that it is over."""
        self._workers = told
        self.changed(self.shown)
