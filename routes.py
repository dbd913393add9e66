"""HTTP routes: what a browser shows, for browsers and for API users. A refusal is {"error": sentence}.

    GET  /skein/status          all of live.snapshot(): sampling, processes, runs, sparse
    GET  /skein/runs?limit=50   the last runs under the cache that have ended, oldest first: {"runs": [...]}
    GET  /skein/runs/<id>       one of them, or the one in progress, or one under sparse attention
    GET  /skein/runs/<id>.png   the picture of one
    POST /skein/listen          the state, as it changes, to a client of the websocket: {"client_id": its id,
                                "listen": true} -> {}
    POST /skein/release         ends the worker processes: {} -> {"released": whether there were any}

What changes something is a POST with a JSON body from the same origin, so that no other page can ask for it.
"""

import asyncio
import io
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from . import events, host, live
from .kept_runs import KeptRuns
from .map_picture import draw_map
from .picture import draw_run
from .report import recent_runs
from .runs import Run
from .sparse_runs import SparseRun

STATUS_ROUTE, RUNS_ROUTE, RELEASE_ROUTE, LISTEN_ROUTE = (
    "/skein/status",
    "/skein/runs",
    "/skein/release",
    "/skein/listen",
)
FOLDER = "skein"  # in ComfyUI's user directory, with __ before it: nothing in it is served
BODY_BYTES = 4096  # more than any request needs
TYPES = {str: "a string", bool: "true or false"}


class Refused(Exception):
    """A request that cannot be honoured: the HTTP status and a sentence."""

    def __init__(self, status: int, sentence: str):
        super().__init__(sentence)
        self.status = status


def register(release: Callable[[], bool], in_use: Callable[[], bool]) -> None:
    """Add the routes to ComfyUI's server, and the runs that were kept before it was started. Without a server (the pack
    used as a library) nothing happens.

    release: ends the workers; whether there were any. in_use: whether there are some that somebody works with.
    """
    instance = host.server()
    if instance is None:
        return
    import folder_paths
    from aiohttp import ClientError, web

    instance.add_on_prompt_handler(host.keep_metadata)
    kept = KeptRuns(Path(folder_paths.get_system_user_directory(FOLDER)), live.KEPT_RUNS)
    live.keep_runs(kept.read(), kept.keep)

    def answering(handle: Callable[[Any], Awaitable[Any]]) -> Callable[[Any], Awaitable[Any]]:
        async def answer(request: Any) -> Any:
            try:
                answer = await handle(request)
                return web.json_response(answer) if isinstance(answer, dict) else answer
            except Refused as refused:
                return web.json_response({"error": str(refused)}, status=refused.status)
            except (ConnectionError, ClientError):  # the client has hung up: nobody reads the answer
                return web.Response(status=400)

        return answer

    async def status(_request: Any) -> dict:
        return live.snapshot()

    async def runs(request: Any) -> dict:
        limit = _limit(request.query.get("limit"))
        return {"runs": [run.as_dict() for run in recent_runs()[-limit:]]}

    async def one_run(request: Any) -> dict:
        return _run_of(request.match_info["id"]).as_dict()

    async def picture(request: Any) -> Any:
        run = _run_of(request.match_info["id"])
        png = await asyncio.get_running_loop().run_in_executor(None, _png, run)
        return web.Response(body=png, content_type="image/png")

    async def listen(request: Any) -> dict:
        asked = await _asked(request, {"client_id": str, "listen": bool})
        if not events.listen(asked["client_id"], asked["listen"]):
            raise Refused(404, "No client of the websocket has this id; connect to /ws?clientId=... first.")
        return {}

    async def release_workers(request: Any) -> dict:
        await _asked(request, {})
        if in_use():
            raise Refused(409, "The workers are at work; interrupt the run first, or wait for its end.")
        return {"released": await asyncio.get_running_loop().run_in_executor(None, release)}

    instance.routes.get(STATUS_ROUTE)(answering(status))
    instance.routes.get(RUNS_ROUTE)(answering(runs))
    instance.routes.get(RUNS_ROUTE + "/{id}.png")(answering(picture))
    instance.routes.get(RUNS_ROUTE + "/{id}")(answering(one_run))
    instance.routes.post(LISTEN_ROUTE)(answering(listen))
    instance.routes.post(RELEASE_ROUTE)(answering(release_workers))


def _run_of(wanted: str) -> Run | SparseRun:
    runs: list[Run | SparseRun] = [*live.runs(), *live.sparse_runs()]
    for run in runs:
        if run.id == wanted:
            return run
    raise Refused(404, f"There is no run of this id among the last {live.KEPT_RUNS}; {RUNS_ROUTE} lists them.")


def _png(run: Run | SparseRun) -> bytes:
    if not run.calls:
        raise Refused(409, "The run has no model calls yet; ask again when it has some.")
    file = io.BytesIO()
    (draw_run(run) if isinstance(run, Run) else draw_map(run)).save(file, "PNG")
    return file.getvalue()


def _limit(text: str | None) -> int:
    if text is None:
        return live.KEPT_RUNS
    if not (text.isascii() and text.isdigit() and len(text) < 4 and 1 <= int(text) <= live.KEPT_RUNS):
        raise Refused(400, f"limit must be a whole number from 1 to {live.KEPT_RUNS}.")
    return int(text)


def _require_same_origin(headers: Any) -> None:
    """Raises Refused if a browser says that the request comes from another origin's page. Programs say nothing."""
    site = headers.get("Sec-Fetch-Site")  # where the browser sends it, proxies do not matter
    origin = headers.get("Origin")
    same = (
        site in ("same-origin", "none") if site else origin is None or _host(origin) == headers.get("Host", "").lower()
    )
    if not same:
        raise Refused(403, "Only ComfyUI's own page may ask for this; open it there.")


def _host(origin: str) -> str | None:
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return None


async def _asked(request: Any, fields: dict[str, type]) -> dict:
    """The JSON object of a request that changes something. Raises Refused unless it comes from the same origin and has
    just these fields. Its content type is one that a form of another page cannot send."""
    _require_same_origin(request.headers)
    form = "{" + ", ".join(f'"{name}": {TYPES[kind]}' for name, kind in fields.items()) + "}"
    if request.content_type != "application/json":
        raise Refused(415, f'Send the JSON object {form} with "Content-Type: application/json".')
    body = b""
    while part := await request.content.read(BODY_BYTES + 1 - len(body)):
        body += part
        if len(body) > BODY_BYTES:
            raise Refused(413, f"The body is too large; send the JSON object {form}.")
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        raise Refused(400, f"The body is no JSON; send the object {form}.") from None
    if not isinstance(value, dict) or {name: type(each) for name, each in value.items()} != fields:
        raise Refused(400, f"The body must be the JSON object {form}, with nothing else in it.")
    return value
