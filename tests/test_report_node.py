"""The Cache Report node and its picture: what is drawn is what the run was."""

import json
import time

import numpy as np
import pytest
import torch
from comfy.latent_formats import HunyuanVideo
from graphs import CACHE, SAMPLER, seeded, with_sparse
from PIL import Image, ImageColor
from skein.demo.run import in_workers, node_id
from skein.demo.server import ComfyServer, PromptError, comfyui_path
from skein.map_picture import colour_of, draw_map
from skein.picture import COMPUTED, REUSED, THRESHOLD, draw_run
from skein.preview import latent_to_frames
from skein.runs import Call, Run
from skein.sparse_runs import SparseCall, SparseLayer, SparseRun


def pixels(image, colour):
    """Where an image has a colour, as rows and columns."""
    array = np.asarray(image.convert("RGB")).astype(int)
    return np.argwhere(np.abs(array - ImageColor.getrgb(colour)).max(axis=2) < 12)


def run_of(changes, threshold=0.06):
    return Run([Call(1 - i / 10, c, threshold, c is not None and c < threshold, 10.0) for i, c in enumerate(changes)])


def columns(found, width):
    """How many separate marks stand side by side below the legend."""
    below = found[found[:, 0] > 0.2 * width / 2]
    taken = np.unique(below[:, 1])
    return 0 if not len(taken) else 1 + int((np.diff(taken) > 3).sum())


def test_every_call_is_drawn_in_its_colour_and_place():
    image = draw_run(run_of([None, 0.2, 0.02, 0.1, 0.03, 0.04]), 960, 480)
    reused, computed, line = (pixels(image, colour) for colour in (REUSED, COMPUTED, THRESHOLD))
    assert columns(reused, 960) == 3 and columns(computed, 960) == 3  # the first is a ring on the axis
    height = np.median(line[line[:, 0] > 96][:, 0])
    assert reused[reused[:, 0] > 96][:, 0].min() > height  # reused: below the threshold
    drawn = computed[(computed[:, 0] > 96) & (computed[:, 1] > 200)]
    assert drawn[:, 0].max() < height
    assert image.size == (960, 480)


def test_thresholds_of_a_share_are_a_line_of_their_own():
    run = run_of([None, 0.01, 0.3, 0.02])
    run.share = 0.5
    for call, threshold in zip(run.calls, (0.05, 0.06, 0.2, 1.0), strict=True):
        call.threshold = threshold
    line = pixels(draw_run(run, 960, 480), THRESHOLD)
    curve = line[(line[:, 0] > 96) & (line[:, 1] > 200)]
    assert np.ptp(curve[:, 0]) > 100  # it climbs


@pytest.mark.parametrize("size", [(256, 192), (4096, 192), (256, 4096)])
@pytest.mark.parametrize("changes", [[None], [None, None], [None, 0.0, 0.5], [None, *[0.06] * 1000]], ids=len)
def test_odd_runs_and_sizes_are_drawn(changes, size):
    assert draw_run(run_of(changes), *size).size == size
    assert draw_run(run_of(changes, threshold=1.0), *size).size == size


def test_a_run_without_calls_is_refused():
    with pytest.raises(ValueError, match="no model calls"):
        draw_run(Run())


@pytest.mark.parametrize("size", [0, 1, -1, 2**62])
def test_a_size_that_is_no_picture_gets_a_sentence(size):
    with pytest.raises(ValueError, match=f"width must be 256 to 4096 pixels, not {size}"):
        draw_run(run_of([None, 0.1]), size, 480)
    with pytest.raises(ValueError, match=f"height must be 192 to 4096 pixels, not {size}"):
        draw_run(run_of([None, 0.1]), 960, size)
    with pytest.raises(ValueError, match=f"width must be 256 to 4096 pixels, not {size}"):
        draw_map(sparse_run_of([[0.5]]), size, 480)


def sparse_run_of(densities):
    """A run with these densities, a row a layer."""
    layers = [SparseLayer(f"blocks.{i}", list(row), [0.01] * len(row)) for i, row in enumerate(densities)]
    return SparseRun(layers=layers, calls=[SparseCall(0, 1.0, 0.5, 0.01, len(layers), len(layers), 1.0)])


def cells(image, densities):
    """Of each cell of a map: how much of the picture has its colour, and its middle (row, column)."""
    found = [pixels(image, "#{:02x}{:02x}{:02x}".format(*colour_of(d))) for row in densities for d in row]
    below = [each[each[:, 0] > 0.22 * image.height] for each in found]  # the legend has these colours too
    return [(len(each), *each.mean(axis=0)) for each in below]


def test_the_map_has_a_row_for_each_layer_and_a_column_for_each_head():
    densities = [[0.0, 0.2, 0.4], [0.6, 0.8, 1.0]]
    image = draw_map(sparse_run_of(densities), 960, 480)
    drawn = cells(image, densities)
    sizes, rows, columns = (np.array(each).reshape(2, 3) for each in zip(*drawn))
    assert sizes.min() > 0.9 * sizes.max() > 10_000
    assert np.ptp(rows, axis=1).max() < 2 and (rows[1] - rows[0]).min() > 100  # layers from above to below
    assert np.ptp(columns, axis=0).max() < 2 and np.diff(columns, axis=1).min() > 100
    assert image.size == (960, 480)


