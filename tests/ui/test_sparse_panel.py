"""The panel's part of sparse attention in a real browser: which run it shows, the map, density and error."""

import copy
import json

import pytest
from comfy_page import SLOW, ComfyPage
from graphs import SAMPLER, seeded, with_sparse
from pack import ROOT
from playwright.sync_api import expect
from skein.demo.run import node_id
from test_panel import check_report

STATUS = "**/skein/status"
LUMINANCE = """() => [...document.querySelectorAll('.skein-cell')].map((cell) => {
  const canvas = Object.assign(document.createElement('canvas'), { width: 1, height: 1 });
  const pen = canvas.getContext('2d', { willReadFrequently: true });
  pen.fillStyle = getComputedStyle(cell).fill;
  pen.fillRect(0, 0, 1, 1);
  const [red, green, blue] = pen.getImageData(0, 0, 1, 1).data;
  return 0.2126 * red + 0.7152 * green + 0.0722 * blue;
})"""
FOLLOW = """async (runs) => {
  const { Store } = await import('/extensions/skein/store.js');
  const state = { time: 0, sampling: {}, processes: [], runs: [] };
  const store = new Store(async () => ({ ...state, version: 0, sparse: [] }));
  await store.refresh();
  runs.forEach((run, index) => store.receive({ ...state, version: index + 1, sparse: [run] }));
  return store.sparse;
}"""
RACE = """async ([status, messages]) => {
  const { Store } = await import('/extensions/skein/store.js');
  let answer;
  const store = new Store(() => new Promise((done) => (answer = done)));
  const read = store.refresh();
  messages.forEach((message) => store.receive(message));
  answer(status);
  await read;
  return [store.version, store.sampling.calls, store.runs];
}"""
TELL = "(data) => app.api.dispatchEvent(new CustomEvent('skein.state', { detail: data }))"


def recorded():
    return json.loads((ROOT / "tests" / "ui" / "recorded_sparse.json").read_text())


def cached_run(number, prompt_id):
    """A run under the cache, as the status has it, of a prompt."""
    call = {"sigma": 0.5, "change": None, "threshold": 0.06, "reused": False, "ms": 5.0, "admitted": True, "step": 0}
    sums = {"reused": 0, "computed": 1, "speedup": 1.0, "computed_ms": 5.0, "reused_ms": None}
    known = {"id": f"cached{number}", "started": 1000.0 + number, "ended": True, "finished": True, "error": None}
    place = {"prompt_id": prompt_id, "workflow_id": None, "node_id": "2", "steps": 1, "limit": -1, "accumulate": False}
    return {**known, **place, **sums, "calls": [{**call, "parts": [0]}]}


def sparse_run(number, prompt_id, of=1, **fields):
    return {**recorded()[of], "id": f"sparse{number}", "prompt_id": prompt_id, "started": 999.9 + number, **fields}


def large_run():
    """A run of a model of full size: 60 layers of 24 heads, each cell with its own density."""
    names = [f"double_blocks.{i}" for i in range(20)] + [f"single_blocks.{i}" for i in range(40)]
    cells = iter(range(60 * 24))
    layers = [{"path": n, "density": [next(cells) / 1439 for _ in range(24)], "error": [0.019] * 24} for n in names]
    return sparse_run(9, "large", layers=[{**layer, "calls": 4} for layer in layers])


class SparsePage(ComfyPage):
    """The panel on a status with other runs. They are given out, as a server would; no run is sampled."""

    def __init__(self, *arguments, runs=(), sparse=(), **options):
        super().__init__(*arguments, **options)
        self.given = {"runs": list(runs), "sparse": list(sparse)}
        self.page.route(STATUS, lambda route: route.fulfill(json={**route.fetch().json(), **self.given}))

    def load(self):
        super().load()
        self.open_panel()
        self.wait("document.querySelector('.skein-panel').dataset.connection === 'ready'")

    @property
    def sparse(self):
        return self.page.locator(".skein-sparse")

    @property
    def field(self):
        return self.page.locator(".skein-map-field")

    @property
    def said(self):
        return self.page.locator(".skein-map-said")

    def tell(self, notes=None, sparse=()):
        """A message, as one of the server's."""
        state = self.page.evaluate("() => fetch('/skein/status').then((r) => r.json())")
        self.told = getattr(self, "told", 0) + 1
        sampling = {**state["sampling"], "notes": notes or {}}
        news = {"runs": [], "sparse": sparse, "version": state["version"] + self.told}
        self.page.evaluate(TELL, {**state, "sampling": sampling, **news})


