"""Live state and routes of a real server, as a program without a browser meets them."""

import asyncio
import gc
import http.client
import io
import json
import socket
import threading
import time
import types
import urllib.request
from contextlib import contextmanager

import pytest
import torch
import websocket
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer
from graphs import SAMPLER, seeded, with_sparse
from PIL import Image
from skein import events, host, live, report
from skein.demo.run import node_id
from skein.report import add
from skein.runs import Call, Run
from skein.sparse_runs import SparseCall, SparseLayer, SparseRun


@contextmanager
def listening(server):
    """Within: the messages of Skein that a program on the websocket gets, with when they came."""
    arrived, ended, since = [], threading.Event(), time.time()
    channel = websocket.create_connection(f"ws://127.0.0.1:{server.port}/ws?clientId=listener", timeout=120)
    assert server.post("/skein/listen", {"client_id": "listener", "listen": True}) == {}

    def listen():
        while not ended.is_set():
            message = channel.recv()
            event = json.loads(message) if isinstance(message, str) else {"type": "binary"}
            if event["type"] != "skein.state":
                continue
            arrived.append((time.monotonic(), event["data"]))
            sampling = event["data"]["sampling"]
            if sampling["ended"] is not None and sampling["started"] > since:
                ended.set()

    threading.Thread(target=listen, daemon=True).start()
    yield arrived
    assert ended.wait(60)
    channel.close()


def test_a_run_as_messages(server, prompt):
    """Each holds the state, with the run whole; seven a second at most; the last is what the routes say."""
    start = server.get("/skein/status")
    with listening(server) as arrived:
        server.run(seeded(prompt, 301))
    status = server.get("/skein/status")
    messages = [data for _, data in arrived]
    versions = [message["version"] for message in messages]
    assert versions == sorted(set(versions)) and start["version"] < versions[0] and versions[-1] <= status["version"]
    assert all(len(json.dumps(message)) < 8_000 for message in messages)
    times = [when for when, _ in arrived]
    assert all(later - earlier > 0.9 for earlier, later in zip(times, times[7:]))

    run = status["runs"][-1]
    told = [each for message in messages for each in message["runs"]]
    assert {each["id"] for each in told} == {run["id"]}  # no run but the one that changes
    counts = [len(each["calls"]) for each in told]
    assert counts == sorted(counts) and told[-1] == run and len(run["calls"]) == 6
    sampling = messages[0]["sampling"]
    assert sampling["running"] and sampling["techniques"] == ["cache"] and sampling["ended"] is None
    assert messages[-1]["processes"][0]["state"] == "ready" and messages[-1]["sampling"]["calls"] == 6
    assert messages[-1]["sampling"] == status["sampling"] and not status["sampling"]["running"]
    assert sampling["started"] < status["sampling"]["ended"] < status["time"]


def test_a_run_under_sparse_attention_as_messages(server, prompt):
    """Its layers, which are many, come when it has ended."""
    with listening(server) as arrived:
        server.run(with_sparse(seeded(prompt, 311), cached=True))
    status = server.get("/skein/status")
    told = [run for _, data in arrived for run in data["sparse"]]
    counts = [len(each["calls"]) for each in told]
    assert counts == sorted(counts) and counts[0] < 6 == counts[-1]
    assert all(each["layers"] == [] and not each["ended"] for each in told[:-1])
    run = status["sparse"][-1]
    assert told[-1] == run and run["ended"] and len(run["layers"]) == 6
    assert run["prompt_id"] == status["runs"][-1]["prompt_id"] is not None
    assert all(len(json.dumps(each)) < 6000 for each in told)


class Loop:
    """A server's loop that calls at once what it is given."""

    def __init__(self):
        self.delays = []

    def call_soon_threadsafe(self, function, *arguments):
        function(*arguments)

    def call_later(self, delay, function, *arguments):
        self.delays.append(delay)
        function(*arguments)


class Connection:
    """Of a listener."""


@pytest.fixture
def told(monkeypatch):
    """The messages to a listener, each sent at once; no runs kept before."""
    connection, messages = Connection(), []
    comfyui = types.SimpleNamespace(
        sockets={"one": connection},
        loop=Loop(),
        prompt_queue=types.SimpleNamespace(get_current_queue_volatile=lambda: ([], [])),
        send_sync=lambda kind, message, client: messages.append(json.loads(json.dumps(message))),
    )
    monkeypatch.setattr(host, "server", lambda: comfyui)
    live._runs.clear()
    live._sparse_runs.clear()
    assert events.listen("one", True)
    yield messages
    events.listen("one", False)
    live._runs.clear()
    live._sparse_runs.clear()


