"""Live events: what happens in a run, to the browsers and programs on ComfyUI's websocket that have asked for them.

One message, `skein.events`, holds what has happened since the last one, oldest first:

    {"type": "skein.events", "data": {"events": [{"seq": 41, "kind": "call", ...}, ...]}}

There are at most ten of them a second to each listener and 200 to all, and none while nobody listens: who wants them
asks for them (`listen`), for as long as its connection lasts. `seq` counts all events of this process: who finds a
number missing, or comes late, reads `GET /skein/status`, which says up to which number it holds.
"""

import threading
import time
from collections.abc import MutableMapping
from typing import Any
from weakref import WeakValueDictionary

from . import host

EVENTS = "skein.events"  # the type of the message
INTERVAL = 0.1  # seconds between two messages to a listener, at least
ALL_INTERVAL = 0.005  # for each listener: sending needs Python's lock, for which the sampling thread would wait
MOST = 256  # events in a message; where more wait the oldest go, and the gap in `seq` says so

lock = threading.RLock()  # holds what is told and `seq` together; for live.py, which changes what is told
# Client id -> its connection when it asked. Weak: a client that has left is forgotten with its connection.
_listeners: MutableMapping[str, Any] = WeakValueDictionary()
_pending: list[dict] = []
_seq = 0
_scheduled = False
_sent = 0.0


def emit(kind: str, **data: Any) -> None:
    """Tell of something, from any thread; data: small and JSON-ready. Costs next to nothing where nobody listens."""
    global _seq, _scheduled
    with lock:
        _seq += 1
        server = listened_to()
        if server is None:
            _pending.clear()
            return
        _pending.append({"seq": _seq, "kind": kind, **data})
        del _pending[:-MOST]
        if not _scheduled:
            _scheduled = True
            server.loop.call_soon_threadsafe(_flush_when_due, server)


def last_seq() -> int:
    """The number of the last event."""
    return _seq


def listen(client_id: str, wanted: bool) -> bool:
    """Send events to a client of the websocket, or no more; whether it is connected. Runs on the server's loop."""
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


def _flush_when_due(server: Any) -> None:
    """On the server's loop: now, or as soon as a message may be sent again."""
    interval = max(INTERVAL, ALL_INTERVAL * len(_listeners))
    server.loop.call_later(max(_sent + interval - time.monotonic(), 0.0), _flush, server)


def _flush(server: Any) -> None:
    global _scheduled, _sent
    with lock:
        events = list(_pending)
        _pending.clear()
        _scheduled = False
        _sent = time.monotonic()
        for client_id, connection in list(_listeners.items()):
            if server.sockets.get(client_id) is not connection:  # gone, or come back: it has to ask again
                del _listeners[client_id]
        clients = list(_listeners)
    for client_id in clients if events else ():
        server.send_sync(EVENTS, {"events": events}, client_id)
