"""The shipped workflows in ComfyUI's template browser."""

import json

import pytest
from comfy_page import ComfyPage, skip_older
from PIL import Image
from playwright.sync_api import expect

import workflows

NODES = """() => ({
  kinds: app.graph.nodes.map((node) => node.type),
  unknown: app.graph.nodes.filter((node) => !LiteGraph.registered_node_types[node.type]).map((node) => node.type),
  loose: [...app.graph.links.values()].filter((link) => !app.graph.getNodeById(link.origin_id)
    || !app.graph.getNodeById(link.target_id)).length,
  links: [...app.graph.links.values()].length,
})"""


@pytest.fixture(scope="module")
def comfy(browser, ui_server):
    skip_older(ui_server, "the dialogs")
    Image.new("RGB", (64, 64)).save(ui_server.base / "input" / "example.png")  # what image-to-video starts from
    with ComfyPage(browser, ui_server) as page:
        yield page


@pytest.mark.parametrize("name", workflows.names())
def test_a_template_opens(comfy, name):
    """With its thumbnail, without a missing node or a broken link; ComfyUI lists the models to download."""
    page = comfy.page
    page.evaluate("() => app.extensionManager.command.execute('Comfy.BrowseTemplates')")
    dialog = page.get_by_role("dialog")
    dialog.get_by_text("skein", exact=True).click()
    card = dialog.get_by_test_id(f"template-workflow-{workflows.TEMPLATES[name].title}")
    card.scroll_into_view_if_needed()
    picture = card.locator("img").first
    expect(picture).to_be_visible()
    page.wait_for_function("(image) => image.naturalWidth >= 200", arg=picture.element_handle())
    card.locator("img").first.click()
    expect(dialog).to_be_hidden()

    workflow = json.loads(workflows.TEMPLATES[name].path.read_text())
    page.wait_for_function("(count) => app.graph.nodes.length === count", arg=len(workflow["nodes"]))
    opened = page.evaluate(NODES)
    assert opened["unknown"] == [] and opened["loose"] == 0
    assert sorted(opened["kinds"]) == sorted(node["type"] for node in workflow["nodes"])
    assert opened["links"] == len(workflow["links"])
    expect(page.get_by_text("missing node", exact=False)).to_have_count(0)

    models = [m for node in workflow["nodes"] for m in node.get("properties", {}).get("models", [])]
    if models:
        page.get_by_role("button", name="View details").first.click()
        overview = page.locator("body")
        for model in models:
            expect(overview).to_contain_text(model["name"])
    comfy.screenshot(f"template-{name}")
    assert comfy.complaints() == [] and comfy.foreign_requests() == []


def test_a_workflow_with_an_input_that_is_gone_opens_with_its_settings(comfy):
    """Compile's cache_folder was the last of its widgets, whose values are kept by their order."""
    workflow = json.loads(workflows.TEMPLATES["hunyuan_video_t2v_fast"].path.read_text())
    node = next(node for node in workflow["nodes"] if node["type"] == "SkeinCompile")
    node["widgets_values"] = ["max-autotune-no-cudagraphs", "on", False, "/a/folder"]
    comfy.open_workflow(workflow)
    prompt = comfy.page.evaluate("async () => (await app.graphToPrompt()).output")
    (inputs,) = (each["inputs"] for each in prompt.values() if each["class_type"] == "SkeinCompile")
    values = {name: value for name, value in inputs.items() if name != "model"}
    assert values == {"mode": "max-autotune-no-cudagraphs", "dynamic": "on", "warm_up": False}
    assert comfy.complaints() == []
