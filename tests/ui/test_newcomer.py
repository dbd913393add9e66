"""What a newcomer does, in the real browser: search a word, open a template and run it, find the panel, read.

The pictures that `tour.py` makes show the same pages.
"""

import json
import re

import pytest
from comfy_page import SLOW, ComfyPage, skip_older
from playwright.sync_api import expect

import workflows

CLASSIC, VUE = "classic", "vue"
FIRST = 5  # results that are seen without scrolling
WORDS = (
    *("faster", "speed up", "hunyuan", "hunyuan video", "wan", "flux"),
    *("low vram", "vram", "oom", "sage", "raylight", "multi gpu"),
)
# ComfyUI shows names that begin with the word first, the most used before the others, and what only an alias has last.
OUT_OF_REACH = {
    "hunyuan": "six nodes of ComfyUI in use have names that begin with it",
    "hunyuan video": "seven names of ComfyUI's nodes have both words",
    "wan": "seventeen nodes of ComfyUI in use have names that begin with it",
    "flux": "six nodes of ComfyUI have names that begin with it",
}
OUR_CARDS = re.compile("template-workflow-Skein - ")
DEMO = workflows.TEMPLATES["skein_demo"].title
RESULTS = (
    "() => [...document.querySelectorAll('#results-list [role=option]')].map((e) => e.innerText.split('\\n')[0].trim())"
)
ADD_NODES = """() => Object.keys(LiteGraph.registered_node_types).filter((type) => type.startsWith("Skein"))
  .forEach((type, index) => {
    const node = LiteGraph.createNode(type);
    node.pos = [(index % 4) * 460, Math.floor(index / 4) * 420];
    app.graph.add(node);
  })"""
# whether each card shows its texts whole
CARDS_FIT = """(cards) => cards.every((card) => [...card.querySelectorAll("*")]
  .filter((e) => !e.children.length && e.textContent.trim() && getComputedStyle(e).overflow === "hidden")
  .every((e) => e.scrollWidth <= e.clientWidth && e.scrollHeight <= e.clientHeight + 1))"""
# title -> pixels of the title, pixels that it has on the node
TITLES = {
    CLASSIC: """() => Object.fromEntries(app.graph.nodes.map((node) => {
      const context = app.canvas.ctx;
      context.font = node.titleFontStyle;
      const room = node.size[0] - 2 * LiteGraph.NODE_TITLE_HEIGHT; // as LiteGraph cuts a title
      return [node.title, [context.measureText(node.title).width, room]];
    }))""",
    VUE: """() => Object.fromEntries(app.graph.nodes.map((node) => {
      const title = document.querySelector(`[data-node-id="${node.id}"] [data-testid="node-title"]`);
      const inner = [title, ...title.querySelectorAll("*")];
      return [node.title, [Math.max(...inner.map((e) => e.scrollWidth - e.clientWidth)), 0]];
    }))""",
}
# tag -> the least contrast of its text with what lies behind it, by the formula of WCAG 2; on the dark theme, which
# shows a node in its own colour
CONTRAST = """() => {
  const numbers = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const light = (rgb) => {
    const [r, g, b] = rgb.map((v) => v / 255).map((v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (element) => { // layers from the node to the text, each over what is below
    if (element === note.parentElement) return ground;
    const [r, g, b, alpha = 1] = numbers(getComputedStyle(element).backgroundColor);
    return alpha === 1 ? [r, g, b] : behind(element.parentElement).map((v, i) => v + ([r, g, b][i] - v) * alpha);
  };
  const note = [...document.querySelectorAll(".comfy-markdown, .comfy-markdown-content, [data-node-id] .prose")]
    .find((e) => e.innerText.includes("Threshold"));
  const { bgcolor } = app.graph.nodes.find((node) => node.type === "MarkdownNote");
  const ground = bgcolor.match(/[0-9a-f]{2}/g).map((pair) => parseInt(pair, 16));
  const found = {};
  for (const element of note.querySelectorAll("h3, p, li, strong, em, a, code")) {
    const pair = [light(behind(element)), light(numbers(getComputedStyle(element).color).slice(0, 3))].sort();
    const ratio = (Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05);
    const tag = element.tagName.toLowerCase();
    found[tag] = Math.min(found[tag] ?? 99, ratio);
  }
  return found;
}"""


@pytest.fixture(scope="module", params=[CLASSIC, VUE])
def comfy(request, browser, ui_server):
    skip_older(ui_server, "the pages")
    settings = {"Comfy.VueNodes.Enabled": request.param == VUE, "Comfy.Minimap.Visible": False}
    with ComfyPage(browser, ui_server, settings) as page:
        page.renderer = request.param
        yield page


@pytest.fixture
def blank(comfy):
    """The page with nothing on the canvas."""
    comfy.page.evaluate("() => app.extensionManager.command.execute('Comfy.NewBlankWorkflow')")
    comfy.wait("app.graph.nodes.length === 0")
    return comfy


def ours(names):
    return [name for name in names if name.endswith("(Skein)")]


@pytest.mark.parametrize("word", WORDS)
def test_every_version_has_the_word_in_a_name_or_an_alias(ui_server, word):
    own = [node for name, node in ui_server.get("/object_info").items() if name.startswith("Skein")]
    assert any(word in text.lower() for node in own for text in (node["display_name"], *node["search_aliases"]))


