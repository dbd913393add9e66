"""Nodes of the shipped workflows stand apart on the canvas: in both renderers, with advanced inputs hidden or shown,
and with the status line that a run adds to a node."""

import json
from itertools import combinations

import pytest
from comfy_page import ComfyPage, skip_older
from PIL import Image

import workflows

STATUS = 60  # pixels of height that a status line takes
CLASSIC, VUE = "classic", "vue"
# title -> [left, top, right, bottom], in pixels of the canvas at a scale of 1, the title bar included.
RECTANGLES = {
    CLASSIC: """() => Object.fromEntries(app.graph.nodes.map((node) => {
      const least = node.computeSize(), [x, y] = node.pos;
      const width = Math.max(node.size[0], least[0]), height = Math.max(node.size[1], least[1]);
      return [`${node.id} ${node.title}`, [x, y - LiteGraph.NODE_TITLE_HEIGHT, x + width, y + height]];
    }))""",
    VUE: """() => Object.fromEntries(app.graph.nodes.map((node) => {
      const box = document.querySelector(`[data-node-id="${node.id}"]`).getBoundingClientRect();
      const sides = [box.left, box.top, box.right, box.bottom].map((side) => side / app.canvas.ds.scale);
      return [`${node.id} ${node.title}`, sides];
    }))""",
}
DRAWN = (
    '() => app.graph.nodes.every((node) => document.querySelector(`[data-node-id="${node.id}"]`)?.offsetHeight > 30)'
)
TOGGLE = "() => app.graph.nodes.filter((n) => n.widgets?.some((w) => w.advanced)).forEach((n) => n.toggleAdvanced())"


@pytest.fixture(scope="module", params=[CLASSIC, VUE])
def comfy(request, browser, ui_server):
    skip_older(ui_server, "the Vue nodes and the advanced inputs")
    Image.new("RGB", (640, 360)).save(ui_server.base / "input" / "example.png")  # what image-to-video starts from
    with ComfyPage(browser, ui_server, {"Comfy.VueNodes.Enabled": request.param == VUE}) as page:
        page.page.set_viewport_size({"width": 2400, "height": 1400})
        page.renderer = request.param
        yield page


def open_workflow(comfy, name):
    """Open a workflow, in view as a whole; the rectangles of its nodes."""
    page = comfy.page
    comfy.open_workflow(json.loads(workflows.TEMPLATES[name].path.read_text()))
    page.evaluate("() => app.extensionManager.command.execute('Comfy.Canvas.FitView')")
    if comfy.renderer == VUE:
        page.wait_for_function(DRAWN)
    page.wait_for_timeout(1000)  # pictures, and the nodes' own measurements
    return rectangles(comfy, name)


def show_advanced(comfy, name):
    """Show the advanced inputs of the nodes of the workflow that is open; the rectangles."""
    page = comfy.page
    if comfy.renderer == VUE:
        for button in page.get_by_test_id("advanced-inputs-button").all():
            button.dispatch_event("click")
    else:
        page.evaluate(TOGGLE)
    page.wait_for_timeout(500)
    return rectangles(comfy, f"{name}-advanced")


def rectangles(comfy, picture):
    comfy.screenshot(f"layout-{picture}-{comfy.renderer}")
    return comfy.page.evaluate(RECTANGLES[comfy.renderer])


def overlap(one, other):
    """Pixels that two rectangles share, across and down, each with its status line."""
    across = min(one[2], other[2]) - max(one[0], other[0])
    down = min(one[3], other[3]) + STATUS - max(one[1], other[1])
    return (round(across), round(down)) if across > 0 and down > 0 else None


def overlapping(nodes):
    shared = {(a, b): overlap(nodes[a], nodes[b]) for a, b in combinations(nodes, 2)}
    return {pair: size for pair, size in shared.items() if size}


def height(nodes):
    """Of all nodes together."""
    return sum(bottom - top for _, top, _, bottom in nodes.values())


@pytest.mark.parametrize("name", workflows.names())
def test_no_two_nodes_overlap(comfy, name):
    """Neither as the workflow opens nor with advanced inputs shown."""
    nodes = open_workflow(comfy, name)
    assert len(nodes) == len(json.loads(workflows.TEMPLATES[name].path.read_text())["nodes"])
    assert overlapping(nodes) == {}
    advanced = show_advanced(comfy, name)
    assert overlapping(advanced) == {}
    if comfy.renderer == VUE:  # they are really shown; the classic canvas shows them always
        assert height(advanced) > height(nodes) + 40
