"""The panel in a real browser on a real server: a run as a person follows it, the slider, reload, both renderers."""

import json
import re

import pytest
from comfy_page import CACHE, NEWEST, POINTS, SLOW, WIDGET, ComfyPage, demo_workflow
from pack import ROOT
from playwright.sync_api import expect

import workflows

DECIDE = """async (run) => {
  const { estimate, speedupOf } = await import('/extensions/skein/estimate.js');
  const own = estimate(run, run.calls[0].threshold);
  return { own, speedup: speedupOf(run, run.reused), all: estimate(run, 1000), none: estimate(run, 0) };
}"""
ESTIMATE_EACH = """async (pairs) => {
  const { estimate } = await import('/extensions/skein/estimate.js');
  return pairs.map(([run, threshold]) => estimate(run, threshold).reused);
}"""
# of each picture of the curve from now on: whose run it is, and how many calls it shows
WATCH_POINTS = f"""() => {{
  window.pictures = [];
  new MutationObserver(() => pictures.push([({NEWEST})()[0], document.querySelectorAll('{POINTS}').length]))
    .observe(document.querySelector('.skein-panel'), {{ subtree: true, childList: true, attributes: true }});
}}"""
SPEED_UP = "SkeinSpeedUp"
FACTOR = re.compile(r"\d+\.\d\dx")


def recorded(run):
    return [call["reused"] for call in run["calls"]]


def without_runs(route):
    """Let a page read the status as it is before the first run."""
    answer = route.fetch()
    route.fulfill(response=answer, json={**answer.json(), "runs": [], "sparse": []})


def test_before_the_first_run_the_panel_says_how_to_begin(browser, ui_server):
    with ComfyPage(browser, ui_server) as comfy:
        comfy.page.route("**/skein/status", without_runs)
        comfy.open_panel()
        expect(comfy.panel.get_by_text("No run yet")).to_be_visible()
        expect(comfy.panel.get_by_text(workflows.TEMPLATES["skein_demo"].title)).to_be_visible()
        comfy.screenshot("empty")
        assert comfy.complaints() == []


def test_a_run_is_followed_and_its_threshold_tried(browser, ui_server):
    with ComfyPage(browser, ui_server) as comfy:
        comfy.open_workflow(demo_workflow(seed=3, steps=60))
        comfy.open_panel()
        comfy.page.evaluate(WATCH_POINTS)
        run = comfy.run()
        seen = [count for shown, count in comfy.page.evaluate("() => pictures") if shown == run["id"]]
        assert seen == sorted(seen) and len(set(seen)) > 3  # it grew with the calls
        assert seen[-1] == comfy.points == len(run["calls"]) == 60
        expect(comfy.panel.get_by_text(f"{run['speedup']:.2f}x", exact=True)).to_be_visible()
        assert FACTOR.findall(comfy.panel.inner_text()) == [f"{run['speedup']:.2f}x"]
        assert comfy.page.locator(".skein-drawing path").count() == run["reused"] > 0
        assert comfy.page.locator(".skein-drawing circle").count() == run["computed"] > 0

        curve = comfy.panel.get_by_role("group")
        curve.hover()
        expect(comfy.page.locator(".skein-tip")).to_contain_text("sigma")
        curve.focus()
        for _ in range(2):
            comfy.page.keyboard.press("Home")
        comfy.page.keyboard.press("ArrowRight")
        tip = comfy.page.locator(".skein-tip")
        expect(tip).to_contain_text("Call 2")
        expect(tip).to_contain_text(f"{run['calls'][1]['change']:.3g}")
        comfy.page.keyboard.press("Escape")
        expect(tip).to_be_hidden()

        check_slider(comfy, run)
        check_report(comfy, run)
        assert comfy.complaints() == [] and comfy.foreign_requests() == []


