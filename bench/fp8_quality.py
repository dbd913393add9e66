"""What FP8 costs in quality: PSNR against stock on the embedded model, for each mode, modulation stored in FP8 or not.

    python3 scripts/dev.py -m bench.fp8_quality

For every setting, 12 prompts are sampled with fixed seeds (20 steps euler, CFG 1, 17 frames of 192 x 192), through
ComfyUI's own sampler in this process, and compared with the stock result as RGB previews. Prints a table, ends with
one JSON line. The model is trained; nothing is random but the seeded noise.
"""

import json
import os
import platform
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
from pack import load_pack  # noqa: E402

load_pack()

import comfy.latent_formats  # noqa: E402
import comfyui_version  # noqa: E402
import torch  # noqa: E402
from skein import engine  # noqa: E402
from skein.demo.sampling import PROMPTS, load_demo_model, sample  # noqa: E402
from skein.demo.video import psnr  # noqa: E402
from skein.plan import FP8_MODES, FP8Config  # noqa: E402
from skein.preview import latent_to_frames  # noqa: E402


def all_frames(model) -> list:
    latents = [sample(model, prompt, seed=100 + index) for index, prompt in enumerate(PROMPTS)]
    return [latent_to_frames(latent, comfy.latent_formats.HunyuanVideo()).numpy() for latent in latents]


def main() -> None:
    started = time.monotonic()
    rows = {}
    with torch.inference_mode():
        model = load_demo_model()
        references = all_frames(model)
        for mode in FP8_MODES:
            for modulation in (False, True):
                fp8 = engine.edit(model, fp8=FP8Config(mode, modulation))
                values = [psnr(one, reference) for one, reference in zip(all_frames(fp8), references)]
                name = f"{mode}, modulation {'FP8' if modulation else 'kept'}"
                rows[name] = {"psnr_mean": round(sum(values) / len(values), 2), "psnr_worst": round(min(values), 2)}
                print(f"{name:30s} mean {rows[name]['psnr_mean']:5.2f} dB  worst {rows[name]['psnr_worst']:5.2f} dB",
                      flush=True)  # fmt: skip
    result = {
        "prompts": len(PROMPTS),
        "settings": rows,
        "comfyui": comfyui_version.__version__,
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"{platform.machine()} {os.cpu_count()} cores",
        "minutes": round((time.monotonic() - started) / 60, 1),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
