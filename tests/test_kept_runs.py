"""Finished runs that are kept over a restart, and what a saved picture says of its run: a real folder, real servers."""

import json
import time

import pytest
from graphs import SAMPLER, seeded, with_sparse
from PIL import Image
from skein.demo.run import node_id
from skein.demo.server import ComfyServer, comfyui_path
from skein.kept_runs import KeptRuns
from skein.runs import Call, Run
from skein.sparse_runs import SparseCall, SparseLayer, SparseRun


def run_of(number):
    calls = [Call(0.5, None, 0.06, False, 10.0), Call(0.4, 0.01, 0.06, True, None, parts=[0, 1], step=1)]
    return Run(calls, "2", float(number), 1.5, True, steps=2, ended=True, workflow_id="w", latent=[1.0], version=7)


def sparse_of(number):
    calls, layers = [SparseCall(0, 1.0, 0.5, 0.01, 1, 1, 2.5)], [SparseLayer("blocks.0", [0.5, 0.25], [0.01, 0.02])]
    return SparseRun(0.1, "3", "flex", 4.0, 1, calls, layers, number + 0.5, ended=True)


def kept_in(folder, *runs, most=50):
    kept = KeptRuns(folder, most)
    for run in runs:
        kept.keep(run)
    kept.wait()
    return kept


def test_runs_are_read_as_they_were_but_for_their_latents(tmp_path):
    runs = [run_of(3), sparse_of(2), run_of(1)]
    read = kept_in(tmp_path / "new", *runs).read()
    assert [run.as_dict() for run in read] == [run.as_dict() for run in reversed(runs)]
    assert all(run.latent == [] for run in read)


def test_of_each_kind_the_last_are_kept(tmp_path):
    runs = [make(number) for number in range(5) for make in (run_of, sparse_of)]
    kept = kept_in(tmp_path, *runs, most=3)
    kept.keep(runs[-1])  # told again: in the place of the first
    kept.wait()
    assert [run.id for run in kept.read()] == [run.id for run in runs[-6:]]
    assert len(list(tmp_path.iterdir())) == 6


@pytest.mark.parametrize(
    "change",
    [
        {"calls": [{"sigma": "high", "change": None, "threshold": 0.1, "reused": False}]},
        {"calls": [{"sigma": 0.5}]},
        {"calls": {}},
        {"calls": []},
        {"started": None},
        {"started": float("nan")},
        {"steps": 1.5},
        {"finished": 1},
        {"ended": False},
    ],
    ids=str,
)
def test_what_is_no_run_is_skipped(tmp_path, change):
    kept = kept_in(tmp_path, run_of(1))
    [path] = tmp_path.iterdir()
    data = json.loads(path.read_text())
    (tmp_path / "cache-0000-changed.json").write_text(json.dumps({**data, **change}))
    (tmp_path / "cache-0000-more.json").write_text(json.dumps({**data, "id": "more", "later": 1}))
    for name, text in (("cache-1-cut.json", '{"calls": ['), ("other-1-x.json", "{}"), ("cache-1-list.json", "[]")):
        (tmp_path / name).write_text(text)
    (tmp_path / "cache-1-bytes.json").write_bytes(b"\xff\xfe")
    (tmp_path / "cache-1-deep.json").write_text("[" * 100_000)
    assert sorted(run.id for run in kept.read()) == sorted([data["id"], "more"])


def test_a_folder_that_cannot_be_written_costs_no_run(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    assert kept_in(tmp_path / "file", run_of(1)).read() == []
    assert "cannot be kept" in caplog.text


def test_a_server_shows_the_runs_of_the_one_before_and_pictures_hold_theirs(tmp_path, prompt):
    graph = with_sparse(seeded(prompt, 401), cached=True)
    images = next(node for node in graph.values() if node["class_type"] == "SaveAnimatedWEBP")["inputs"]["images"]
    graph["png"] = {"class_type": "SaveImage", "inputs": {"images": images, "filename_prefix": "kept"}}
    steps = graph[node_id(graph, SAMPLER)]["inputs"]["steps"]
    arguments = ("--user-directory", str(tmp_path))
    with ComfyServer(comfyui_path(), arguments) as server:
        asked = {"prompt": graph, "extra_data": {"extra_pnginfo": {"workflow": {"id": "w", "nodes": []}}}}
        number = server.post("/prompt", asked)["prompt_id"]
        while not (history := server.get(f"/history/{number}")):
            time.sleep(0.2)
        status = server.get("/skein/status")
        [name, *_] = [each["filename"] for each in history[number]["outputs"]["png"]["images"]]
        written = Image.open(server.base / "output" / name).info
    assert json.loads(written["workflow"]) == {"id": "w", "nodes": []}
    [sums] = json.loads(written["skein"])
    [run], [sparse] = status["runs"], status["sparse"]
    assert sums["techniques"] == ["cache", "sparse"] and sums["calls"] == steps == len(run["calls"])
    assert sums["cache"] == {"threshold": 0.06} | {name: run[name] for name in sums["cache"] if name != "threshold"}
    assert sums["cache"]["reused"] + sums["cache"]["computed"] == steps
    assert sums["sparse_attention"]["summary"] == sparse["summary"]
    with ComfyServer(comfyui_path(), arguments) as server:
        again = server.get("/skein/status")
        assert (again["runs"], again["sparse"]) == ([run], [sparse])
        assert server.get(f"/skein/runs/{sparse['id']}") == sparse