def test_the_last_runs_under_sparse_attention_are_kept(told):
    runs = [SparseRun() for _ in range(live.KEPT_RUNS + 3)]
    for run in runs:
        live.sparse_called(run)
    assert [run["id"] for run in live.snapshot()["sparse"]] == [run.id for run in runs[3:]]
    # As a worker tells of it again, whole: in the place of what was known, and with what only this process knows.
    live._sparse_runs[-1].prompt_id, live._sparse_runs[-1].latent = "prompt", [1.0]
    layers, calls = [SparseLayer("blocks.0", [0.5], [0.01])], [SparseCall(0, 1.0, 0.5, 0.01, 1, 1)]
    again = SparseRun(id=runs[-1].id, layers=layers, calls=calls)
    live.sparse_called(again)
    assert live.sparse_runs()[-1] is again and again.latent == [1.0]
    [news] = told[-1]["sparse"]
    assert [len(news[name]) for name in ("calls", "layers")] == [1, 0] and news["prompt_id"] == "prompt"
    again.ended = True
    live.sparse_called(again)
    [news] = told[-1]["sparse"]
    assert news == live.snapshot()["sparse"][-1] and len(news["layers"]) == 1
    assert "latent" not in news and len(live.sparse_runs()) == live.KEPT_RUNS


def test_a_sparse_run_whose_worker_is_gone_has_ended(told):
    run = SparseRun()
    with live.sampling(["sparse"], torch.device("cpu")):
        live.sparse_called(run)
        assert live.current_sparse_run() is run
    assert run.ended and live.current_sparse_run() is None
    news = [each for message in told for each in message["sparse"]]
    assert news[-1]["id"] == run.id and news[-1]["ended"]


def test_a_latent_is_of_the_sparse_run_in_progress(told):
    """Sparse attention that stands back has no run: an older one must not get the latent."""
    run = SparseRun()
    with live.sampling(["sparse"], torch.device("cpu")):
        live.sparse_called(run)
        live.sampled([1.0, 2.0])
        run.ended = True
        live.sparse_called(run)
    with live.sampling(["sparse"], torch.device("cpu")):
        live.sampled([3.0, 4.0])
    assert run.latent == [1.0, 2.0]


def test_what_goes_on_beside_model_calls(told):
    """The inner activity shows, then the outer one again, also after an exception; a worker's before
    what waits for it."""

    def shown():
        activity = told[-1]["sampling"]["activity"]
        return activity and (activity["text"], activity["part"])

    with live.activity("Loading the model") as progress:
        assert shown() == ("Loading the model", None)
        with live.sampling(["fp8"], torch.device("cpu")), pytest.raises(ValueError):
            progress(0.5)
            with live.activity("Quantizing to FP8") as inner:
                inner(0.25, "Quantizing to FP8, layer 3")
                assert shown() == ("Quantizing to FP8, layer 3", 0.25)
                raise ValueError
        assert shown() == ("Loading the model", 0.5)
        report.receive("activity", {"shown": {"text": "Compiling", "part": None, "since": 1.0}})
        assert shown() == ("Compiling", None)
        report.receive("activity", {"shown": None})
        assert shown() == ("Loading the model", 0.5)
    assert shown() is None


def test_the_end_is_expected_by_what_is_known_of_the_steps(told, monkeypatch):
    """First from what was said before, then from all steps but the first, which loads and compiles."""
    clock = types.SimpleNamespace(now=1000.0)
    monkeypatch.setattr(
        live,
        "time",
        types.SimpleNamespace(
            time=lambda: clock.now, **{name: getattr(time, name) for name in ("monotonic", "perf_counter")}
        ),
    )
    ends = []
    with live.sampling(["cache"], torch.device("cpu")):
        live.expect(60.0, "measured", 2e10, 10)
        for step, (now, left) in enumerate(((1010.0, None), (1040.0, None), (1042.0, 16.0), (1046.0, 21.0))):
            clock.now = now
            live.at_step(step, 10, left)
            ends.append(told[-1]["sampling"]["expected_end"])
    assert ends == [1060.0, 1060.0, 1058.0, 1067.0]
    sampling = told[-1]["sampling"]
    assert (sampling["expected_s"], sampling["expected_from"], sampling["expected_bytes"]) == (60.0, "measured", 2e10)
    assert (sampling["step"], sampling["steps"], sampling["ended"]) == (3, 10, 1046.0)


