"""The pack as ComfyUI and its registry see it: the entry point, the import time, the metadata, the help pages."""

import json
import os
import re
import subprocess
import sys

from pack import ROOT

LOAD = """
import sys, time, json, asyncio, importlib.util
sys.path.insert(0, sys.argv[1])
import comfy.cli_args
comfy.cli_args.args.cpu = True
import torch, comfy.sd, comfy_api.latest  # as ComfyUI has before it loads packs
started = time.perf_counter()
spec = importlib.util.spec_from_file_location("anything", sys.argv[2] + "/__init__.py")
module = importlib.util.module_from_spec(spec)
sys.modules["anything"] = module
spec.loader.exec_module(module)
seconds = time.perf_counter() - started
nodes = asyncio.run(asyncio.run(module.comfy_entrypoint()).get_node_list())
print(json.dumps({"seconds": seconds, "nodes": [node.define_schema().node_id for node in nodes],
                  "mappings": hasattr(module, "NODE_CLASS_MAPPINGS"), "web": module.WEB_DIRECTORY}))
"""

NODES = [
    "SkeinSpeedUp",
    "SkeinFirstBlockCache",
    "SkeinAttention",
    "SkeinSparseAttention",
    "SkeinFP8Quantize",
    "SkeinFP8TextEncoder",
    "SkeinCompile",
    "SkeinContextParallel",
    "SkeinReleaseWorkers",
    "SkeinVAEDecodeParallel",
    "SkeinLoadDiffusersTransformer",
    "SkeinDemoModel",
    "SkeinDemoPrompt",
    "SkeinLatentVideoPreview",
    "SkeinCacheReport",
]


def load(script):
    command = [sys.executable, "-c", script, os.environ["COMFYUI_PATH"], str(ROOT)]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])


def test_the_entry_point_lists_the_nodes_and_imports_fast():
    loaded = load(LOAD)
    assert loaded["nodes"] == NODES  # the public surface: a change here is a change for every saved workflow
    assert not loaded["mappings"]  # beside an entry point they would silently win
    assert loaded["seconds"] < 0.5


def test_the_nodes_are_there_where_pytorch_has_no_distributed_package():
    """As in the builds for AMD on Windows: torch.distributed then says that it is not available, and little more."""
    without = "sys.modules['torch.distributed'] = torch.distributed = type(sys)('torch.distributed')\n"
    without += "torch.distributed.is_available = lambda: False\n"
    assert load(LOAD.replace("started = ", f"{without}started = ", 1))["nodes"] == NODES


def test_every_node_has_a_help_page():
    assert sorted(NODES) == sorted(page.stem for page in (ROOT / "web" / "docs").glob("*.md"))


def test_no_line_of_ours_needs_torch_or_pins_a_version():
    lines = [line.split("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines()]
    assert all(">=" in line and not re.match(r"torch(vision|audio)?\b", line) for line in lines if line)


def test_the_embedded_model_is_small_enough_for_git():
    model = ROOT / "demo" / "model" / "skein_demo_hunyuan_video.safetensors"
    assert model.stat().st_size <= 25_000_000
