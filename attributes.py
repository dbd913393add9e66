"""Other objects' attributes, changed for a while and put back exactly."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

MISSING = object()


@contextmanager
def changed(changes: Iterable[tuple[Any, str, Any]]) -> Iterator[None]:
    """Within: each (object, name, value) holds, on the object itself and not on its class."""
    kept: list[tuple[dict, str, Any]] = []
    try:
        for owner, name, value in changes:
            kept.append((vars(owner), name, vars(owner).get(name, MISSING)))
            vars(owner)[name] = value
        yield
    finally:
        for attributes, name, value in reversed(kept):
            if value is MISSING:
                del attributes[name]
            else:
                attributes[name] = value
