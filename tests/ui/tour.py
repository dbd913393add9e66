#!/usr/bin/env python3
"""Pictures of the pages that a newcomer sees, to be looked at: `python3 scripts/dev.py tests/ui/tour.py [FOLDER]`.

The template browser, the search, a workflow with its note, and the panel after a run, each with the classic and the Vue
nodes, in the dark and the light theme, in Chinese, and at 125 % zoom. FOLDER: tests/ui/out/tour, which git ignores.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT / "tests"), str(ROOT / "tests" / "ui")]

from pack import load_pack  # noqa: E402

load_pack()

from browser import MISSING, find  # noqa: E402
from comfy_page import FLAGS, ComfyPage, demo_workflow  # noqa: E402
from playwright.sync_api import sync_playwright  # noqa: E402
from skein.demo.server import ComfyServer, comfyui_path  # noqa: E402

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
        page.wait_for_timeout(1500)
        page.screenshot(path=folder / f"{name}-{look}.png")

    page.evaluate("() => app.extensionManager.command.execute('Comfy.BrowseTemplates')")
    page.get_by_role("dialog").locator("input").first.fill("skein")
    page.locator('[data-testid^="template-workflow-Skein"] img').first.wait_for()
    picture("templates")
    page.keyboard.press("Escape")
    page.evaluate("() => app.extensionManager.command.execute('Comfy.NewBlankWorkflow')")
    page.wait_for_timeout(500)
    page.mouse.dblclick(560, 300)
    page.get_by_role("combobox").first.fill("speed up")
    picture("search")
    page.keyboard.press("Escape")
    comfy.open_workflow(demo_workflow(steps=4))
    page.evaluate("() => app.extensionManager.command.execute('Comfy.Canvas.FitView')")
    comfy.queue()
    comfy.wait("app.graph.nodes.some((node) => node.imgs?.length)")
    picture("workflow")
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
