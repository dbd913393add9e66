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
from help_pictures import SCALE, draw_help  # noqa: E402
from PIL import Image  # noqa: E402
from playwright.sync_api import Browser, sync_playwright  # noqa: E402
from skein.demo.run import WORKFLOW  # noqa: E402
from skein.demo.server import ComfyServer, comfyui_path  # noqa: E402
from test_workers import sampling  # noqa: E402

VUE = {"Comfy.VueNodes.Enabled": True, "Comfy.Minimap.Visible": False}
PLAIN = {"Comfy.NodeBadge.NodeSourceBadgeMode": "None"}
HELP = ROOT / "web" / "docs"
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


def draw_panel(comfy: ComfyPage) -> None:
    """The panel in the middle of a run."""
    comfy.open_workflow(demo_workflow(steps=24))
    comfy.page.evaluate(SHOW_CACHE)
    comfy.open_panel()
    comfy.queue()
    comfy.wait_for_state("running")
    comfy.wait_for_points(15)
    save(comfy.page.screenshot(), ROOT / "docs" / "panel.png")
    comfy.wait_for_state("finished")


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


def draw_runs(browser: Browser, server: ComfyServer) -> None:
    with ComfyPage(browser, server, VUE) as comfy:
        draw_panel(comfy)
    with ComfyPage(browser, server, {**VUE, "Comfy.ColorPalette": "light"}) as comfy:
        draw_slider(comfy)
    with ComfyPage(browser, server, VUE) as comfy:
        draw_workers(comfy, server)


def main(names: list[str]) -> None:
    """names: of the nodes whose pictures are renewed; none: all pictures."""
    path = find() or sys.exit(MISSING)
    with ComfyServer(comfyui_path()) as server, sync_playwright() as playwright:
        own = sorted(name for name in server.get("/object_info") if name.startswith("Skein"))
        if unknown := sorted({*names} - {*own}):
            sys.exit(f"There is no node called {', '.join(unknown)}; these have a help picture: {', '.join(own)}.")
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        with ComfyPage(browser, server, {**VUE, **PLAIN}, device_scale_factor=SCALE) as comfy:
            for name, picture in draw_help(comfy, server, names or own).items():
                save(picture, HELP / f"{name}.png")
        if not names:
            draw_runs(browser, server)
        browser.close()


if __name__ == "__main__":
    main(sys.argv[1:])
