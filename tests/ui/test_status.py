"""What nodes say, in the language of the page: the Chinese texts are in statuses.json and locales/zh. Help pages quote
them."""

import json
import re
from pathlib import Path

import pytest
from comfy_page import CACHE, ComfyPage, demo_workflow
from pack import ROOT

ACTIVITY = re.compile(r'\b(?:activity|within)\("([^"]+)"\)')
CHINESE = json.loads((ROOT / "locales" / "zh" / "main.json").read_text())["skein_status"]
STATUSES = json.loads(Path(__file__).with_name("statuses.json").read_text())  # English -> Chinese
SAID = """async ([translations, texts]) => {
  const { say, sayBy } = await import('/extensions/skein/status.js');
  sayBy(translations);
  return texts.map(say);
}"""
ON_THE_NODE = """([type, text]) => app.graph.nodes.find((node) => node.type === type)
  .widgets.some((widget) => widget.name === '$$node-text-preview' && widget.value.includes(text))"""


def test_parts_are_translated_and_the_rest_stays(browser, ui_server):
    """Lists, values that are texts themselves, and what has no translation."""
    with ComfyPage(browser, ui_server) as comfy:
        said = comfy.page.evaluate(SAID, [CHINESE, [*STATUSES]])
        assert dict(zip(STATUSES, said)) == STATUSES
        assert comfy.page.evaluate(SAID, [CHINESE, said]) == said  # or a status would be sent again and again


@pytest.mark.parametrize("vue", [False, True])
def test_a_node_and_the_panel_say_it_in_chinese(browser, ui_server, vue):
    calls, reused = 4 + vue, "{reused}"
    counts = CHINESE["{calls} model calls"].format(calls=calls)
    expected = CHINESE["{computed} computed, {reused} reused, about {times}x as fast"].partition(reused)[0]
    with ComfyPage(browser, ui_server, {"Comfy.Locale": "zh", "Comfy.VueNodes.Enabled": vue}) as comfy:
        comfy.open_workflow(demo_workflow(seed=23, steps=calls))
        comfy.open_panel()
        comfy.queue()
        comfy.page.wait_for_function(ON_THE_NODE, arg=[CACHE, counts])
        assert comfy.page.evaluate(ON_THE_NODE, [CACHE, expected.partition("{")[0]])
        comfy.screenshot(f"status-chinese-{'vue' if vue else 'classic'}")
        if vue:  # what a person sees; the other nodes are painted
            comfy.page.get_by_text(counts).first.wait_for()
        assert comfy.complaints() == []


def test_every_activity_that_is_told_has_a_translation():
    sources = [path.read_text() for path in ROOT.glob("*.py")] + [path.read_text() for path in ROOT.glob("[a-z]*/*.py")]
    told = {text for source in sources for text in ACTIVITY.findall(source)}
    assert len(told) >= 5 and told <= CHINESE.keys()