def test_a_long_run_is_told_of_less_often(told):
    """A message holds the run whole: the longer it takes to make, the longer until the next."""
    run = Run(steps=1000)
    live.begun(run)
    call = Call(0.123456789, 0.0123456789, 0.06, True, 12.3456789)
    started = time.perf_counter()
    for _ in range(1000):
        add(run, call, [])
    seconds = (time.perf_counter() - started) / 1000
    delays = host.server().loop.delays
    assert len(told) == 1001 and len(told[-1]["runs"][0]["calls"]) == 1000
    assert len(json.dumps(told[-1])) < 200_000 and delays[-1] > 0.9 * events.INTERVAL
    assert seconds < 0.02  # each made a message here, half of them of 500 calls and more


def test_nothing_is_sent_unasked(server, prompt):
    """Who has not asked, has asked no more, or has come back on a new connection gets nothing: it reads the status."""
    address, ask = f"ws://127.0.0.1:{server.port}/ws?clientId=silent", {"client_id": "silent", "listen": True}
    channel = websocket.create_connection(address, timeout=120)
    server.post("/skein/listen", ask)
    channel.close()
    time.sleep(1)  # ComfyUI takes the client off its list when it sees that
    channel = websocket.create_connection(address, timeout=120)
    before = server.get("/skein/status")["version"]
    server.run(seeded(prompt, 302))
    server.post("/skein/listen", ask)
    server.post("/skein/listen", {**ask, "listen": False})
    server.run(seeded(prompt, 303))
    after = server.get("/skein/status")
    assert after["version"] > before + 12 and after["runs"][-1]["ended"]
    channel.settimeout(1)
    with pytest.raises(websocket.WebSocketTimeoutException):
        while True:
            assert "skein.state" not in str(channel.recv())
    channel.close()


def test_many_listeners_share_the_messages_of_a_few(server, prompt):
    """What sending takes of the server's process does not grow with the listeners; each sees the end. They only read
    when the run is over, so that they take nothing of the machine meanwhile."""
    graph = seeded(prompt, 306)
    graph[node_id(graph, SAMPLER)]["inputs"]["steps"] = 24
    channels = [
        websocket.create_connection(f"ws://127.0.0.1:{server.port}/ws?clientId=many{i}", timeout=120)
        for i in range(400)
    ]
    for i in range(len(channels)):
        server.post("/skein/listen", {"client_id": f"many{i}", "listen": True})
    started = time.monotonic()
    server.run(graph)
    received = [received_until_the_end(channels[0])]  # the last is due up to 2 s after the run
    seconds = time.monotonic() - started
    received += [received_until_the_end(channel) for channel in channels[1:]]
    for channel in channels:
        channel.close()
    for messages in received:
        assert len(messages) <= 1 + seconds / 2, f"{len(messages)} messages to each in {seconds:.1f} s"
        assert len(messages) > 1 and messages == received[0]
        assert [len(run["calls"]) for run in messages[-1]["runs"]] == [24] and messages[-1]["runs"][0]["ended"]


def received_until_the_end(channel):
    """The states until the one in which sampling has ended."""
    messages = []
    while not messages or messages[-1]["sampling"]["running"]:
        message = channel.recv()
        event = json.loads(message) if isinstance(message, str) else {"type": "binary"}
        if event["type"] == "skein.state":
            messages.append(event["data"])
    return messages


def test_status_lines_go_to_the_page_that_has_asked_for_the_run(server, prompt):
    """Another may have another graph open, with another node of the same id."""
    channel = websocket.create_connection(f"ws://127.0.0.1:{server.port}/ws?clientId=other", timeout=120)
    server.run(seeded(prompt, 305))
    channel.settimeout(1)
    with pytest.raises(websocket.WebSocketTimeoutException):
        while True:
            assert b"model calls" not in channel.recv_data()[1]
    channel.close()


def test_telling_costs_microseconds():
    """What a model call pays for being told of, without a server: the same work up to the look for a listener."""
    run = Run()
    live.begun(run)
    call = Call(0.5, 0.01, 0.06, True, 1.0)
    started = time.perf_counter()
    for _ in range(1000):
        live.step(None, lambda _call: None)
        add(Run(), call, [call])
    assert (time.perf_counter() - started) / 1000 < 1e-3
    run.ended = True