def test_the_less_is_computed_the_darker():
    brightness = [sum(colour_of(density / 10)) for density in range(11)]
    assert brightness == sorted(set(brightness)) and brightness[-1] > 4 * brightness[0]


@pytest.mark.parametrize("size", [(256, 192), (4096, 192), (256, 4096)])
@pytest.mark.parametrize("densities", [[], [[1.0]], [[0.3] * 40] * 60, [[0.1, 0.2], [0.3]]], ids=len)
def test_odd_maps_and_sizes_are_drawn(densities, size):
    assert draw_map(sparse_run_of(densities), *size).size == size


@pytest.mark.parametrize("scale", [0, -1, 17, 10**6])
def test_a_scale_that_is_no_preview_gets_a_sentence(scale):
    with pytest.raises(ValueError, match=f"scale must be 1 to 16, not {scale}"):
        latent_to_frames(torch.zeros(1, 16, 1, 4, 4), HunyuanVideo(), scale)


def with_report(graph):
    """The graph with a report, its picture saved and its numbers kept."""
    sources = {"model": [node_id(graph, CACHE), 0], "latent": [node_id(graph, SAMPLER), 0]}
    graph["report"] = {"class_type": "SkeinCacheReport", "inputs": {**sources, "width": 640, "height": 320}}
    graph["save"] = {"class_type": "SaveImage", "inputs": {"images": ["report", 0], "filename_prefix": "report"}}
    graph["text"] = {"class_type": "PreviewAny", "inputs": {"source": ["report", 1]}}
    return graph


def test_the_node_reports_the_run_that_made_the_latent(server, prompt):
    outputs = server.run(with_report(seeded(prompt, 401)))
    numbers = json.loads(outputs["text"]["text"][0])
    run = server.get("/skein/runs")["runs"][-1]
    assert numbers == run and len(numbers["calls"]) == 6
    with Image.open(server.file(outputs["save"]["images"][0])) as image:
        assert image.size == (640, 320)
        assert columns(pixels(image, REUSED), 640) == run["reused"]


@pytest.fixture(scope="module")
def remembering():
    """A server that keeps the outputs of nodes beyond the next prompt, so that an old latent meets a newer run."""
    with ComfyServer(comfyui_path(), ("--cache-lru", "50")) as running:
        yield running


def report_of(server, graph, width=640):
    graph["report"]["inputs"]["width"] = width
    return json.loads(server.run(graph)["text"]["text"][0])


def test_an_old_latent_gets_the_report_of_its_own_run(remembering, prompt):
    first = report_of(remembering, with_report(seeded(prompt, 411)))
    second = report_of(remembering, with_report(seeded(prompt, 412)))
    again = report_of(remembering, with_report(seeded(prompt, 411)), width=648)
    assert len(remembering.get("/skein/runs")["runs"]) == 2  # the sampler did not run a third time
    assert first["id"] != second["id"]
    assert again == first


def test_of_two_runs_with_one_latent_the_one_with_the_models_threshold(remembering, prompt):
    """Thresholds below every change: nothing is reused, so both runs end with the same latent."""
    graphs = [with_report(seeded(prompt, 413)) for _ in range(2)]
    for graph, threshold in zip(graphs, (1e-6, 2e-6)):
        graph[node_id(graph, CACHE)]["inputs"]["residual_diff_threshold"] = threshold
    reports = [report_of(remembering, graph) for graph in graphs]
    assert [report["calls"][0]["threshold"] for report in reports] == [1e-6, 2e-6]
    assert report_of(remembering, graphs[0], width=648) == reports[0]


def test_a_latent_that_no_run_ended_with_gets_a_sentence(remembering, prompt):
    graph = with_report(seeded(prompt, 414))
    made = graph["report"]["inputs"]["latent"]
    graph["half"] = {"class_type": "LatentMultiply", "inputs": {"samples": made, "multiplier": 0.5}}
    graph["report"]["inputs"]["latent"] = ["half", 0]
    with pytest.raises(PromptError, match="connect the sampler's own latent"):
        remembering.run(graph)


def test_a_run_knows_its_prompt_and_workflow(remembering, prompt):
    told = {"prompt": seeded(prompt, 415), "extra_data": {"extra_pnginfo": {"workflow": {"id": "of-a-page"}}}}
    sent = remembering.post("/prompt", told)["prompt_id"]
    while sent not in remembering.get(f"/history/{sent}"):
        time.sleep(0.1)
    run = remembering.get("/skein/runs")["runs"][-1]
    assert (run["prompt_id"], run["workflow_id"]) == (sent, "of-a-page")
    remembering.run(seeded(prompt, 416))  # as a program sends it, without a workflow
    run = remembering.get("/skein/runs")["runs"][-1]
    assert run["prompt_id"] != sent and run["workflow_id"] is None


def test_a_run_in_workers_is_found_by_its_latent(server, prompt):
    graph = with_report(in_workers(seeded(prompt, 403), "cpu,cpu"))
    assert report_of(server, graph) == server.get("/skein/runs")["runs"][-1]
    server.post("/skein/release", {})


