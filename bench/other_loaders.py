"""Other packs' loaders before our nodes, in a real ComfyUI server that has all of these packs at once.

    python3 -m bench.other_loaders FOLDER

FOLDER holds ComfyUI-MultiGPU, ComfyUI-GGUF, ComfyUI-KJNodes and rgthree-comfy as they are cloned; what they import
beside ComfyUI's own requirements (gguf) lies on PYTHONPATH. The demo workflow is run with each loader alone, then with
each of our techniques after it. One row a combination, as in bench.other_packs: "equal within x" of the loader alone,
"refused: sentence", "not here: why" or "WRONG: what". Ends with one JSON line; the exit status is the number of rows
that are wrong.
"""

import argparse
import copy
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
from pack import load_pack  # noqa: E402

load_pack()

from safetensors.torch import load_file  # noqa: E402
from skein.bench.other_packs import report_row  # noqa: E402
from skein.demo import MODEL_FOLDER, MODEL_NAME  # noqa: E402
from skein.demo.run import WORKFLOW, node_id, without_cache  # noqa: E402
from skein.demo.server import ComfyServer, PromptError, comfyui_path  # noqa: E402
from skein.demo.video import read_frames  # noqa: E402

GGUF_NAME = "skein_demo.gguf"
TECHNIQUES = {  # node, its inputs, and how far its video may be from that without it (mean absolute difference, of 1)
    "cache": ("SkeinFirstBlockCache", {"residual_diff_threshold": 0.3}, 0.05),
    "attention": ("SkeinAttention", {}, 0.002),
    "fp8": ("SkeinFP8Quantize", {}, 0.05),
    "compile": ("SkeinCompile", {}, 0.002),
    "parallel": ("SkeinContextParallel", {"devices": "cpu,cpu"}, 0.002),
}
LOADERS = {  # node -> the inputs that are not its defaults
    "UNETLoader": {},
    "UNETLoaderMultiGPU": {"device": "cpu"},
    "UNETLoaderDisTorch2MultiGPU": {"compute_device": "cpu", "donor_device": "cpu"},
    "UnetLoaderGGUF": {"unet_name": GGUF_NAME},
    "UnetLoaderGGUFDisTorch2MultiGPU": {"unet_name": GGUF_NAME, "compute_device": "cpu", "donor_device": "cpu"},
    "DiffusionModelLoaderKJ": {"model_name": MODEL_NAME, "sage_attention": "disabled"},
}
BETWEEN = {"Power Lora Loader (rgthree)": {}}  # nodes that take and give a model


def write_gguf(folder: Path) -> None:
    """The embedded model as GGUF, its large weights in 8 bits (Q8_0)."""
    import gguf

    writer = gguf.GGUFWriter(folder / GGUF_NAME, "hyvid")
    for name, value in load_file(MODEL_FOLDER / MODEL_NAME).items():
        kind = gguf.GGMLQuantizationType.F32
        if value.ndim == 2 and value.shape[1] % 32 == 0:
            kind = gguf.GGMLQuantizationType.Q8_0
        data = gguf.quants.quantize(value.float().numpy(), kind)
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def with_defaults(server: ComfyServer, node: str, given: dict) -> dict:
    """A node of a prompt, with its own defaults for the inputs that are not given."""
    required = server.get(f"/object_info/{node.replace(' ', '%20')}")[node]["input"].get("required", {})
    inputs = dict(given)
    for name, (kind, *settings) in required.items():
        options = settings[0] if settings else {}
        choices = kind if isinstance(kind, list) else options.get("options")
        if name not in inputs and name == "unet_name":
            inputs[name] = MODEL_NAME
        elif name not in inputs and kind != "MODEL":
            inputs[name] = options.get("default", choices[0] if choices else None)
    return {"class_type": node, "inputs": inputs}


def prompt_of(server: ComfyServer, loader: str, between: str | None, technique: str | None) -> dict:
    """The demo prompt with a loader, a node after it, and one of our techniques after that."""
    prompt = without_cache(json.loads(WORKFLOW.read_text()))
    prompt[node_id(prompt, "EmptyHunyuanLatentVideo")]["inputs"].update(width=128, height=128, length=9)
    sampler = prompt[node_id(prompt, "KSampler")]["inputs"]
    sampler["steps"], place = 6, sampler["model"][0]
    prompt[place] = with_defaults(server, loader, LOADERS[loader])
    if between is not None:
        prompt["between"] = with_defaults(server, between, {**BETWEEN[between], "model": sampler["model"]})
        sampler["model"] = ["between", 0]
    if technique is not None:
        node, inputs, _ = TECHNIQUES[technique]
        prompt["technique"] = {"class_type": node, "inputs": {**inputs, "model": sampler["model"]}}
        sampler["model"] = ["technique", 0]
    return prompt


def video(server: ComfyServer, prompt: dict) -> Any:
    outputs = server.run(copy.deepcopy(prompt))
    return read_frames(server.file(outputs[node_id(prompt, "SaveAnimatedWEBP")]["images"][0]))


def rows_of(server: ComfyServer, loader: str, between: str | None = None) -> list[dict]:
    """The rows of one loader."""
    piece = loader if between is None else f"{loader}, {between}"
    try:
        alone = video(server, prompt_of(server, loader, between, None))
    except Exception as error:  # whatever keeps another pack's node from running here
        return [report_row(piece, "alone", f"not here: {str(error)[:300] or type(error).__name__}")]
    rows = [report_row(piece, "alone", "runs")]
    for technique, (_, _, bound) in TECHNIQUES.items():
        try:
            error = float(np.abs(video(server, prompt_of(server, loader, between, technique)) - alone).mean())
            result = f"equal within {error:.1e}" if error < bound else f"WRONG: off by {error:.1e}"
        except PromptError as refusal:
            text = str(refusal).splitlines()[0][:300]
            ours = any(word in text for word in ("Skein", "Context Parallel", "FP8", "Compile", "Cache", "Attention"))
            result = f"{'refused' if ours else 'WRONG'}: {text}"
        rows.append(report_row(piece, technique, result))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packs", type=Path, help="folder that holds the packs")
    packs = parser.parse_args().packs.resolve()
    with tempfile.TemporaryDirectory() as folder:
        write_gguf(Path(folder))
        paths = Path(folder) / "paths.yaml"
        paths.write_text(f"others:\n  custom_nodes: {packs}\n  unet: {folder}\n  unet_gguf: {folder}\n")
        shutil.copy(MODEL_FOLDER / MODEL_NAME, folder)
        with ComfyServer(comfyui_path(), ("--extra-model-paths-config", str(paths))) as server:
            rows = [row for loader in LOADERS for row in rows_of(server, loader)]
            rows += [row for node in BETWEEN for row in rows_of(server, "UNETLoader", node)]
            assert server.alive()
    wrong = sum(row["result"].startswith("WRONG") for row in rows)
    print(json.dumps({"rows": rows, "wrong": wrong}))
    sys.exit(min(wrong, 100))


if __name__ == "__main__":
    main()