def test_a_run_without_the_cache_is_followed(browser, ui_server, prompt):
    graph = with_sparse(seeded(prompt, 81), cached=False)
    graph[node_id(graph, SAMPLER)]["inputs"]["steps"] = 12
    with ComfyPage(browser, ui_server) as comfy:
        comfy.open_panel()
        ui_server.submit(graph)
        sparse, charts = comfy.page.locator(".skein-sparse"), comfy.page.locator(".skein-chart polyline")
        expect(comfy.panel.get_by_text("What runs now has no First-Block Cache")).to_be_visible(timeout=SLOW)
        expect(sparse.get_by_text("appears when the run has ended")).to_be_visible(timeout=SLOW)
        expect(charts).to_have_count(2, timeout=SLOW)
        comfy.wait("document.querySelector('.skein-density-line').points.length >= 4")
        comfy.screenshot("sparse-running")
        before = comfy.page.evaluate("() => document.querySelector('.skein-density-line').points.length")
        expect(comfy.page.locator(".skein-cell")).to_have_count(12, timeout=SLOW)
        run = comfy.status()["sparse"][-1]
        assert before < comfy.page.evaluate("() => document.querySelector('.skein-density-line').points.length") == 12
        assert run["ended"] and len(run["calls"]) == 12
        expect(comfy.page.locator(".skein-sparse-summary")).to_have_text(run["summary"])
        expect(comfy.page.locator(".skein-notes")).to_contain_text("Sparse Attention")
        expect(comfy.panel.get_by_text("The newest run has no First-Block Cache")).to_be_visible()
        expect(sparse.get_by_text("appears when the run has ended")).to_be_hidden()
        comfy.context.grant_permissions(["clipboard-read", "clipboard-write"])
        comfy.panel.get_by_role("button", name="Copy report").click()
        expect(comfy.panel.get_by_text("in the clipboard")).to_be_visible()
        copied = json.loads(comfy.page.evaluate("() => navigator.clipboard.readText()"))
        assert copied["sparse"] == run and "run" not in copied
        comfy.screenshot("sparse-alone")
        comfy.load()
        comfy.open_panel()
        expect(comfy.page.locator(".skein-cell")).to_have_count(12)  # the status holds it too
        assert comfy.complaints() == [] and comfy.foreign_requests() == []


def test_with_the_cache_both_are_shown_and_copied(browser, ui_server, prompt):
    with ComfyPage(browser, ui_server) as comfy:
        comfy.open_panel()
        comfy.run(lambda: ui_server.run(with_sparse(seeded(prompt, 82), cached=True)))
        expect(comfy.page.locator(".skein-cell")).to_have_count(12, timeout=SLOW)
        assert comfy.points == 6
        status = comfy.status()
        run, sparse = status["runs"][-1], status["sparse"][-1]
        assert run["prompt_id"] == sparse["prompt_id"]
        check_report(comfy, run)
        copied = json.loads(comfy.page.evaluate("() => navigator.clipboard.readText()"))
        assert copied["sparse"] == sparse
        comfy.screenshot("sparse-and-cache")
        ui_server.run(seeded(prompt, 83))  # a newer run, without sparse attention
        comfy.wait(f"document.querySelector('.skein-panel select option:nth-child(3)')?.value === '{run['id']}'")
        expect(comfy.page.locator(".skein-sparse")).to_be_hidden()
        comfy.panel.get_by_role("combobox", name="Run").select_option(run["id"])
        expect(comfy.page.locator(".skein-sparse-summary")).to_have_text(sparse["summary"])
        assert comfy.complaints() == []


def test_the_run_of_the_same_prompt_is_shown(browser, ui_server):
    """Whatever is chosen; of a prompt that samples twice, the one that began with the run that is chosen."""
    cached = [cached_run(1, "a"), cached_run(2, "b"), cached_run(3, "b"), cached_run(4, "c")]
    sparse = [sparse_run(2, "b", summary="2"), sparse_run(3, "b", 0, summary="3"), sparse_run(4, "c", density=0.123)]
    with SparsePage(browser, ui_server, runs=cached, sparse=sparse) as comfy:
        text = comfy.page.locator(".skein-sparse-summary")
        expect(text).to_contain_text("12 % of attention computed")  # the newest
        choose = comfy.panel.get_by_role("combobox", name="Run").select_option
        for chosen, shown in (("cached2", recorded()[1]), ("cached3", recorded()[0])):
            choose(chosen)
            expect(text).to_have_text(shown["summary"])
        choose("cached1")
        expect(comfy.sparse).to_be_hidden()
        choose("")
        expect(comfy.sparse).to_be_visible()
        assert comfy.points == 1 and comfy.complaints() == []


