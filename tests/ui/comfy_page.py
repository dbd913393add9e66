"""ComfyUI's page in a real browser, as the tests use it."""

import json
import re
from collections.abc import Callable
from contextlib import suppress

import pytest
from pack import ROOT
from playwright.sync_api import Browser, Locator, Page, TimeoutError

import workflows

FLAGS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]
SLOW = 150_000  # milliseconds: for what a busy machine may take long for
OPEN_PANEL = "() => app.extensionManager.command.execute('Workspace.ToggleBottomPanelTab.skein')"
# of the panel's list of runs the newest, "" if it has none, and how it stands
NEWEST = """() => [
  document.querySelector(".skein-panel header select").options[1]?.value ?? "",
  document.querySelector(".skein-panel header .skein-state").dataset.state,
]"""
POINTS = ".skein-picture:not([hidden]) :is(circle, path)"  # of the curve, while it is shown
CACHE = "SkeinFirstBlockCache"
WIDGET = "residual_diff_threshold"
SETTINGS = {
    "Comfy.TutorialCompleted": True,
    "Comfy.VueNodes.Enabled": False,
    "Comfy.ColorPalette": "dark",
    "Comfy.Locale": "en",
}
# Of ComfyUI's own start: files of a new user that are not there yet.
NOT_OURS = re.compile(r"/(userdata|user\.css|api/userdata|settings|i18n/|templates/|assets/)|favicon")


class ComfyPage:
    """A page of a server, with what its console said and what it asked of the network."""

    def __init__(self, browser: Browser, server, settings: dict | None = None, **options):
        self.server = server
        server.post("/settings", {**SETTINGS, **(settings or {})})
        self.context = browser.new_context(viewport={"width": 1400, "height": 900}, **options)
        self.page: Page = self.context.new_page()
        self.page.set_default_timeout(SLOW)
        self.console: list[tuple[str, str, str]] = []
        self.requests: list[str] = []
        self.stopped: set[str] = set()  # by the content policy
        self.page.on("console", lambda m: self.console.append((m.type, m.text, m.location.get("url", ""))))
        self.page.on("pageerror", lambda error: self.console.append(("error", str(error), error.stack or "")))
        self.page.on("requestfailed", lambda r: self.stopped.add(r.url) if r.failure == "csp" else None)
        self.page.on("request", lambda request: self.requests.append(request.url))

    def __enter__(self) -> "ComfyPage":
        self.load()
        return self

    def __exit__(self, kind, *_) -> None:
        if kind is not None:
            self.screenshot("failed")
        self.context.close()

    def load(self) -> None:
        self.page.goto(f"http://127.0.0.1:{self.server.port}/")
        self.wait_until_ready()

    def wait_until_ready(self) -> None:
        self.page.wait_for_function("window.app?.graph && app.extensionManager && app.canvas && !app.loading")
        self.page.wait_for_function("document.querySelector('#graph-canvas')?.offsetWidth > 0")

    def open_workflow(self, workflow: dict) -> None:
        self.page.evaluate("(w) => app.loadGraphData(w, true, true, 'test')", workflow)

    def search(self, words: str, x: int, y: int) -> Locator:
        """Open the search by a double click on the canvas, if it is not open, and search; the results."""
        box = self.page.locator("input[aria-controls=results-list]")
        while not box.is_visible():  # the canvas takes no double click while it is set up
            self.page.mouse.dblclick(x, y)
            with suppress(TimeoutError):
                box.wait_for(timeout=3000)
        box.fill(words)
        return self.page.locator("#results-list [role=option]")

    def put_down(self, result: Locator, title: str, x: int, y: int) -> None:
        """Take a result of the search and put it on the canvas: it follows the pointer until a click."""
        result.click()
        node = f"app.graph.nodes.find((node) => node.title === {json.dumps(title)})"
        self.wait(f"{node}?.flags.ghost")
        self.page.wait_for_timeout(1000)  # the search closes
        self.page.mouse.move(x, y - 10)
        self.page.mouse.click(x, y)
        self.wait(f"!{node}.flags.ghost")

    def open_panel(self) -> None:
        self.page.evaluate(OPEN_PANEL)
        self.panel.wait_for()

    @property
    def panel(self):
        return self.page.locator(".skein-panel")

    def queue(self) -> None:
        self.page.evaluate("() => app.queuePrompt(0)")

    def run(self, start: Callable[[], None] | None = None) -> dict:
        """Queue the workflow, or start a run in another way, and wait until the open panel shows the new run, ended. A
        run that is over before the page has drawn it is seen too; one of before is not taken for it."""
        before = [run["id"] for run in self.status()["runs"]]
        (start or self.queue)()
        ended = f"(before) => (([id, state]) => id && !before.includes(id) && state !== 'running')(({NEWEST})())"
        self.page.wait_for_function(ended, arg=before)
        return self.status()["runs"][-1]

    @property
    def points(self) -> int:
        """How many calls the curve shows."""
        return self.page.locator(POINTS).count()

    def wait_for_points(self, count: int) -> None:
        self.wait(f"document.querySelectorAll('{POINTS}').length >= {count}")

    def wait_for_state(self, state: str) -> None:
        """Looks in each frame: a short run is shown as running for less than a second."""
        shown = "(state) => document.querySelector('header .skein-state')?.dataset.state === state"
        self.page.wait_for_function(shown, arg=state, timeout=SLOW)

    def open_menu(self, *names: str) -> None:
        """The menu behind ComfyUI's logo, down to its last name, which is clicked. A submenu that is not drawn yet when
        the pointer comes does not open, and opens when it comes again."""
        *ways, last = (self.page.get_by_role("menuitem", name=name) for name in names)
        self.page.locator(".comfy-menu-button-wrapper").click()
        for way, below in zip(ways, (*ways[1:], last), strict=True):
            way.wait_for()
            while not below.is_visible():
                self.page.mouse.move(0, 0)
                way.hover()
                with suppress(TimeoutError):
                    below.wait_for(timeout=3000)
        last.click()

    def wait(self, condition: str) -> None:
        self.page.wait_for_function(condition)

    def widget(self) -> float:
        """The threshold in the cache's node."""
        find = (
            "([type, name]) => app.graph.nodes.find((n) => n.comfyClass === type).widgets.find((w) => w.name === name)"
        )
        return self.page.evaluate(f"(names) => ({find})(names).value", [CACHE, WIDGET])

    def move_slider(self, value: float) -> None:
        slider = self.panel.get_by_role("slider")
        slider.evaluate(
            "(e, v) => { e.value = v; e.dispatchEvent(new Event('input', { bubbles: true })); }", str(value)
        )

    def status(self) -> dict:
        return self.server.get("/skein/status")

    def screenshot(self, name: str) -> None:
        folder = ROOT / "tests" / "ui" / "out"
        folder.mkdir(exist_ok=True)
        self.page.screenshot(path=folder / f"{name}.png")

    def complaints(self) -> list:
        """What the console said that may be ours: errors, and warnings that name Skein or something deprecated.

        ComfyUI's own page has a few of its own at every start, with and without this pack.
        """
        return [
            (kind, text, where)
            for kind, text, where in self.console
            if not is_comfyuis_own(text, where)
            and (
                kind == "error"
                or "/extensions/skein/" in where
                or any(w in text.lower() for w in ("skein", "deprecat"))
            )
        ]

    def foreign_requests(self) -> list[str]:
        """What was asked of other hosts. ComfyUI's page would ask about the nodes of a workflow that lacks models; its
        own content policy stops that before it leaves."""
        home = (f"http://127.0.0.1:{self.server.port}/", "data:", "blob:")
        return [url for url in self.requests if not url.startswith(home) and url not in self.stopped]


