"""`make demo`: one prompt through a real ComfyUI server, stock and with the First-Block Cache, side by side.

Runs the shipped demo workflow, writes both videos and a contact sheet to `demo/out/`, and ends with one
JSON line on stdout. Times are of the sampler node alone, after a warm-up step that also loads the model.
"""

import argparse
import copy
import json
import math
import os
import shutil
import sys
import time
from pathlib import Path

import numpy as np

from .server import ROOT, ComfyServer, comfyui_path, has_gpu
from .video import psnr, read_frames

WORKFLOW = ROOT / "workflows" / "api" / "skein_demo.json"
PICTURE = ROOT / "workflows" / "Skein - Demo, no download, no GPU.jpg"  # of the workflow, in the template browser
OUT = Path(__file__).parent / "out"
CACHE_NODE = "SkeinFirstBlockCache"


def node_id(prompt: dict, class_type: str) -> str:
    (found,) = [key for key, node in prompt.items() if node["class_type"] == class_type]
    return found


def without_cache(prompt: dict) -> dict:
    """The same prompt with the cache node bypassed."""
    prompt = copy.deepcopy(prompt)
    bypassed = node_id(prompt, CACHE_NODE)
    source = prompt.pop(bypassed)["inputs"]["model"]
    for node in prompt.values():
        for name, value in node["inputs"].items():
            if isinstance(value, list) and value[0] == bypassed:
                node["inputs"][name] = source
    return prompt


def in_workers(prompt: dict, devices: str, **settings) -> dict:
    """The same prompt with the model's calls in worker processes."""
    prompt = copy.deepcopy(prompt)
    cache = prompt[node_id(prompt, CACHE_NODE)]["inputs"]
    inputs = {"devices": devices, "ulysses_degree": 0, "ring_degree": 0, "keep_warm": True, **settings}
    prompt["parallel"] = {"class_type": "SkeinContextParallel", "inputs": {**inputs, "model": cache["model"]}}
    cache["model"] = ["parallel", 0]
    return prompt


def parallel_run(server: ComfyServer, prompt: dict, devices: str) -> dict:
    """The demo in worker processes, against the video of one process in OUT."""
    prompt = in_workers(prompt, devices)
    warm_up = copy.deepcopy(prompt)
    warm_up[node_id(warm_up, "KSampler")]["inputs"]["steps"] = 1
    run_and_time(server, warm_up, "starting workers")
    file, seconds = run_and_time(server, prompt, f"cached, in workers on {devices}")
    shutil.copy(file, OUT / "parallel.webp")
    same = psnr(read_frames(OUT / "parallel.webp"), read_frames(OUT / "cached.webp"))
    return {"devices": devices, "parallel_s": round(seconds, 2), "parallel_psnr_db_to_one_process": round(same, 2)}


def run_and_time(server: ComfyServer, prompt: dict, name: str) -> tuple[Path, float]:
    """Run a prompt, showing progress; returns the saved video and the seconds spent in the sampler node."""
    sampler, saver = node_id(prompt, "KSampler"), node_id(prompt, "SaveAnimatedWEBP")
    begun = ended = 0.0

    def on_progress(event: dict) -> None:
        nonlocal begun, ended
        data = event.get("data", {})
        if event["type"] == "executing":
            if data.get("node") == sampler:
                begun = time.perf_counter()
            elif begun and not ended:
                ended = time.perf_counter()
        elif event["type"] == "progress" and data.get("node") == sampler:
            print(f"\r{name}: step {data['value']} of {data['max']} ", end="", file=sys.stderr, flush=True)

    outputs = server.run(prompt, on_progress)
    print(f"in {ended - begun:.1f} s", file=sys.stderr)
    return server.file(outputs[saver]["images"][0]), ended - begun


