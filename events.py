"""Live state: what goes on, to the browsers and programs on ComfyUI's websocket that have asked for it.

A message, `skein.state`, holds the state as it is then (live.py). What changes it only marks that; the message is made
on the server's loop, at most seven times a second for each listener, 200 times for all, and less often where it is
large. There are none while nobody listens: who wants them asks for them (`listen`), until its connection ends.

`version` counts the changes, over restarts of the server too. A message has everything that has changed since the one
before, `GET /skein/status` everything; a listener that reads the status once misses nothing, and leaves out what has a
lower version than what it knows.
"""

import threading
import time
from collections.abc import Callable, MutableMapping
from typing import Any
from weakref import WeakValueDictionary

from . import host

STATE = "skein.state"  # the type of the message
INTERVAL = 0.15  # seconds between two messages to a listener, at least
ALL_INTERVAL = 0.005  # for each listener: sending needs Python's lock, for which the sampling thread would wait
PAUSE = 150  # times as long as it took to make a message until the next one: to encode it takes three times that

lock = threading.RLock()  # holds the state and its version together; for live.py, which changes it
# Client id -> its connection when it asked. Weak: a client that has left is forgotten with its connection.
_listeners: MutableMapping[str, Any] = WeakValueDictionary()
_version = int(1000 * time.time())  # so that it is higher than before a restart
_told = _version  # what listeners know
_scheduled = False
_due = 0.0
_news: Callable[[int], dict] | None = None


def tell(news: Callable[[int], dict]) -> None:
    """From now on make messages so: JSON-ready, with what has changed since a version."""
    global _news
    _news = news


def changed(*runs: Any) -> None:
    """Something has changed, also these runs. From any thread; costs next to nothing where nobody listens."""
    global _version, _told, _scheduled
    with lock:
        _version += 1
        for run in runs:
            run.version = _version
        server = listened_to()
        if server is None or _news is None:
            _told = _version
        elif not _scheduled:
            _scheduled = True
            server.loop.call_soon_threadsafe(_send_when_due, server)


def version() -> int:
    """How many changes there have been."""
    return _version


def listen(client_id: str, wanted: bool) -> bool:
    """Send the state to a client of the websocket, or no more; whether it is connected. Runs on the server's loop."""
    server = host.server()
    connection = server.sockets.get(client_id) if server else None
    with lock:
        _listeners.pop(client_id, None)
        if connection is not None and wanted:
            _listeners[client_id] = connection
    return connection is not None


def listened_to() -> Any:
    """ComfyUI's server if somebody there listens."""
    return host.server() if _listeners else None


def _send_when_due(server: Any) -> None:
    """On the server's loop: now, or as soon as a message may be sent again."""
    server.loop.call_later(max(_due - time.monotonic(), 0.0), _send, server)


def _send(server: Any) -> None:
    global _scheduled, _told, _due
    started = time.monotonic()
    with lock:
        for client_id, connection in list(_listeners.items()):
            if server.sockets.get(client_id) is not connection:  # gone, or come back: it has to ask again
                del _listeners[client_id]
        clients = list(_listeners)
        message = _news(_told) if clients and _news else {}
        _scheduled, _told = False, _version
    for client_id in clients:
        server.send_sync(STATE, message, client_id)
    now = time.monotonic()
    _due = now + max(INTERVAL, ALL_INTERVAL * len(clients), PAUSE * (now - started))