def check_slider(comfy, run):
    """Another threshold: what it would have reused, and into the node with it."""
    assert comfy.widget() == 0.06
    top = max(call["change"] or 0 for call in run["calls"]) + 0.001
    comfy.move_slider(round(top + 0.001, 3))
    estimate = comfy.page.locator(".skein-estimate")
    expect(estimate).to_contain_text(re.compile(r"\d+ - \d+ of 60 reused, \d\.\d\dx - \d\.\d\dx as fast"))
    assert comfy.page.locator(".skein-differs").count() > 0
    write_threshold(comfy, 0.1)
    comfy.screenshot("slider")
    expect(comfy.panel.get_by_text("the next run uses it")).to_be_visible()
    assert comfy.widget() == 0.1
    slider = comfy.panel.get_by_role("slider")
    slider.focus()
    comfy.page.keyboard.press("ArrowRight")
    expect(estimate).to_contain_text("0.101:")


def check_report(comfy, run):
    comfy.context.grant_permissions(["clipboard-read", "clipboard-write"])
    comfy.panel.get_by_role("button", name="Copy report").click()
    expect(comfy.panel.get_by_text("in the clipboard")).to_be_visible()
    copied = json.loads(comfy.page.evaluate("() => navigator.clipboard.readText()"))
    assert copied["run"]["id"] == run["id"] and copied["run"]["calls"] == run["calls"]