def draw_sheet(path: Path, stock: np.ndarray, cached: np.ndarray, run: dict, title: str) -> None:
    """The contact sheet: stock above cached, their difference, and the change of each call with the threshold."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = np.linspace(0, len(stock) - 1, 6).round().astype(int)
    rows = {"stock": stock, "cached": cached, "difference x 8": np.clip(np.abs(stock - cached) * 8, 0, 1)}
    figure = pyplot.figure(figsize=(11, 8.4), layout="constrained")
    figure.suptitle(title)
    parts = figure.subfigures(2, 1, height_ratios=(3, 1.5), squeeze=False)
    pictures, curve = parts[0, 0], parts[1, 0]
    axes = pictures.subplots(3, len(shown))
    for row, (name, video) in zip(axes, rows.items()):
        row[0].set_ylabel(name)
        for axis, index in zip(row, shown):
            axis.imshow(video[index], interpolation="nearest")
            axis.set_xticks([])
            axis.set_yticks([])
    draw_curve(curve.subplots(), run)
    figure.savefig(path, dpi=100)


def draw_curve(axis, run: dict) -> None:
    calls = run["calls"]
    numbers = range(1, len(calls) + 1)
    changes = [math.nan if call["change"] is None else call["change"] for call in calls]
    axis.plot(numbers, changes, color="0.6", zorder=1)
    for reused, colour, label in ((False, "tab:red", "computed"), (True, "tab:green", "reused")):
        points = [(n, c) for n, c, call in zip(numbers, changes, calls) if call["reused"] == reused]
        axis.scatter(*zip(*points), color=colour, label=label, zorder=2) if points else None
    axis.axhline(calls[0]["threshold"], color="tab:blue", linestyle="--", label="threshold")
    axis.set_xlabel("model call")
    axis.set_ylabel("relative change")
    axis.legend()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt", help="another prompt for the demo model")
    parser.add_argument("--seed", type=int, help="another seed")
    parser.add_argument("--devices", help='also sample in worker processes on these devices, such as "cpu,cpu"')
    parser.add_argument("--thumbnail", action="store_true", help="also renew the shipped workflow's thumbnail")
    options = parser.parse_args()

    cached_prompt = json.loads(WORKFLOW.read_text())
    sampler = cached_prompt[node_id(cached_prompt, "KSampler")]["inputs"]
    if options.prompt is not None:
        cached_prompt[sampler["positive"][0]]["inputs"]["text"] = options.prompt
    if options.seed is not None:
        sampler["seed"] = options.seed
    stock_prompt = without_cache(cached_prompt)
    warm_up = copy.deepcopy(stock_prompt)
    warm_up[node_id(warm_up, "KSampler")]["inputs"]["steps"] = 1

    OUT.mkdir(exist_ok=True)
    with ComfyServer(comfyui_path()) as server:
        version = server.get("/system_stats")["system"]["comfyui_version"]
        run_and_time(server, warm_up, "warm-up")
        stock_file, stock_seconds = run_and_time(server, stock_prompt, "stock")
        cached_file, cached_seconds = run_and_time(server, cached_prompt, "cached")
        run = server.get("/skein/runs")["runs"][-1]
        shutil.copy(stock_file, OUT / "stock.webp")
        shutil.copy(cached_file, OUT / "cached.webp")
        parallel = parallel_run(server, cached_prompt, options.devices) if options.devices else {}
    stock, cached = read_frames(OUT / "stock.webp"), read_frames(OUT / "cached.webp")
    if options.thumbnail:
        draw_thumbnail(PICTURE, cached)
    quality = psnr(cached, stock)
    speedup = stock_seconds / cached_seconds
    title = (
        f"{run['reused']} of {len(run['calls'])} model calls reused: "
        f"{stock_seconds:.1f} s -> {cached_seconds:.1f} s ({speedup:.2f}x), {quality:.1f} dB PSNR"
    )
    draw_sheet(OUT / "sheet.png", stock, cached, run, title)
    result = {
        "frames": len(stock),
        "steps": sampler["steps"],
        "calls": len(run["calls"]),
        "reused": run["reused"],
        "stock_s": round(stock_seconds, 2),
        "skein_s": round(cached_seconds, 2),
        "speedup": round(speedup, 3),
        "psnr_db": round(quality, 2),
        "video": os.path.relpath(OUT / "cached.webp", ROOT),
        "picture": os.path.relpath(OUT / "sheet.png", ROOT),
        "comfyui": version,
        "device": device_name(),
        **parallel,
    }
    print(json.dumps(result))


def draw_thumbnail(path: Path, video: np.ndarray) -> None:
    """Four frames of a video, as the workflow's picture in ComfyUI's template browser."""
    from PIL import Image, ImageDraw, ImageFont

    shown = [video[index] for index in np.linspace(0, len(video) - 1, 4).round().astype(int)]
    square = np.concatenate([np.concatenate(row, axis=1) for row in (shown[:2], shown[2:])])
    image = Image.fromarray((square * 255).round().astype(np.uint8)).resize((512, 512))
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, 436, 512, 512), fill="#181b21")
    draw.text((256, 474), "Demo: no download, no GPU", "#f2f4f7", ImageFont.load_default(34), anchor="mm")
    image.save(path, quality=88)


def device_name() -> str:
    import torch

    return torch.cuda.get_device_name() if has_gpu() else f"cpu, {os.cpu_count()} cores"


if __name__ == "__main__":
    main()
