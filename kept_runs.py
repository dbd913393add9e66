"""Finished runs, kept over a restart of ComfyUI: a JSON file each, in a folder of its user directory that it serves to
nobody.

What is kept of a run is what the status shows of it (`as_dict`). Files are written by a thread of their own, each whole
or not at all; what is no run of this form is skipped when they are read.
"""

import json
import logging
import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import is_dataclass
from pathlib import Path
from types import NoneType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from .runs import Run
from .sparse_runs import SparseRun

logger = logging.getLogger("skein")

AnyRun = Run | SparseRun
Kind = TypeVar("Kind")
KINDS: dict[str, type[Run] | type[SparseRun]] = {"cache": Run, "sparse": SparseRun}
LARGEST = 16 * 2**20  # bytes of a file


class KeptRuns:
    """The runs in a folder, at most `most` of each kind."""

    def __init__(self, folder: Path, most: int):
        self._folder, self._most = folder, most
        self._writer = ThreadPoolExecutor(1, "skein-kept-runs")

    def read(self) -> list[AnyRun]:
        """All of them, oldest first."""
        runs = [run for path in self._folder.glob("*-*.json") if (run := _read(path)) is not None]
        return sorted(runs, key=lambda run: run.started)

    def keep(self, run: AnyRun) -> None:
        """Write a run, soon. It has ended: nobody changes it any more."""
        self._writer.submit(self._write, run)

    def wait(self) -> None:
        """Until all that is to be kept is written."""
        self._writer.submit(lambda: None).result()

    def _write(self, run: AnyRun) -> None:
        kind = next(name for name, each in KINDS.items() if isinstance(run, each))
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            path = self._folder / f"{kind}-{int(1000 * run.started):015d}-{run.id}.json"
            part = path.with_suffix(".part")
            part.write_text(json.dumps(run.as_dict()))
            os.replace(part, path)
            for old in sorted(self._folder.glob(f"{kind}-*.json"))[: -self._most]:  # by when they began
                old.unlink(missing_ok=True)
        except OSError as error:  # a full or a read-only disk: the run itself is well
            logger.warning("Skein: a run cannot be kept in %s (%s)", self._folder, error)


def _read(path: Path) -> AnyRun | None:
    try:
        if path.stat().st_size > LARGEST:
            return None
        kind: Callable[..., AnyRun] = KINDS[path.name.partition("-")[0]]
        run = _built(kind, json.loads(path.read_text()))
        return run if run.ended and run.calls else None
    except (OSError, ValueError, KeyError, RecursionError):
        return None


def _built(kind: Callable[..., Kind], data: Any) -> Kind:
    """A dataclass from JSON; what else is in it is left out. Raises ValueError for a value that is not of its field's
    type."""
    if not isinstance(data, dict):
        raise ValueError("no object")
    hints = get_type_hints(kind)
    try:
        return kind(**{name: _value(data[name], hint) for name, hint in hints.items() if name in data})
    except TypeError:
        raise ValueError("a field is missing") from None


def _value(value: Any, hint: Any) -> Any:
    if get_origin(hint) is list and isinstance(value, list):
        return [_value(each, get_args(hint)[0]) for each in value]
    if is_dataclass(hint):
        return _built(hint, value)  # type: ignore[arg-type]
    for option in get_args(hint) or (hint,):
        if option is float and type(value) is int:
            return float(value)
        if type(value) is option and option in (str, int, bool, float, NoneType):
            if option is float and not math.isfinite(value):
                break
            return value
    raise ValueError("a value of another type")