def test_calls_on_two_threads_get_an_index_each(monkeypatch):
    """As ComfyUI's multi-GPU clones call: the second call ends while the first is being told of."""
    told = []
    monkeypatch.setattr(report, "_deliver", lambda kind, data: told.append(len(run.calls) - 1))
    run, first_waits, second_ends = Run(), threading.Event(), threading.Event()

    def no_times():
        first_waits.set()
        second_ends.wait(0.5)
        yield from ()

    first = threading.Thread(target=lambda: add(run, Call(0.5, 0.01, 0.06, True), no_times()))
    first.start()
    first_waits.wait(10)
    second = threading.Thread(target=lambda: (add(run, Call(0.5, 0.01, 0.06, False)), second_ends.set()))
    second.start()
    first.join(10)
    second.join(10)
    assert sorted(told) == [0, 1]


@pytest.mark.parametrize(
    ("computed", "reused", "speedup"),
    [
        ([10.0, 10.0, None], [2.0, None], 5 * 10 / (3 * 10 + 2 * 2)),  # a time that is not known is as the others
        ([1000.0, 10.0, 10.0, 11.0], [], 1.0),  # the first call compiles
        ([1000.0, 10.0, 10.0, 11.0], [2.0, 2.0], 6 * 10 / (4 * 10 + 2 * 2)),
        ([1000.0, 10.0], [2.0], 3 * 10 / (2 * 10 + 2)),
        ([10.0, 10.0], [12.0], 1.0),  # never "faster" by less than 1
        ([None], [None], 1.0),
        ([], [], 1.0),
    ],
)
def test_the_speedup_is_of_typical_calls(computed, reused, speedup):
    run = Run(calls=[Call(0.5, 0.01, 0.06, each is reused, ms) for each in (computed, reused) for ms in each])
    assert run.speedup == pytest.approx(speedup)
    assert run.summary().endswith(f"about {speedup:.2f}x as fast")


def answer(server, method, path, body=None, headers=None):
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    connection.request(method, path, body, headers or {})
    response = connection.getresponse()
    text = response.read()
    connection.close()
    return response.status, json.loads(text) if text.startswith(b"{") else text.decode()


JSON = {"Content-Type": "application/json"}


@pytest.mark.parametrize(
    ("method", "path", "body", "headers", "status", "sentence"),
    [
        ("GET", "/skein/runs/nonesuch", None, {}, 404, "There is no run of this id"),
        ("GET", "/skein/runs/%00%ff", None, {}, 404, "There is no run of this id"),
        ("GET", "/skein/runs?limit=0", None, {}, 400, "from 1 to 50"),
        ("GET", "/skein/runs?limit=-1", None, {}, 400, "from 1 to 50"),
        ("GET", f"/skein/runs?limit={'9' * 5000}", None, {}, 400, "from 1 to 50"),
        ("GET", "/skein/runs?limit=1e3", None, {}, 400, "from 1 to 50"),
        ("GET", "/skein/runs?limit=%D9%A3", None, {}, 400, "from 1 to 50"),  # a digit of another script
        ("POST", "/skein/listen", "{}", JSON, 400, '"client_id": a string, "listen": true or false'),
        ("POST", "/skein/listen", '{"client_id": "nonesuch", "listen": true}', JSON, 404, "connect to /ws"),
        ("POST", "/skein/listen", '{"client_id": 1, "listen": true}', JSON, 400, "nothing else in it"),
        ("POST", "/skein/listen", '{"client_id": "a", "listen": 1}', JSON, 400, "nothing else in it"),
        ("POST", "/skein/release", "{}", {}, 415, "Content-Type"),
        ("POST", "/skein/release", "{}", {"Content-Type": "text/plain"}, 415, "Content-Type"),
        ("POST", "/skein/release", "not json", JSON, 400, "no JSON"),
        ("POST", "/skein/release", "[" * 4000, JSON, 400, "no JSON"),
        ("POST", "/skein/release", "[]", JSON, 400, "nothing else in it"),
        ("POST", "/skein/release", "0", JSON, 400, "nothing else in it"),
        ("POST", "/skein/release", '{"rank": 1e999}', JSON, 400, "nothing else in it"),
        ("POST", "/skein/release", '{"a": "' + "x" * 10_000 + '"}', JSON, 413, "too large"),
        ("POST", "/skein/release", "{}", {**JSON, "Sec-Fetch-Site": "same-site"}, 403, "ComfyUI's own page"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else None,
)
def test_bad_requests_get_a_sentence(server, method, path, body, headers, status, sentence):
    got, said = answer(server, method, path, body, headers)
    assert got == status and sentence in said["error"]
    assert server.alive()


@pytest.mark.parametrize("path", ["/skein/release", "/skein/listen"])
def test_a_client_that_hangs_up_in_its_body_leaves_no_traceback(server, path):
    before = len(server.log.read_text(errors="replace"))
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port)) as caller:
        caller.sendall(head.encode() + b'{"client_id"')
        time.sleep(0.5)
    time.sleep(0.5)
    assert answer(server, "GET", "/skein/runs")[0] == 200
    assert "Traceback" not in server.log.read_text(errors="replace")[before:]