def is_comfyuis_own(text: str, where: str) -> bool:
    return bool(
        (text.startswith("Failed to load resource") and NOT_OURS.search(where))
        or "graph accessed before initialization" in text
        or "legacy queue/history menu is deprecated" in text  # its own, at its own start
        or "input.link is deprecated" in text  # ours is told apart in test_panel.py
        or "ComfyApp.open_maskeditor is deprecated" in text
        # It looks up missing models and unknown packs, and its own policy does not let it.
        or ("Content Security Policy" in text and "/assets/" in where)
    )


def skip_older(server, known: str) -> None:
    """known: what the tests know of ComfyUI 0.30's front end, and older ones have otherwise."""
    version = server.get("/system_stats")["system"]["comfyui_version"]
    if tuple(map(int, version.split(".")[:2])) < (0, 30):
        pytest.skip(f"these tests know {known} of ComfyUI 0.30's front end, not of older ones")


def demo_workflow(seed: int = 7, steps: int = 12) -> dict:
    """The shipped demo on the canvas, small enough for a CPU under load."""
    workflow = json.loads(workflows.TEMPLATES["skein_demo"].path.read_text())
    nodes = {node["type"]: node for node in workflow["nodes"]}
    nodes["KSampler"]["widgets_values"][0], nodes["KSampler"]["widgets_values"][2] = seed, steps
    nodes["EmptyHunyuanLatentVideo"]["widgets_values"] = [192, 192, 17, 1]
    return workflow
