#!/usr/bin/env python3
"""Renew the pictures in docs/ and web/docs/ from the real thing: `make screenshots`. Takes a few minutes on a CPU.

    python3 scripts/dev.py tests/ui/screenshots.py SkeinAttention ...

renews only the pictures of these nodes.
"""

import io
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT / "tests"), str(ROOT / "tests" / "ui")]

from pack import load_pack  # noqa: E402

load_pack()

from browser import MISSING, find  # noqa: E402
from comfy_page import FLAGS, ComfyPage, demo_workflow  # noqa: E402
from PIL import Image  # noqa: E402
from playwright.sync_api import Browser, sync_playwright  # noqa: E402
from skein.demo.run import WORKFLOW  # noqa: E402
from skein.demo.server import ComfyServer, comfyui_path  # noqa: E402
from skein.picture import draw_run  # noqa: E402
from skein.runs import Call, Run  # noqa: E402
from test_workers import sampling  # noqa: E402

VUE = {"Comfy.VueNodes.Enabled": True, "Comfy.Minimap.Visible": False}
HELP = ROOT / "web" / "docs"
OF_A_RUN = ("SkeinFirstBlockCache", "SkeinCacheReport")  # their help pages show a run, not the node
ADD_NODE = """(type) => {
  for (const old of [...app.graph.nodes]) app.graph.remove(old);
  const node = LiteGraph.createNode(type);
  node.pos = [500, 300];
  app.graph.add(node);
  app.canvas.ds.scale = 1;
  app.canvas.ds.offset = [0, 0];
  app.canvas.setDirty(true, true);
  return node.id;
}"""
SHOW_CACHE = """() => {
  app.canvas.ds.scale = 0.62;
  app.canvas.ds.offset = [-100, 130];
  app.canvas.setDirty(true, true);
}"""


def save(picture: bytes | Image.Image, path: Path) -> None:
    """As a PNG of 256 colours: a third of the size."""
    image = Image.open(io.BytesIO(picture)) if isinstance(picture, bytes) else picture
    image.convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(path, optimize=True)
    print(path.relative_to(ROOT), path.stat().st_size)


def draw_panel(comfy: ComfyPage, server: ComfyServer) -> None:
    """The panel in the middle of a run, the slider on a finished one, and the cache's help and report."""
    comfy.open_workflow(demo_workflow(steps=24))
    comfy.page.evaluate(SHOW_CACHE)
    comfy.open_panel()
    comfy.queue()
    comfy.wait_for_points(15)
    save(comfy.page.screenshot(), ROOT / "docs" / "panel.png")
    comfy.wait_for_state("finished")
    run = comfy.status()["runs"][-1]
    save(comfy.page.locator(".skein-main").screenshot(), HELP / "SkeinFirstBlockCache.png")
    drawn = Run([Call(**call) for call in run["calls"]], limit=run["limit"], accumulate=run["accumulate"])
    save(draw_run(drawn), HELP / "SkeinCacheReport.png")


def draw_slider(comfy: ComfyPage) -> None:
    comfy.open_workflow(demo_workflow(steps=24))
    comfy.page.evaluate(SHOW_CACHE)
    comfy.open_panel()
    comfy.move_slider(0.1)
    save(comfy.page.screenshot(), ROOT / "docs" / "panel_slider.png")


def draw_workers(comfy: ComfyPage, server: ComfyServer) -> None:
    comfy.page.set_viewport_size({"width": 1400, "height": 1150})
    comfy.open_workflow(demo_workflow())
    comfy.page.evaluate(SHOW_CACHE)
    server.submit(sampling(json.loads(WORKFLOW.read_text()), seed=7, steps=24))
    comfy.open_panel()
    comfy.wait("document.querySelectorAll('.skein-card').length === 3")
    comfy.wait_for_state("running")
    comfy.wait_for_points(12)
    save(comfy.page.screenshot(), ROOT / "docs" / "panel_workers.png")
    server.interrupt()


def draw_nodes(comfy: ComfyPage, names: list[str]) -> None:
    """Each node as it stands on the canvas."""
    for name in names:
        number = comfy.page.evaluate(ADD_NODE, name)
        node = comfy.page.locator(f"[data-node-id='{number}']")
        node.wait_for()
        comfy.page.mouse.move(900, 700)
        save(node.screenshot(), HELP / f"{name}.png")


def draw_runs(browser: Browser, server: ComfyServer) -> None:
    with ComfyPage(browser, server, VUE) as comfy:
        draw_panel(comfy, server)
    with ComfyPage(browser, server, {**VUE, "Comfy.ColorPalette": "light"}) as comfy:
        draw_slider(comfy)
    with ComfyPage(browser, server, VUE) as comfy:
        draw_workers(comfy, server)


def main(names: list[str]) -> None:
    """names: of the nodes whose pictures are renewed; none: all pictures."""
    path = find() or sys.exit(MISSING)
    with ComfyServer(comfyui_path()) as server, sync_playwright() as playwright:
        own = sorted(name for name in server.get("/object_info") if name.startswith("Skein") and name not in OF_A_RUN)
        if unknown := sorted({*names} - {*own}):
            sys.exit(f"There is no picture of {', '.join(unknown)} as a node; these have one: {', '.join(own)}.")
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        with ComfyPage(browser, server, VUE) as comfy:
            draw_nodes(comfy, names or own)
        if not names:
            draw_runs(browser, server)
        browser.close()


if __name__ == "__main__":
    main(sys.argv[1:])
