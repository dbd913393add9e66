"""The pictures of the help pages: each node in its place, between the nodes before and after it, with what it shows
after a run. Help pages are read in a narrow panel: a picture is made for about 240 pixels, at twice that width.
"""

import copy
import io
import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from comfy_page import ComfyPage
from PIL import Image
from skein.demo.run import CACHE_NODE, WORKFLOW, node_id
from skein.demo.server import ComfyServer
from skein.demo.video import read_frames
from skein.picture import draw_run
from skein.runs import Call, Run

SCALE = 2  # of the page that they are taken from
NODE_WIDTH, GAP, MARGIN = 225, 56, 12  # on the canvas; GAP: to the node below
WIDTH = SCALE * (NODE_WIDTH + 2 * MARGIN)  # of the pictures, in pixels
FRAMES = 4  # of a video, below the picture
LOADER, SAMPLER = "UNETLoader", "KSampler"
COMPILE, PREVIEW, REPORT = "SkeinCompile", "SkeinLatentVideoPreview", "SkeinCacheReport"
SPEED_UP = "SkeinSpeedUp"
DIFFUSERS = "HunyuanVideo"  # a folder in diffusers' format

# What nodes that need a GPU have said, on H100s with random weights. KERNEL, FP8 and SPARSE (at that density): under
# `-m bench.step --densities 0.5` on one, HunyuanVideo 13 B, 720p x 129 frames. CALLS and DECODED: the seconds that
# `-m bench.scaling` and `-m bench.vae` printed on two (docs/BENCHMARKS.md), in the nodes' words.
KERNEL = (
    "FlashAttention-3 runs: the fastest of FlashAttention-3 32.09 ms, FlashAttention-4 35.16 ms, cuDNN attention "
    "43.24 ms, FlashAttention-2 65.43 ms on 16384 queries"
)
SPARSE = "50 % of attention computed, 0.3 % error, attention 1.9x as fast"
FP8 = "FP8: 25.6 -> 13.2 GB in 3.3 s (per row, 320 layers)"
DECODED = "whole on 0, 1, 6.6 s"
CALLS = "4 calls on 0, 1: 9.14 s each"


@dataclass(frozen=True)
class Place:
    """Where a node stands: types of the nodes before and after it. said: what it shows after a run."""

    before: tuple[str, ...] = (LOADER,)
    after: str | None = SAMPLER
    said: str = ""
    values: dict = field(default_factory=dict)  # of widgets


PLACES = {
    REPORT: Place((CACHE_NODE, SAMPLER), None),
    SPEED_UP: Place(),  # said by a run of the demo model
    "SkeinAttention": Place(said=KERNEL),
    COMPILE: Place(),  # as well
    "SkeinContextParallel": Place(said=CALLS),
    "SkeinDemoModel": Place(()),
    "SkeinDemoPrompt": Place(()),
    "SkeinFP8Quantize": Place(said=FP8),
    "SkeinFP8TextEncoder": Place(("DualCLIPLoader",), "CLIPTextEncode"),
    CACHE_NODE: Place(),  # as well
    PREVIEW: Place((LOADER, SAMPLER), None, values={"scale": 8}),
    "SkeinLoadDiffusersTransformer": Place((), values={"model_name": DIFFUSERS}),
    "SkeinReleaseWorkers": Place((SAMPLER,), "VAEDecode"),
    "SkeinSparseAttention": Place(said=SPARSE),
    "SkeinVAEDecodeParallel": Place((SAMPLER, "VAELoader"), "CreateVideo", said=DECODED),
}

# Puts a node on an empty canvas, with its neighbours above and below it, and links them.
STAND = """([type, before, after, values, width, gap]) => {
  for (const old of [...app.graph.nodes]) app.graph.remove(old);
  const add = (type, collapsed) => {
    const node = LiteGraph.createNode(type);
    app.graph.add(node);
    node.setSize([width, node.computeSize()[1]]);
    if (collapsed) node.collapse(true);
    return node;
  };
  const link = (from, to) => {
    const fits = (output) => to.inputs.findIndex((input) => !input.widget && input.type === output.type);
    const slot = from.outputs.findIndex((output) => fits(output) >= 0);
    from.connect(slot, to, fits(from.outputs[slot]));
  };
  const node = add(type, false);
  for (const widget of node.widgets ?? []) if (widget.name in values) widget.value = values[widget.name];
  node.pos = [300, 240];
  const others = before.map((type, i) => {
    const other = add(type, true);
    other.pos = [300, 240 - gap - 40 * (before.length - i)];
    link(other, node);
    return other;
  });
  if (after) {
    others.push(add(after, true));
    link(node, others.at(-1));
  }
  app.canvas.background_image = null; // no grid: a link is easier to follow
  app.canvas.ds.scale = 1;
  app.canvas.ds.offset = [0, 0];
  app.canvas.setDirty(true, true);
  return [node.id, ...others.map((each) => each.id)];
}"""
SAY = "([nodeId, text]) => app.api.dispatchCustomEvent('progress_text', { nodeId, text })"
# The node below it follows when the node is as tall as what it shows makes it.
FOLLOW = """([above, below, gap]) => {
  const box = document.querySelector(`[data-node-id='${above}']`).getBoundingClientRect();
  const node = app.graph.getNodeById(below);
  node.pos = [300, box.bottom - app.canvas.canvas.getBoundingClientRect().top + gap];
  app.canvas.setDirty(true, true);
}"""