def test_clients_that_have_left_are_forgotten_without_an_event(monkeypatch):
    """With websockets as ComfyUI keeps them: `sockets` is all that holds a connection."""
    comfyui = types.SimpleNamespace(sockets={})
    monkeypatch.setattr(host, "server", lambda: comfyui)

    async def serve(request):
        connection = comfyui.sockets[request.query["clientId"]] = web.WebSocketResponse()
        await connection.prepare(request)
        assert events.listen(request.query["clientId"], True)
        async for _ in connection:
            pass
        del comfyui.sockets[request.query["clientId"]]
        return connection

    async def come_and_leave():
        app = web.Application()
        app.router.add_get("/ws", serve)
        async with TestClient(TestServer(app)) as client:
            for i in range(20):
                connection = await client.ws_connect(f"/ws?clientId={i}")
                while events.listened_to() is None:
                    await asyncio.sleep(0.01)
                await connection.close()

    asyncio.run(come_and_leave())
    gc.collect()
    assert len(events._listeners) == 0 and events.listened_to() is None


@pytest.mark.parametrize("origin", ["https://elsewhere.example", "http://127.0.0.1:1", "null"])
@pytest.mark.parametrize("path", ["/skein/release", "/api/skein/release"])
def test_another_origin_cannot_release(server, path, origin):
    """Whether ComfyUI refuses it, which has no sentence, or the route does."""
    assert answer(server, "POST", path, "{}", {**JSON, "Origin": origin})[0] == 403
    assert answer(server, "POST", path, "{}", {**JSON, "Origin": origin, "Sec-Fetch-Site": "cross-site"})[0] == 403


def test_getting_changes_nothing(server):
    assert 400 <= answer(server, "GET", "/skein/release")[0] < 500


def test_release_and_status_without_workers(server):
    own = {**JSON, "Origin": f"http://127.0.0.1:{server.port}"}
    for headers in (JSON, own, {**own, "Sec-Fetch-Site": "same-origin"}):
        assert answer(server, "POST", "/skein/release", "{}", headers)[0] == 200
    runs = server.get("/skein/runs")["runs"]
    assert server.get("/skein/runs?limit=1")["runs"] == runs[-1:]
    if runs:
        assert server.get(f"/skein/runs/{runs[-1]['id']}") == runs[-1]


def test_status_in_the_middle_of_a_run_and_after_an_interrupt(server, prompt):
    graph = seeded(prompt, 304)
    graph[node_id(graph, SAMPLER)]["inputs"]["steps"] = 200
    server.submit(graph)
    deadline = time.monotonic() + 120
    while not (
        (status := server.get("/skein/status"))["runs"]
        and status["runs"][-1]["calls"]
        and not status["runs"][-1]["ended"]  # the one before, until this one begins
        and status["sampling"]["running"]
    ):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    run = status["runs"][-1]
    assert not run["ended"] and run["steps"] == 200
    assert run["id"] not in [each["id"] for each in server.get("/skein/runs")["runs"]]  # those have ended
    threading.Thread(target=server.interrupt).start()
    while (status := server.get("/skein/status"))["sampling"]["running"]:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert status["runs"][-1]["ended"] and status["runs"][-1]["error"] == status["sampling"]["error"] == "interrupted"


def test_the_pictures_of_runs(server, prompt):
    server.run(with_sparse(seeded(prompt, 312), cached=True))
    status = server.get("/skein/status")
    for kind in ("runs", "sparse"):
        address = f"http://127.0.0.1:{server.port}/skein/runs/{status[kind][-1]['id']}.png"
        with urllib.request.urlopen(address, timeout=60) as response:
            assert response.headers["Content-Type"] == "image/png"
            assert Image.open(io.BytesIO(response.read())).size == (960, 480)
    assert answer(server, "GET", "/skein/runs/nonesuch.png")[0] == 404
