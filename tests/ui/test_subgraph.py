"""The subgraph blueprint in the real browser: found, put between the demo's loader and its sampler, run, opened."""

import json

import pytest
from blueprint import PARTS, PATH, TITLE
from comfy_page import ComfyPage, demo_workflow, skip_older
from playwright.sync_api import expect

PUT_BETWEEN = """(title) => {
  const of = (type) => app.graph.nodes.find((node) => node.type === type);
  const parts = app.graph.nodes.find((node) => node.title === title);
  app.graph.remove(of("SkeinFirstBlockCache"));
  of("SkeinDemoModel").connect(0, parts, 0);
  parts.connect(0, of("KSampler"), 0);
}"""
BYPASS = """() => {
  app.canvas.graph.nodes.find((node) => node.type === "SkeinCompile").mode = 4; // LiteGraph's number for it
  app.extensionManager.command.execute("Comfy.Canvas.FitView");
}"""
SET = """([title, name, value]) => {
  app.graph.nodes.find((node) => node.title === title).widgets.find((widget) => widget.name === name).value = value;
}"""
OUTSIDE = [name for names in PARTS.values() for name in names]
VALUES = """(title) => Object.fromEntries(
  app.graph.nodes.find((node) => node.title === title).widgets.map((widget) => [widget.name, widget.value]))"""


@pytest.fixture(scope="module")
def comfy(browser, ui_server):
    skip_older(ui_server, "the search")
    with ComfyPage(browser, ui_server, {"Comfy.VueNodes.Enabled": True, "Comfy.Minimap.Visible": False}) as page:
        page.page.set_default_timeout(40000)
        yield page


@pytest.fixture(scope="module")
def added(comfy):
    """The demo with the blueprint on the canvas, as the search puts it there."""
    comfy.open_workflow(demo_workflow(steps=4))
    results = comfy.search("speed up", 700, 700)
    found = results.filter(has_text=TITLE)
    found.wait_for()
    comfy.first = [each.split("\n")[0].strip() for each in results.all_inner_texts()[:2]]
    comfy.put_down(found, TITLE, 700, 700)
    return comfy


def test_its_widgets_are_there_and_count_in_every_front_end(browser, ui_server):
    """In those of older versions too, which list it elsewhere."""
    with ComfyPage(browser, ui_server) as comfy:
        comfy.open_workflow(json.loads(PATH.read_text()))
        comfy.wait(f"app.graph.nodes[0]?.widgets?.length === {len(OUTSIDE)}")
        assert list(comfy.page.evaluate(VALUES, TITLE)) == OUTSIDE
        comfy.page.evaluate(SET, [TITLE, "fp8_mode", "weight_only"])
        comfy.page.evaluate(SET, [TITLE, "residual_diff_threshold", 0.3])
        prompt = comfy.page.evaluate("async () => (await app.graphToPrompt()).output")
        parts = {node["class_type"]: node["inputs"] for node in prompt.values()}
        assert list(parts) == list(PARTS)
        assert parts["SkeinFP8Quantize"]["mode"] == "weight_only" and parts["SkeinCompile"]["mode"] == "default"
        assert parts["SkeinFirstBlockCache"]["residual_diff_threshold"] == 0.3
        assert comfy.complaints() == []


def test_the_search_shows_it_after_the_node(added):
    assert added.first == ["Speed Up (Skein)", TITLE]


def test_the_node_library_lists_it(comfy):
    page = comfy.page
    page.locator(".node-library-tab-button").click()
    page.get_by_placeholder("Search", exact=False).first.fill("in parts")
    folder = page.get_by_role("treeitem").filter(has_text="Skein").filter(has_text=TITLE)
    expect(folder.first).to_be_attached()
    page.locator(".node-library-tab-button").click()


def test_it_shows_what_people_change(added):
    values = added.page.evaluate(VALUES, TITLE)
    assert list(values) == OUTSIDE
    assert values["kernel"] == "auto" and values["residual_diff_threshold"] == -1


def test_it_can_be_opened_and_changed(added):
    """As the next test needs: compiling takes a minute on a CPU, so it is bypassed, inside."""
    added.page.get_by_text("Enter subgraph").click()
    added.wait(f"document.querySelectorAll('[data-node-id]').length === {len(PARTS)}")
    added.page.evaluate(BYPASS)
    added.page.wait_for_timeout(1000)
    added.screenshot("blueprint-inside")
    added.page.evaluate("() => app.extensionManager.command.execute('Comfy.Graph.ExitSubgraph')")
    added.wait(f"app.graph.nodes.some((node) => node.title === {json.dumps(TITLE)})")


def test_it_runs_with_what_is_set_on_its_outside(added):
    """And the panel's slider writes into it."""
    added.page.evaluate(PUT_BETWEEN, TITLE)
    added.page.evaluate(SET, [TITLE, "residual_diff_threshold", 0.5])
    added.page.evaluate(SET, [TITLE, "fp8_mode", "weight_only"])
    prompt = added.page.evaluate("async () => (await app.graphToPrompt()).output")
    parts = {node["class_type"]: node["inputs"] for node in prompt.values() if node["class_type"] in PARTS}
    assert parts["SkeinFirstBlockCache"]["residual_diff_threshold"] == 0.5
    assert parts["SkeinFP8Quantize"]["mode"] == "weight_only" and parts["SkeinAttention"]["kernel"] == "auto"
    assert "SkeinCompile" not in parts

    added.open_panel()
    run = added.run()
    added.wait("app.graph.nodes.find((node) => node.type === 'SaveAnimatedWEBP').imgs?.[0]?.naturalWidth === 192")
    assert len(run["calls"]) == 4 and run["reused"] > 0
    added.move_slider(0.1)
    added.panel.get_by_role("button", name="Write 0.1 into the node").click()
    expect(added.panel.get_by_text(f"0.1 is now in {TITLE}")).to_be_visible()
    assert added.page.evaluate(VALUES, TITLE)["residual_diff_threshold"] == pytest.approx(0.1)
    added.screenshot("blueprint")
    assert added.complaints() == [] and added.foreign_requests() == []