@pytest.mark.parametrize(
    ("cached", "sparse", "points", "shown"),
    [
        ([cached_run(1, "a"), cached_run(5, "b")], [sparse_run(2, "c")], 1, False),  # older than what is looked at
        ([cached_run(1, "a")], [sparse_run(2, "c")], 0, True),  # newer: the curve is not of this run
        ([cached_run(3, "a")], [sparse_run(1, "a")], 1, True),
        ([cached_run(3, "a")], [], 1, False),
        ([], [sparse_run(1, "a")], 0, True),
        ([], [], 0, False),
    ],
)
def test_what_is_shown_belongs_together(browser, ui_server, cached, sparse, points, shown):
    with SparsePage(browser, ui_server, runs=cached, sparse=sparse) as comfy:
        expect(comfy.sparse).to_be_visible(visible=shown)
        assert comfy.points == points
        expect(comfy.panel.get_by_text("The newest run has no First-Block Cache")).to_be_visible(
            visible=shown and not points
        )
        expect(comfy.panel.get_by_text("No run yet")).to_be_visible(visible=not shown and not points)
        assert comfy.complaints() == []


def test_the_map_is_gone_through_by_pointer_and_keys(browser, ui_server):
    run = recorded()[1]
    with SparsePage(browser, ui_server, sparse=[run]) as comfy:

        def say(row, head):
            layer = run["layers"][row]
            density, error = (layer[name][head] * 100 for name in ("density", "error"))
            return f"{layer['path']}, head {head}: {density:.0f} % computed, {error:.1f} % error"

        cells = comfy.page.locator(".skein-cell")
        expect(cells).to_have_count(12)
        for row, head in ((0, 0), (3, 1), (5, 0)):
            box = cells.nth(2 * row + head).bounding_box()
            comfy.page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
            expect(comfy.said).to_have_text(say(row, head))
        comfy.page.mouse.move(5, 5)
        expect(comfy.said).to_have_text("")
        comfy.field.focus()
        keys = ["ArrowDown", "ArrowDown", "ArrowRight", "ArrowRight", "ArrowUp", "ArrowLeft", "ArrowUp"]
        for key, cell in zip(keys, [(0, 0), (1, 0), (1, 1), (1, 1), (0, 1), (0, 0), (0, 0)]):
            comfy.page.keyboard.press(key)
            expect(comfy.said).to_have_text(say(*cell))
        comfy.page.keyboard.press("Escape")
        expect(comfy.said).to_have_text("")
        assert comfy.complaints() == []


@pytest.mark.parametrize("palette", ["dark", "light"])
def test_a_map_of_a_large_model(browser, ui_server, palette):
    """Every cell, the darker the less was computed; drawn once, whatever else happens."""
    large, settings = large_run(), {"Comfy.ColorPalette": palette}
    with SparsePage(browser, ui_server, settings, sparse=[large]) as comfy:
        light = comfy.page.evaluate(LUMINANCE)
        assert len(light) == 1440 and light == sorted(light) and light[-1] > 6 * light[0]
        names = [text for text in comfy.page.locator(".skein-map text").all_text_contents() if "blocks" in text]
        assert names[0] == "double_blocks.0" and 10 <= len(names) < 30
        comfy.page.set_viewport_size({"width": 1400, "height": 1500})
        comfy.screenshot(f"sparse-{palette}")
        comfy.page.evaluate("() => document.querySelector('.skein-cell').setAttribute('data-first', '')")
        comfy.tell(notes={"sparse": "another note"})
        expect(comfy.page.locator(".skein-notes")).to_contain_text("another note")
        expect(comfy.page.locator(".skein-cell[data-first]")).to_have_count(1)
        comfy.tell(sparse=[{**sparse_run(10, "new"), "started": large["started"] + 1}])
        expect(comfy.page.locator(".skein-cell")).to_have_count(12)
        expect(comfy.page.locator(".skein-cell[data-first]")).to_have_count(0)
        assert comfy.complaints() == []