def test_a_word_finds_one_of_ours(blank):
    """In the search that a double click on the canvas opens, and in the node library."""
    page, before, first = blank.page, None, {}
    for word in WORDS:
        blank.search(word, 700, 350)
        page.wait_for_function(f"(old) => JSON.stringify(({RESULTS})()) !== old", arg=before)
        before = page.evaluate(f"() => JSON.stringify(({RESULTS})())")
        first[word] = page.evaluate(RESULTS)[:FIRST]
    page.keyboard.press("Escape")
    assert [word for word in WORDS if not ours(first[word])] == [*OUT_OF_REACH], first


def test_a_word_finds_one_of_ours_in_the_node_library(blank):
    page = blank.page
    page.locator(".node-library-tab-button").click()
    box = page.get_by_placeholder("Search", exact=False).first
    for word in (*(word for word in WORDS if word not in OUT_OF_REACH), "skein"):
        box.fill("no node has this")  # without a word all nodes would be drawn
        expect(page.get_by_role("treeitem").filter(has_text="(Skein)")).to_have_count(0)
        box.fill(word)
        expect(page.get_by_role("treeitem").filter(has_text="(Skein)").first).to_be_attached()
    page.locator(".node-library-tab-button").click()


def test_a_title_fits_its_node(blank):
    """As the node comes from the search, with the width that it has then."""
    blank.page.evaluate(ADD_NODES)
    blank.page.wait_for_timeout(1500)  # the Vue nodes are drawn
    found = blank.page.evaluate(TITLES[blank.renderer])
    assert len(found) > 12
    assert [title for title, (wanted, room) in found.items() if wanted > room] == []


@pytest.mark.parametrize("comfy", [CLASSIC], indirect=True)
def test_a_saved_width_stays(blank):
    """Of a node that a new one would be wider than. The Vue nodes have a least width of their own."""
    blank.page.evaluate(ADD_NODES)
    saved = blank.page.evaluate("() => app.graph.serialize()")
    [node] = (node for node in saved["nodes"] if node["type"] == "SkeinReleaseWorkers")
    node["size"][0] -= 10
    blank.open_workflow(saved)
    width = "app.graph.nodes.find((node) => node.type === 'SkeinReleaseWorkers').size[0]"
    assert blank.page.evaluate(f"() => {width}") == pytest.approx(node["size"][0])


@pytest.mark.parametrize("comfy", [CLASSIC], indirect=True)
def test_from_the_template_browser_to_a_picture_in_three_clicks(comfy):
    """Templates, the demo, Run. Two steps of a small video, which is not what is tried here.

    Before the second click, words find our templates. All in one test and one renderer: the page computes for ten
    seconds and more when the template browser opens, and longer beside Vue nodes.
    """
    comfy.page.locator(".templates-tab-button").click()  # click 1
    dialog = comfy.page.get_by_role("dialog")
    box = dialog.get_by_placeholder("Search", exact=False).first
    ours = dialog.get_by_test_id(OUR_CARDS)
    for words in ("skein", "multi gpu", "fast", "low vram"):
        box.fill("a word that no template has")
        expect(ours).to_have_count(0, timeout=SLOW)
        box.fill(words)
        expect(ours.first).to_be_visible(timeout=SLOW)
        assert ours.evaluate_all(CARDS_FIT), words
    box.fill(DEMO)
    dialog.get_by_test_id(f"template-workflow-{DEMO}").click()  # click 2
    expect(dialog).to_be_hidden()
    comfy.wait("app.graph.nodes.some((node) => node.type === 'SkeinDemoModel')")
    comfy.page.evaluate(
        """() => {
          const set = (type, values) => app.graph.nodes.find((node) => node.type === type).widgets
            .forEach((widget) => { if (widget.name in values) widget.value = values[widget.name]; });
          set("KSampler", { steps: 2 });
          set("EmptyHunyuanLatentVideo", { width: 128, height: 128, length: 9 });
        }"""
    )
    comfy.page.get_by_test_id("queue-button").click()  # click 3
    comfy.wait("app.graph.nodes.find((node) => node.type === 'SaveAnimatedWEBP').imgs?.[0]?.naturalWidth === 128")
    comfy.screenshot("newcomer-picture")
    assert comfy.complaints() == [] and comfy.foreign_requests() == []


def test_a_note_can_be_read(comfy):
    """On the dark theme: text has the contrast that WCAG asks of small text."""
    comfy.open_workflow(json.loads(workflows.TEMPLATES["hunyuan_video_t2v_sparse"].path.read_text()))
    comfy.page.evaluate("() => app.extensionManager.command.execute('Comfy.Canvas.FitView')")
    comfy.page.wait_for_timeout(1500)
    contrast = comfy.page.evaluate(CONTRAST)
    assert {"h3", "p", "li", "strong", "em", "a"} <= contrast.keys()
    assert min(contrast.values()) >= 4.5, contrast


def test_the_panel_is_found_without_knowing_its_icon(comfy):
    """By its name, in the menu behind ComfyUI's logo."""
    comfy.open_menu("View", "Skein: show the panel")
    expect(comfy.panel).to_be_visible()