SETTINGS = [
    {},
    {"residual_diff_threshold": 0.2, "max_consecutive_hits": 1},
    {"residual_diff_threshold": 0.3, "accumulate": True},
    {"residual_diff_threshold": 0.3, "warmup_steps": 3, "start_percent": 0.2, "end_percent": 0.8},
    {"residual_diff_threshold": 0.3, "cfg": 3.0, "max_consecutive_hits": 2, "accumulate": True},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_the_estimate_at_the_runs_own_threshold_is_the_run(browser, ui_server, prompt, settings):
    """The slider's rule against real recorded runs, with every setting that decides."""
    for node in prompt.values():
        node["inputs"].update({name: value for name, value in settings.items() if name in node["inputs"]})
    sampler = next(node for node in prompt.values() if node["class_type"] == "KSampler")
    sampler["inputs"].update(steps=10, seed=len(str(settings)))
    with ComfyPage(browser, ui_server) as comfy:
        ui_server.run(prompt)
        run = comfy.status()["runs"][-1]
        assert len(run["calls"]) >= 10 and 0 < sum(recorded(run)) < len(run["calls"])
        estimate = comfy.page.evaluate(DECIDE, run)
        assert estimate["own"]["decisions"] == recorded(run)
        assert estimate["own"]["reused"] == [run["reused"]] and estimate["own"]["speedup"] == [run["speedup"]]
        assert estimate["speedup"] == pytest.approx(run["speedup"])
        assert estimate["none"]["reused"] == [0, 0] and estimate["none"]["speedup"] == [1, 1]
        if not settings:
            assert estimate["all"]["reused"] == [8, 9]  # the first has nothing to compare with


def test_the_estimate_holds_what_recorded_runs_did(browser, ui_server):
    """Each recorded run at each other threshold up to three times its own, against the run at that threshold."""
    runs = json.loads((ROOT / "tests" / "ui" / "recorded_runs.json").read_text())
    cases = [
        (run, other["calls"][0]["threshold"], other["reused"])
        for run in runs
        for other in runs
        if (run["family"], run["prompt"]) == (other["family"], other["prompt"])
        and run is not other
        and 1 / 3 <= run["calls"][0]["threshold"] / other["calls"][0]["threshold"] <= 3
    ]
    with ComfyPage(browser, ui_server) as comfy:
        ranges = comfy.page.evaluate(ESTIMATE_EACH, [[run, threshold] for run, threshold, _ in cases])
    held = [least <= reused <= most for (least, most), (_, _, reused) in zip(ranges, cases)]
    widths = [most - least for least, most in ranges]
    assert sum(held) / len(held) > 0.95, sum(held) / len(held)
    assert sum(widths) / len(widths) < 4.5  # of 12 to 32 calls


def test_a_reload_in_the_middle_of_a_run(browser, ui_server):
    with ComfyPage(browser, ui_server) as comfy:
        comfy.open_workflow(demo_workflow(seed=4, steps=100))
        comfy.queue()
        comfy.open_panel()
        comfy.wait_for_state("running")
        comfy.wait_for_points(3)
        before = comfy.status()["runs"][-1]
        comfy.load()
        comfy.open_panel()
        comfy.wait_for_points(len(before["calls"]))
        assert not comfy.status()["runs"][-1]["ended"]  # still the same run
        comfy.wait_for_state("finished")
        run = comfy.status()["runs"][-1]
        assert run["id"] == before["id"] and comfy.points == len(run["calls"]) == 100
        assert comfy.complaints() == []


def test_an_interrupted_run_and_a_run_without_the_cache(browser, ui_server, prompt):
    with ComfyPage(browser, ui_server) as comfy:
        comfy.open_workflow(demo_workflow(seed=5, steps=200))
        comfy.open_panel()
        comfy.queue()
        comfy.wait_for_state("running")
        comfy.wait_for_points(2)
        ui_server.interrupt()
        comfy.wait_for_state("stopped")
        assert comfy.status()["runs"][-1]["error"] == "interrupted"
        expect(comfy.page.locator(".skein-banner")).to_be_hidden()  # who interrupts knows

        attention = {"kernel": "auto", "trim_text": True, "allow_8bit": False, "exact_steps": 2}
        cache = next(node for node in prompt.values() if node["class_type"] == CACHE)
        cache["class_type"], cache["inputs"] = "SkeinAttention", {**attention, "model": cache["inputs"]["model"]}
        sampler = next(node for node in prompt.values() if node["class_type"] == "KSampler")
        sampler["inputs"]["steps"] = 60
        ui_server.submit(prompt)
        expect(comfy.panel.get_by_text("no First-Block Cache")).to_be_visible(timeout=SLOW)
        expect(comfy.page.locator(".skein-notes")).to_contain_text("FlashAttention-2 runs", timeout=SLOW)
        comfy.screenshot("without-cache")
        ui_server.interrupt()
        expect(comfy.panel.get_by_text("no First-Block Cache")).to_be_hidden(timeout=SLOW)
        assert comfy.complaints() == []


@pytest.mark.parametrize("palette", ["dark", "light"])
def test_the_vue_renderer_and_both_themes(browser, ui_server, palette):
    """The threshold that the panel writes is the one that the node shows. Each has its seed: what ComfyUI has in its
    cache is not run, and the last run is then another workflow's."""
    settings = {"Comfy.VueNodes.Enabled": True, "Comfy.ColorPalette": palette}
    with ComfyPage(browser, ui_server, settings, reduced_motion="reduce") as comfy:
        comfy.open_workflow(demo_workflow(seed=60 + len(palette)))
        comfy.open_panel()
        comfy.run()
        write_threshold(comfy, 0.123)
        assert comfy.widget() == 0.123
        node = comfy.page.locator("[data-node-id='2']")
        expect(node).to_be_visible()
        shown = "() => [...document.querySelectorAll(\"[data-node-id='2'] input\")].map((e) => Number(e.value))"
        comfy.wait(f"({shown})().includes(0.123)")
        colours = comfy.panel.evaluate(
            "(e) => [getComputedStyle(e).color, getComputedStyle(document.body).backgroundColor]"
        )
        text, ground = (
            sum(map(int, "".join(c if c.isdigit() else " " for c in colour).split()[:3])) for colour in colours
        )
        assert (text < ground) == (palette == "light"), colours
        comfy.screenshot(f"vue-{palette}")
        assert comfy.complaints() == [] and comfy.foreign_requests() == []


def test_a_lost_connection_and_a_status_that_fails(browser, ui_server):
    with ComfyPage(browser, ui_server) as comfy:
        sockets = []

        def through(socket):
            if len(sockets) == 1:
                expect(comfy.panel.get_by_text("The connection to ComfyUI is lost")).to_be_visible(timeout=SLOW)
                comfy.screenshot("reconnecting")
            sockets.append(socket)
            socket.connect_to_server()

        comfy.page.route_web_socket(lambda url: "/ws" in url, through)
        comfy.page.route("**/skein/status", lambda route: route.fulfill(status=500, body="broken"))
        comfy.load()
        comfy.open_panel()
        again = comfy.panel.get_by_role("button", name="Try again")
        expect(comfy.panel.get_by_text("could not be read (HTTP 500)")).to_be_visible()
        comfy.screenshot("error")
        comfy.page.unroute("**/skein/status")
        again.click()
        expect(again).to_be_hidden()

        sockets[0].close(code=1001, reason="test")
        expect(comfy.panel.get_by_text("The connection to ComfyUI is lost")).to_be_visible(timeout=SLOW)
        expect(comfy.panel.get_by_text("The connection to ComfyUI is lost")).to_be_hidden(timeout=SLOW)
        assert len(sockets) == 2

        sends = "(data) => app.api.dispatchEvent(new CustomEvent('skein.state', { detail: data }))"
        for nonsense in (
            None,
            5,
            {"version": "x"},
            {"version": 1e308, "runs": [], "sparse": []},
            {"version": 5, "runs": 3},
        ):
            comfy.page.evaluate(sends, nonsense)
        comfy.wait("document.querySelector('.skein-panel').dataset.connection === 'ready'")
        assert [entry for entry in comfy.complaints() if "500" not in entry[1]] == []


LINK_THRESHOLD = """([type, name]) => {
  const node = app.graph.nodes.find((each) => each.comfyClass === type);
  const source = LiteGraph.createNode('PrimitiveFloat');
  app.graph.add(source);
  source.connect(0, node, node.inputs.findIndex((input) => input.widget?.name === name));
}"""


SHARE_WIDGET = "app.graph.getNodeById(id).widgets.find((widget) => widget.name === 'reuse_share')"
SET_SHARE = f"([id, share]) => {{ {SHARE_WIDGET}.value = share; }}"
SHARE_OF = f"(id) => {SHARE_WIDGET}.value"
SERIALIZED = "() => app.graph.serialize()"
REPEAT_WARNINGS = "() => { LiteGraph.alwaysRepeatWarnings = true; }"


def write_threshold(comfy, value):
    comfy.move_slider(value)
    comfy.panel.get_by_role("button", name=f"Write {value} into the node").click()


def test_a_threshold_that_comes_from_another_node_is_not_written(browser, ui_server):
    with ComfyPage(browser, ui_server) as comfy:
        comfy.open_workflow(demo_workflow(seed=8))
        comfy.open_panel()
        comfy.run()
        comfy.page.evaluate(LINK_THRESHOLD, [CACHE, WIDGET])
        before = comfy.widget()
        comfy.page.evaluate(REPEAT_WARNINGS)
        said = len(comfy.console)
        write_threshold(comfy, 0.123)
        expect(comfy.panel.get_by_text("comes from another node")).to_be_visible()
        assert comfy.widget() == before
        assert [text for _, text, _ in comfy.console[said:] if "deprecated" in text] == []


def test_only_the_workflow_that_ran_is_written_into(browser, ui_server, prompt):
    """A second copy of a template has a node of the same number and kind; a program's prompt has no workflow."""
    with ComfyPage(browser, ui_server) as comfy:
        comfy.open_workflow(demo_workflow(seed=10))
        ran = comfy.page.evaluate(SERIALIZED)
        comfy.open_panel()
        comfy.run()
        comfy.open_workflow(demo_workflow(seed=10))
        write_threshold(comfy, 0.11)
        expect(comfy.panel.get_by_text("came from another workflow")).to_be_visible()
        assert comfy.widget() == 0.06
        comfy.open_workflow(ran)
        write_threshold(comfy, 0.12)
        expect(comfy.panel.get_by_text("the next run uses it")).to_be_visible()
        assert comfy.widget() == 0.12

        comfy.run(lambda: ui_server.run(prompt))
        write_threshold(comfy, 0.13)
        expect(comfy.panel.get_by_text("sent by a program")).to_be_visible()
        assert comfy.widget() == 0.12 and comfy.complaints() == []


def test_a_share_is_followed_and_a_threshold_takes_its_place(browser, ui_server):
    workflow = demo_workflow(seed=12)
    node = next(node for node in workflow["nodes"] if node["type"] == CACHE)
    with ComfyPage(browser, ui_server) as comfy:
        comfy.open_workflow(workflow)
        comfy.page.evaluate(SET_SHARE, [node["id"], 0.5])
        comfy.open_panel()
        run = comfy.run()
        assert (run["share"], run["reused"], len(run["calls"])) == (0.5, 6, 12)
        expect(comfy.page.locator(".skein-estimate")).to_have_text("50 % asked for: 6 of 12 reused")
        line = comfy.page.locator("polyline.skein-threshold")
        assert line.evaluate("(e) => e.points.length") == 12
        comfy.screenshot("share")
        write_threshold(comfy, 0.14)
        expect(comfy.panel.get_by_text("the next run uses it")).to_be_visible()
        assert comfy.widget() == 0.14 and comfy.page.evaluate(SHARE_OF, node["id"]) == 0
        assert line.evaluate("(e) => e.points.length") == 2
        assert comfy.complaints() == []


def test_no_threshold_is_offered_for_speed_up(browser, ui_server):
    """It chooses the threshold itself, and has no widget for one."""
    workflow = demo_workflow(seed=11)
    node = next(node for node in workflow["nodes"] if node["type"] == CACHE)
    node.update(type=SPEED_UP, widgets_values=["balanced", "all"])
    node["inputs"] = [each for each in node["inputs"] if each["name"] == "model"]
    with ComfyPage(browser, ui_server) as comfy:
        comfy.open_workflow(workflow)
        comfy.open_panel()
        comfy.run()
        comfy.move_slider(0.14)
        write = comfy.panel.get_by_role("button", name="Write 0.14 into the node")
        expect(write).to_be_disabled()
        expect(write).to_have_attribute("title", "Add First-Block Cache after Speed Up to set a threshold.")
        comfy.screenshot("speed-up")
        assert comfy.complaints() == []


def test_behind_another_tab_of_the_bottom_panel_nothing_is_sent(browser, ui_server):
    with ComfyPage(browser, ui_server) as comfy:
        comfy.open_workflow(demo_workflow(seed=9, steps=13))
        comfy.open_panel()
        comfy.page.get_by_role("tab", name="Logs").click()
        comfy.panel.wait_for(state="detached")
        with comfy.page.expect_request(lambda r: r.url.endswith("/skein/listen") and '"listen":false' in r.post_data):
            comfy.queue()
        comfy.open_panel()
        expect(comfy.page.locator(POINTS)).to_have_count(13, timeout=SLOW)  # the run before has another number
        comfy.wait_for_state("finished")
        assert comfy.points == 13 and comfy.complaints() == []


def test_the_panel_and_the_nodes_in_chinese(browser, ui_server):
    chinese = json.loads((ROOT / "locales" / "zh" / "main.json").read_text())["skein"]
    names = json.loads((ROOT / "locales" / "zh" / "nodeDefs.json").read_text())
    with ComfyPage(browser, ui_server, {"Comfy.Locale": "zh"}) as comfy:
        comfy.open_workflow(demo_workflow())
        comfy.open_panel()
        expect(comfy.panel.get_by_role("button", name=chinese["Copy report"])).to_be_visible()
        titles = comfy.page.evaluate("() => app.graph.nodes.map((node) => node.title)")
        comfy.screenshot("chinese")
        shown = comfy.page.evaluate("(type) => LiteGraph.registered_node_types[type].title", CACHE)
        assert names[CACHE]["display_name"] in [shown, *titles]
        assert comfy.complaints() == []