def draw_help(comfy: ComfyPage, server: ComfyServer, names: list[str]) -> dict[str, Image.Image]:
    """The pictures of these nodes' help pages. comfy: a page with Vue nodes, SCALE pixels to one of the page."""
    said, run, frames = run_demo(server)
    in_diffusers_format(server.base / "models" / "diffusers" / DIFFUSERS)
    comfy.page.evaluate("() => app.refreshComboInNodes()")
    pictures = {}
    for name in names:
        place = PLACES.get(name, Place())
        picture = draw_place(comfy, name, place, said.get(name) or place.said)
        if name == PREVIEW:
            picture = below(picture, row_of(frames))
        if name == REPORT:
            picture = below(picture, draw_run(run, WIDTH, WIDTH * 3 // 5))
        pictures[name] = picture
    return pictures


def in_diffusers_format(folder: Path) -> None:
    """A pipeline's folder, as the list of models looks at it."""
    (folder / "transformer").mkdir(parents=True)
    (folder / "model_index.json").write_text("{}")


def run_demo(server: ComfyServer) -> tuple[dict[str, str], Run, np.ndarray]:
    """The demo model compiled, under Speed Up, and under the cache: what the nodes said last, by type; the cache's run;
    the video."""
    prompt = json.loads(WORKFLOW.read_text())
    compiled = copy.deepcopy(prompt)
    compiled[node_id(prompt, SAMPLER)]["inputs"].update(steps=2)
    cache = compiled[node_id(prompt, CACHE_NODE)]["inputs"]
    compiled[COMPILE] = {"class_type": COMPILE, "inputs": {"model": cache["model"]}}
    cache["model"] = [COMPILE, 0]
    sped_up = copy.deepcopy(prompt)
    chooses = sped_up[node_id(prompt, CACHE_NODE)]
    chooses.update(class_type=SPEED_UP, inputs={"model": chooses["inputs"]["model"]})
    said = {}

    def run_and_listen(prompt: dict) -> dict:
        def listen(event: dict) -> None:
            if event["type"] == "progress_text":
                said[prompt[event["data"]["node"]]["class_type"]] = event["data"]["text"]

        return server.run(prompt, listen)

    run_and_listen(compiled)
    run_and_listen(sped_up)
    outputs = run_and_listen(prompt)
    run = server.get("/skein/runs")["runs"][-1]
    recorded = Run([Call(**call) for call in run["calls"]], limit=run["limit"], accumulate=run["accumulate"])
    video = server.file(outputs[node_id(prompt, "SaveAnimatedWEBP")]["images"][0])
    return said, recorded, read_frames(video)


def draw_place(comfy: ComfyPage, name: str, place: Place, said: str) -> Image.Image:
    """A node between its neighbours."""
    page = comfy.page
    arguments = [name, place.before, place.after, place.values, NODE_WIDTH, GAP]
    node, *others = page.evaluate(STAND, arguments)
    box = page.locator(f"[data-node-id='{node}']")
    box.wait_for()
    if said:
        page.evaluate(SAY, [str(node), said])
        box.get_by_text(said.splitlines()[0]).wait_for()
    if place.after:
        page.evaluate(FOLLOW, [node, others[-1], GAP])
    page.mouse.move(900, 700)
    page.wait_for_timeout(500)  # links are drawn in the next frames
    boxes = [page.locator(f"[data-node-id='{each}']").bounding_box() for each in (node, *others)]
    top, bottom = min(each["y"] for each in boxes), max(each["y"] + each["height"] for each in boxes)
    clip = {
        "x": boxes[0]["x"] - MARGIN,
        "y": top - MARGIN,
        "width": WIDTH / SCALE,
        "height": bottom - top + 2 * MARGIN,
    }
    return Image.open(io.BytesIO(page.screenshot(clip=clip))).convert("RGB")


def row_of(frames: np.ndarray) -> Image.Image:
    """Some frames of a video (T, H, W, 3) in 0..1."""
    side = -(-WIDTH // FRAMES)
    row = Image.new("RGB", (WIDTH, side))
    for i, frame in enumerate(frames[np.linspace(0, len(frames) - 1, FRAMES).astype(int)]):
        small = Image.fromarray((255 * frame).astype(np.uint8)).resize((side, side), Image.Resampling.LANCZOS)
        row.paste(small, (i * side, 0))
    return row


def below(picture: Image.Image, output: Image.Image) -> Image.Image:
    """A picture with what the node makes below it."""
    both = Image.new("RGB", (WIDTH, picture.height + output.height))
    both.paste(picture)
    both.paste(output, (0, picture.height))
    return both
