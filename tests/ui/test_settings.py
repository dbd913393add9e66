"""The panel without its icon, Skein's settings, and what the panel says of errors, buttons and two runs."""

import json

from comfy_page import OPEN_PANEL, SLOW, ComfyPage, demo_workflow
from graphs import seeded
from pack import ROOT
from PIL import Image
from playwright.sync_api import expect

COMMANDS = "() => app.extensionManager.command.commands.filter((c) => c.id.startsWith('Skein.')).map((c) => c.label)"
SHORTCUT = "Alt+k"
NEW_NODE = """(type) => {
  const node = LiteGraph.createNode(type);
  app.graph.add(node);
  return node.widgets.find((widget) => widget.name === 'devices').value;
}"""
FAIL = """([error, started]) => app.api.dispatchEvent(new CustomEvent('skein.state', { detail: {
  version: Date.now() * 10, time: Date.now() / 1000, processes: [], runs: [], sparse: [],
  sampling: {
    running: false, techniques: ['cache'], notes: {}, calls: 3, error, started, ended: started + 9, step: 1, steps: 30,
    expected_end: null, expected_bytes: null, activity: null, workflow_id: app.graph.id,
    node_id: String(app.graph.nodes.find((node) => node.type === 'KSampler').id),
  },
} }))"""


def test_by_command_and_key_and_at_a_run(browser, ui_server):
    with ComfyPage(browser, ui_server) as comfy:
        assert comfy.page.evaluate(COMMANDS) == ["Skein: show the panel"]
        comfy.page.locator("#graph-canvas").focus()
        comfy.page.keyboard.press(SHORTCUT)
        comfy.panel.wait_for()
        comfy.page.keyboard.press(SHORTCUT)
        comfy.panel.wait_for(state="detached")
        comfy.open_workflow(demo_workflow(seed=71, steps=4))
        comfy.queue()
        assert comfy.panel.count() == 0  # off by default
        assert comfy.complaints() == []
    with ComfyPage(browser, ui_server, {"Skein.Panel.OpenAtRun": True}) as comfy:
        comfy.open_workflow(demo_workflow(seed=72, steps=4))
        comfy.queue()
        comfy.panel.wait_for()
        comfy.wait_for_points(4)
        assert comfy.complaints() == []
    ui_server.post("/settings", {"Skein.Panel.OpenAtRun": False})


def test_new_nodes_have_the_default_devices_and_those_of_a_workflow_keep_theirs(browser, ui_server):
    with ComfyPage(browser, ui_server, {"Skein.Nodes.Devices": "0,1"}) as comfy:
        assert comfy.page.evaluate(NEW_NODE, "SkeinContextParallel") == "0,1"
        assert comfy.page.evaluate(NEW_NODE, "SkeinVAEDecodeParallel") == "0,1"
        saved = comfy.page.evaluate("() => app.graph.serialize()")
        for node in saved["nodes"]:
            node["widgets_values"] = ["2,3" if value == "0,1" else value for value in node.get("widgets_values") or []]
        comfy.open_workflow(saved)
        values = "() => app.graph.nodes.map((n) => n.widgets?.find((w) => w.name === 'devices')?.value).filter(Boolean)"
        assert comfy.page.evaluate(values) == ["2,3", "2,3"]
        assert comfy.complaints() == []
    ui_server.post("/settings", {"Skein.Nodes.Devices": "all"})


def test_the_command_and_the_settings_in_chinese(browser, ui_server):
    chinese = json.loads((ROOT / "locales" / "zh" / "settings.json").read_text())
    served = ui_server.get("/i18n")["zh"]
    assert served["settings"]["Skein_Panel_OpenAtRun"] == chinese["Skein_Panel_OpenAtRun"]
    with ComfyPage(browser, ui_server, {"Comfy.Locale": "zh"}) as comfy:
        comfy.page.keyboard.press("Control+,")
        comfy.page.get_by_text("Skein", exact=True).first.click()
        expect(comfy.page.get_by_text(chinese["Skein_Panel_OpenAtRun"]["name"])).to_be_visible()
        expect(comfy.page.get_by_text(chinese["Skein_Nodes_Devices"]["name"])).to_be_visible()
        comfy.screenshot("settings-chinese")
        assert comfy.complaints() == []


def test_an_error_says_whose_it_is_and_can_be_closed(browser, ui_server):
    with ComfyPage(browser, ui_server) as comfy:
        comfy.open_workflow(demo_workflow(seed=73))
        comfy.page.evaluate(OPEN_PANEL)
        comfy.wait("document.querySelector('.skein-panel')?.dataset.connection === 'ready'")
        banner = comfy.page.locator(".skein-banner")
        comfy.page.evaluate(FAIL, ["no room", 1000])
        expect(banner).to_contain_text("KSampler in test: no room")
        banner.get_by_role("button", name="Close").click()
        expect(banner).to_be_hidden()
        comfy.page.evaluate(FAIL, ["no room", 1000])  # told again with the next change
        comfy.page.wait_for_timeout(1500)
        expect(banner).to_be_hidden()
        comfy.page.evaluate(FAIL, ["again", 2000])
        expect(banner).to_contain_text("again")
        assert comfy.complaints() == []


def test_in_a_small_window_two_runs_and_a_saved_report(browser, ui_server, prompt, tmp_path):
    ui_server.run(seeded(prompt, 74))
    with ComfyPage(browser, ui_server) as comfy:
        comfy.page.set_viewport_size({"width": 1120, "height": 720})
        comfy.open_workflow(demo_workflow(seed=75))
        comfy.open_panel()
        run, behind = comfy.run(), comfy.status()["runs"][-2]
        comfy.move_slider(0.1)
        main = comfy.page.locator(".skein-main")
        assert main.evaluate("(e) => e.scrollHeight - e.clientHeight") <= 0  # all of it is seen
        label, points = comfy.page.locator(".skein-threshold-label"), comfy.page.locator(".skein-drawing circle")
        ends = points.evaluate_all("(all) => Math.max(...all.map((e) => e.getBoundingClientRect().right))")
        assert label.bounding_box()["x"] > ends

        comfy.panel.get_by_label("Compare with").select_option(behind["id"])
        known = [call for call in behind["calls"] if call["change"] is not None]
        expect(comfy.page.locator(".skein-behind")).to_have_count(1)
        assert comfy.page.locator(".skein-behind").evaluate("(e) => e.points.length") == len(known)
        expect(comfy.page.locator(".skein-key-behind")).to_contain_text(f"{behind['reused']} of")
        comfy.screenshot("two-runs")

        files = []
        comfy.page.on("download", lambda file: files.append(file))
        comfy.panel.get_by_role("button", name="Save report").click()
        message = comfy.page.locator(".skein-buttons .skein-message")
        expect(message).to_contain_text("in the downloads", timeout=SLOW)
        for file in files:
            file.save_as(tmp_path / file.suggested_filename)
        [picture], [numbers] = tmp_path.glob("*.png"), tmp_path.glob("*.json")
        assert Image.open(picture).size == (960, 480)
        assert json.loads(numbers.read_text())["run"]["id"] == run["id"]
        expect(message).to_be_hidden(timeout=SLOW)  # gone by itself
        assert comfy.widget() == 0.06 and comfy.complaints() == []
