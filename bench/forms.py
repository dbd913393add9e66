"""The demo model in each form that people have checkpoints in: its error and its time, alone and with FP8 Quantize.

    python3 -m bench.forms [--packs FOLDER] [--steps 6]

Relative errors of the final latent (3 x 16 x 16) against the bfloat16 file, and seconds of a second sampling. FOLDER
holds ComfyUI-GGUF; without it GGUF is left out. The forms are written by tests/forms.py. Ends with one JSON line.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT / "tests")]
from pack import load_pack  # noqa: E402

load_pack()

import comfy.sd  # noqa: E402
import folder_paths  # noqa: E402
import forms  # noqa: E402
import torch  # noqa: E402
from skein import engine  # noqa: E402
from skein.bench.errors import relative_error  # noqa: E402
from skein.demo.sampling import sample  # noqa: E402
from skein.plan import FP8Config  # noqa: E402
from skein.worker import loading  # noqa: E402

SAFETENSORS = ("bf16", "fp8_e4m3fn", "fp8_scaled", "mxfp8", "nvfp4")
GGUF = ("q8_0", "q6_k", "q4_k")
PROMPT = "a red circle moves left"
SHAPE = 1, 16, 3, 16, 16


def load(form: str, folder: Path):
    path = folder / f"{form}.{'gguf' if form in GGUF else 'safetensors'}"
    getattr(forms, f"write_{form}")(path)
    if form not in GGUF:
        return comfy.sd.load_diffusion_model(str(path))
    import nodes

    return nodes.NODE_CLASS_MAPPINGS["UnetLoaderGGUF"]().load_unet(path.name)[0]


def timed(model, steps: int):
    """The final latent, and the seconds that it took the second time."""
    sample(model, PROMPT, steps=steps, shape=SHAPE)
    started = time.perf_counter()
    return sample(model, PROMPT, steps=steps, shape=SHAPE), time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packs", type=Path, help="folder that holds ComfyUI-GGUF")
    parser.add_argument("--steps", type=int, default=6)
    options = parser.parse_args()
    if options.packs:
        loading.import_pack(str(options.packs.resolve() / "ComfyUI-GGUF"))
    rows, reference = [], torch.empty(0)
    with tempfile.TemporaryDirectory() as name, torch.inference_mode():
        folder_paths.add_model_folder_path("diffusion_models", name)
        for form in (*SAFETENSORS, *(GGUF if options.packs else ())):
            model = load(form, Path(name))
            alone, seconds = timed(model, options.steps)
            fp8, fp8_seconds = timed(engine.edit(model, fp8=FP8Config()), options.steps)
            reference = reference if rows else alone
            row = {"form": form, "error": relative_error(alone, reference), "s": seconds}
            rows.append({**row, "fp8_error": relative_error(fp8, reference), "fp8_s": fp8_seconds})
            print(
                "{form:12} error {error:.2e} {s:6.2f} s   FP8: {fp8_error:.2e} {fp8_s:6.2f} s".format(**rows[-1]),
                flush=True,
            )
    print(json.dumps({"steps": options.steps, "device": str(model.load_device), "rows": rows}))


if __name__ == "__main__":
    main()