def test_density_and_error_are_drawn_over_the_steps(browser, ui_server):
    run = recorded()[1]
    with SparsePage(browser, ui_server, sparse=[run]) as comfy:
        charts = comfy.page.locator(".skein-chart")
        for chart, name, value in ((0, "Part of attention computed", "density"), (1, "Error", "error")):
            texts = charts.nth(chart).locator("text").all_text_contents()
            assert name in texts and texts[texts.index("Step") + 1 :] == ["1", "2", "3", "4", "5", "6"]
            points = charts.nth(chart).locator("polyline").evaluate("(e) => [...e.points].map(({ x, y }) => [x, y])")
            heights, values = [y for _, y in points], [call[value] for call in run["calls"]]
            assert [x for x, _ in points] == sorted({x for x, _ in points}) and len(points) == 6
            highest, lowest = heights[values.index(max(values))], heights[values.index(min(values))]
            for height, each in zip(heights, values):
                part = (each - min(values)) / (max(values) - min(values))
                assert height == pytest.approx(lowest + part * (highest - lowest), abs=0.01) and highest < lowest
        expect(charts.nth(1).locator(".skein-threshold")).to_have_count(1)  # the error that is accepted
        assert comfy.complaints() == []


def test_odd_runs_are_shown(browser, ui_server):
    """One that has no call yet, one that was dense, one that has stopped, one of 1000 calls, heads of two numbers."""
    run = recorded()[1]
    begun = {**run, "id": "begun", "calls": [], "layers": [], "ended": False, "density": 1.0, "speedup": None}
    dense_calls = [{**call, "density": 1.0, "error": 0.0, "sparse": 0} for call in run["calls"]]
    dense = {**run, "id": "dense", "calls": dense_calls[:1], "layers": [], "max_error": None, "speedup": None}
    long = {**run, "id": "long", "calls": [{**run["calls"][3], "step": i // 2} for i in range(1000)], "speedup": None}
    uneven = copy.deepcopy({**run, "id": "uneven"})
    uneven["layers"][0].update(density=[0.5], error=[0.1])
    sentence = "53 % of attention computed, 13.6 % error"
    assert run["summary"].startswith(sentence)
    with SparsePage(browser, ui_server, sparse=[begun]) as comfy:
        cells, text = comfy.page.locator(".skein-cell"), comfy.page.locator(".skein-sparse-summary")
        expect(text).to_have_text("all attention was dense")
        expect(comfy.page.locator(".skein-chart")).to_have_count(0)
        for each, said, shown in ((dense, "all attention was dense", 0), (long, sentence, 12)):
            comfy.tell(sparse=[each])
            expect(text).to_have_text(said)
            expect(cells.locator("visible=true")).to_have_count(shown)
            expect(comfy.page.locator(".skein-chart")).to_have_count(2)
        comfy.tell(sparse=[uneven])
        expect(cells).to_have_count(11)
        assert comfy.complaints() == []


def test_the_store_replaces_by_id_and_keeps_the_last(browser, ui_server):
    runs = [{"id": f"run{i}", "version": i + 1, "started": i, "calls": []} for i in range(54)]
    again = {**runs[5], "version": 55, "calls": [{"step": 0}], "ended": True}
    with ComfyPage(browser, ui_server) as comfy:
        kept = comfy.page.evaluate(FOLLOW, [*runs, again])
        assert kept == [runs[4], again, *runs[6:]]


def test_a_status_that_comes_late_leaves_nothing_older(browser, ui_server):
    """Messages that came while it was read are newer in what they hold; what they lack is the status's."""
    old, runs = {"id": "old", "version": 3, "started": 1}, [{"id": "new", "version": v, "started": 2} for v in (5, 8)]
    state = {"time": 0, "processes": [], "sparse": []}
    status = {**state, "version": 6, "sampling": {"calls": 6}, "runs": [old, runs[0]]}
    later = {**state, "version": 8, "sampling": {"calls": 8}, "runs": [runs[1]]}
    earlier = {**state, "version": 5, "sampling": {"calls": 5}, "runs": [runs[0]]}
    with ComfyPage(browser, ui_server) as comfy:
        assert comfy.page.evaluate(RACE, [status, [earlier, later]]) == [8, 8, [old, runs[1]]]
        assert comfy.page.evaluate(RACE, [status, [earlier]]) == [6, 6, [old, runs[0]]]
        assert comfy.page.evaluate(RACE, [status, [later, earlier]]) == [8, 8, [old, runs[1]]]