def test_a_linked_value_gets_the_same_sentence(server, prompt):
    """ComfyUI does not hold values that come by a link against the limits of a widget."""
    graph = with_report(seeded(prompt, 404))
    graph["number"] = {"class_type": "PrimitiveInt", "inputs": {"value": 0}}
    graph["report"]["inputs"]["width"] = ["number", 0]
    with pytest.raises(PromptError, match="width must be 256 to 4096 pixels, not 0"):
        server.run(graph)


@pytest.mark.parametrize(
    ("threshold", "sentence"),
    [(0.0, r"switched off \(threshold 0"), (None, "neither First-Block Cache nor Sparse Attention")],
)
def test_a_model_without_cache_and_sparse_attention_gets_a_sentence(server, prompt, threshold, sentence):
    graph = with_report(seeded(prompt, 402))
    if threshold is None:
        graph["report"]["inputs"]["model"] = graph[node_id(graph, CACHE)]["inputs"]["model"]
    else:
        graph[node_id(graph, CACHE)]["inputs"]["residual_diff_threshold"] = threshold
    with pytest.raises(PromptError, match=sentence):
        server.run(graph)


def sparse_runs(server):
    return server.get("/skein/status")["sparse"]


def test_sparse_attention_alone_is_reported_as_a_map(server, prompt):
    outputs = server.run(with_sparse(with_report(seeded(prompt, 421)), cached=False))
    numbers = json.loads(outputs["text"]["text"][0])
    run = sparse_runs(server)[-1]
    assert numbers == {"sparse_attention": run} and run["ended"] and len(run["calls"]) == 6
    layers, calls = (
        [kind(**each) for each in run[name]] for kind, name in ((SparseLayer, "layers"), (SparseCall, "calls"))
    )
    assert len(layers) == 6 and len({tuple(layer.density) for layer in layers}) == 6
    expected = draw_map(SparseRun(dense_ms=run["dense_ms"], calls=calls, layers=layers), 640, 320)
    with Image.open(server.file(outputs["save"]["images"][0])) as image:
        drawn, wanted = (np.asarray(each.convert("RGB")).astype(int) for each in (image, expected))
    assert drawn.shape == wanted.shape and np.abs(drawn - wanted).max() <= 1  # SaveImage rounds down


def test_with_both_the_picture_is_the_caches_and_the_numbers_are_of_both(server, prompt):
    outputs = server.run(with_sparse(with_report(seeded(prompt, 422)), cached=True))
    numbers = json.loads(outputs["text"]["text"][0])
    run = server.get("/skein/runs")["runs"][-1]
    assert numbers == {**run, "sparse_attention": sparse_runs(server)[-1]}
    assert numbers["sparse_attention"]["prompt_id"] == run["prompt_id"]
    with Image.open(server.file(outputs["save"]["images"][0])) as image:
        assert columns(pixels(image, REUSED), 640) == run["reused"]


def test_an_old_latent_gets_the_report_of_its_own_sparse_run(remembering, prompt):
    graphs = [with_sparse(with_report(seeded(prompt, seed)), cached=False) for seed in (423, 424)]
    first, second = (report_of(remembering, graph)["sparse_attention"] for graph in graphs)
    assert first["id"] != second["id"]
    assert report_of(remembering, graphs[0], width=648)["sparse_attention"] == first
    assert [run["id"] for run in sparse_runs(remembering)] == [first["id"], second["id"]]  # nothing was sampled again


def test_a_sparse_run_in_workers_is_found_by_its_latent(server, prompt):
    graph = in_workers(with_sparse(with_report(seeded(prompt, 425)), cached=True), "cpu,cpu")
    numbers = report_of(server, graph)
    assert numbers == {**server.get("/skein/runs")["runs"][-1], "sparse_attention": sparse_runs(server)[-1]}
    server.post("/skein/release", {})


def test_where_sparse_attention_stood_back_the_cache_is_reported(server, prompt):
    """In a ring all attention is dense: there is no run of it, and an older one is not taken for it."""
    server.run(with_sparse(with_report(seeded(prompt, 426)), cached=False))
    before = sparse_runs(server)
    graph = in_workers(
        with_sparse(with_report(seeded(prompt, 427)), cached=True), "cpu,cpu", ulysses_degree=1, ring_degree=2
    )
    numbers = report_of(server, graph)
    assert numbers == {**server.get("/skein/runs")["runs"][-1], "sparse_attention": None}
    assert sparse_runs(server) == before
    server.post("/skein/release", {})


def test_a_sparse_latent_that_no_run_ended_with_gets_a_sentence(server, prompt):
    graph = with_sparse(with_report(seeded(prompt, 428)), cached=False)
    made = graph["report"]["inputs"]["latent"]
    graph["half"] = {"class_type": "LatentMultiply", "inputs": {"samples": made, "multiplier": 0.5}}
    graph["report"]["inputs"]["latent"] = ["half", 0]
    with pytest.raises(PromptError, match="connect the sampler's own latent"):
        server.run(graph)
