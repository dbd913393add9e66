"""The nodes' help pages as ComfyUI shows them: English, and Chinese where ComfyUI is set to it."""

import re

import pytest
from comfy_page import CACHE, ComfyPage, demo_workflow
from pack import ROOT
from playwright.sync_api import expect

HELP = ROOT / "web" / "docs"
SELECT = "(type) => app.canvas.selectNode(app.graph.nodes.find((node) => node.type === type))"
# What a page and its pictures are as the front end asks for them: the page's text, and the pictures' widths.
LOAD = """async (file) => {
  const text = await (await fetch(`/extensions/skein/docs/${file}`)).text();
  const pictures = [...text.matchAll(/!\\[[^\\]]+\\]\\(([^)]+)\\)/g)].map((found) => found[1]);
  const widths = pictures.map((picture) => new Promise((done) => {
    const image = new Image();
    image.onload = () => done(image.naturalWidth);
    image.onerror = () => done(0);
    image.src = `/extensions/skein/docs/${picture}`;
  }));
  return [text, await Promise.all(widths)];
}"""


@pytest.fixture
def comfy(browser, ui_server, request):
    with ComfyPage(browser, ui_server, {"Comfy.Locale": getattr(request, "param", "en")}) as page:
        yield page


@pytest.mark.parametrize(
    ("comfy", "text"), [("en", "Choosing a threshold"), ("zh", "如何选择阈值")], indirect=["comfy"], ids=["en", "zh"]
)
def test_the_help_of_a_node_opens_in_the_language_of_the_page(comfy, text):
    page = comfy.page
    comfy.open_workflow(demo_workflow())
    page.evaluate(SELECT, CACHE)
    page.evaluate("() => app.extensionManager.command.execute('Comfy.Canvas.FitView')")
    info = page.get_by_role("button", name=re.compile("Node Info|节点信息"))
    page.get_by_test_id("info-button").or_(info).first.click()
    expect(page.get_by_text(text, exact=False).first).to_be_visible()
    picture = page.locator(f"img[src$='{CACHE}.png']")
    page.wait_for_function("(image) => image.naturalWidth > 0", arg=picture.element_handle())
    comfy.screenshot("help")
    # The front end asks for <node>/en.md first, and takes <node>.md where there is none, as its documentation says.
    assert [said for said in comfy.complaints() if not said[2].endswith("/en.md")] == []


def test_every_help_page_is_served_in_both_languages_with_its_picture(comfy):
    for english in sorted(HELP.glob("*.md")):
        for file in (english.name, f"{english.stem}/zh.md"):
            text, widths = comfy.page.evaluate(LOAD, file)
            assert text.startswith("# ") and text == (HELP / file).read_text(), file
            assert widths and min(widths) >= 480, file  # twice of what the help panel has room for


def test_help_fits_the_panel():
    """A table is cut off there; a large picture makes every install larger."""
    for page in HELP.rglob("*.md"):
        assert not re.search(r"^\|", page.read_text(), re.MULTILINE), page
    for picture in HELP.glob("*.png"):
        assert picture.stat().st_size <= 26_000, picture
