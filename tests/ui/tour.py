#!/usr/bin/env python3
"""Pictures of the pages that a newcomer sees, to be looked at: `python3 scripts/dev.py tests/ui/tour.py [FOLDER]`.

The template browser, the search, the subgraph blueprint, a workflow with its note, and the panel after a run, each
with the classic and the Vue nodes, in the dark and the light theme, in Chinese, and at 125 % zoom. FOLDER:
tests/ui/out/tour, which git ignores.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT / "tests"), str(ROOT / "tests" / "ui")]

from pack import load_pack  # noqa: E402

load_pack()

from blueprint import TITLE  # noqa: E402
from browser import MISSING, find  # noqa: E402
from comfy_page import FLAGS, ComfyPage, demo_workflow  # noqa: E402
from playwright.sync_api import sync_playwright  # noqa: E402
from skein.demo.server import ComfyServer, comfyui_path  # noqa: E402

NEAR = """() => { // the cache's node, at a scale at which a person reads
  Object.assign(app.canvas.ds, { scale: 0.9, offset: [-180, 150] });
  app.canvas.setDirty(true, true);
}"""
OUT = ROOT / "tests" / "ui" / "out" / "tour"
VUE, LIGHT = {"Comfy.VueNodes.Enabled": True}, {"Comfy.ColorPalette": "light"}
LOOKS = {  # name -> settings, zoom
    "classic-dark": ({}, 1),
    "classic-light": (LIGHT, 1),
    "vue-dark": (VUE, 1),
    "vue-light": ({**VUE, **LIGHT}, 1),
    "vue-chinese": ({**VUE, "Comfy.Locale": "zh"}, 1),
    "vue-125": (VUE, 1.25),
}


def take(comfy: ComfyPage, folder: Path, look: str) -> None:
    """The pictures of one look."""
    page = comfy.page

    def picture(name: str) -> None:
        page.mouse.move(1, 500)  # away from what would show a tooltip
        page.wait_for_timeout(1500)
        page.screenshot(path=folder / f"{name}-{look}.png")

    page.evaluate("() => app.extensionManager.command.execute('Comfy.BrowseTemplates')")
    page.get_by_role("dialog").locator("input").first.fill("skein")
    page.locator('[data-testid^="template-workflow-Skein"] img').first.wait_for()
    picture("templates")
    page.keyboard.press("Escape")
    page.evaluate("() => app.extensionManager.command.execute('Comfy.NewBlankWorkflow')")
    results = comfy.search("speed up", 560, 300)
    picture("search")
    comfy.put_down(results.filter(has_text=TITLE), TITLE, 560, 300)
    picture("blueprint")
    comfy.open_workflow(demo_workflow(seed=[*LOOKS].index(look), steps=4))  # a seed that ComfyUI has not seen
    page.evaluate("() => app.extensionManager.command.execute('Comfy.Canvas.FitView')")
    comfy.queue()
    comfy.wait("app.graph.nodes.find((node) => node.type === 'SaveAnimatedWEBP').imgs?.length")
    picture("workflow")
    page.evaluate(NEAR)
    comfy.open_panel()
    comfy.wait_for_state("finished")
    picture("panel")


def main(folder: Path = OUT) -> None:
    path = find() or sys.exit(MISSING)
    folder.mkdir(parents=True, exist_ok=True)
    with ComfyServer(comfyui_path()) as server, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        for look, (settings, zoom) in LOOKS.items():
            with ComfyPage(browser, server, settings, device_scale_factor=zoom) as comfy:
                comfy.page.set_viewport_size({"width": round(1400 / zoom), "height": round(900 / zoom)})
                take(comfy, folder, look)
            print(look)
        browser.close()
    print(folder)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
