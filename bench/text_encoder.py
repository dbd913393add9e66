"""What FP8 Text Encoder brings: memory, times, and how far HunyuanVideo's text embeddings move.

    python3 -m bench.text_encoder [--small]

HunyuanVideo's text encoders as ComfyUI loads them (Llama 3 of 8 B parameters in 16 bits, and CLIP-L), random weights;
--small: CLIP-L alone, to see that it runs. Random weights have no outliers, so the error says how FP8 rounds and not
what a picture loses. Ends with one JSON line.
"""

import argparse
import json
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
from pack import load_pack  # noqa: E402

load_pack()

import comfy.model_management as memory  # noqa: E402
import comfy.sd  # noqa: E402
import comfyui_version  # noqa: E402
import torch  # noqa: E402
from skein.bench.errors import relative_error  # noqa: E402
from skein.bench.timing import device_name, median_seconds  # noqa: E402
from skein.quantization import quantize_text_encoder  # noqa: E402

# What ComfyUI's loader knows the files by; it makes the rest, which is then filled.
CLIP_L = {"text_model.encoder.layers.1.mlp.fc1.weight": torch.zeros(3072, 768)}
LLAMA = {"model.norm.weight": torch.zeros(4096, dtype=torch.bfloat16)}
TEXT = (
    "A cat walks on the grass in the morning light, realistic style, the camera follows it slowly at eye level, dew on "
    "the blades, soft shadows of trees behind, a shallow depth of field"
)


def random_encoder(small: bool) -> comfy.sd.CLIP:
    """HunyuanVideo's text encoders with Gaussian weights, norms one, that keep hidden states of their size."""
    states = [CLIP_L] if small else [CLIP_L, LLAMA]
    kind = comfy.sd.CLIPType.STABLE_DIFFUSION if small else comfy.sd.CLIPType.HUNYUAN_VIDEO
    clip = comfy.sd.load_text_encoder_state_dicts([dict(state) for state in states], clip_type=kind)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(0)
    for parameter in clip.cond_stage_model.parameters():
        if parameter.ndim < 2:
            parameter.data.fill_(1.0)
        else:
            drawn = torch.randn(parameter.shape, generator=generator, device=device)
            parameter.data.copy_(drawn * parameter.shape[-1] ** -0.5)
    return clip


def encode(clip: comfy.sd.CLIP) -> torch.Tensor:
    return clip.encode_from_tokens(clip.tokenize(TEXT), return_pooled=True)[0]


def measure(build) -> tuple[dict, torch.Tensor]:
    """An encoder's figures, and the embedding of TEXT (1, tokens, width). first_s includes what build does."""
    cuda = torch.cuda.is_available()
    memory.unload_all_models()
    memory.soft_empty_cache(force=True)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    clip = build()
    embedding = encode(clip).float().cpu()
    first = time.perf_counter() - started
    row = {
        "weights_gb": clip.patcher.model_size() / 1e9,
        "on_device_gb": torch.cuda.memory_allocated() / 1e9 if cuda else None,
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9 if cuda else None,
        "first_s": first,
        "encode_s": median_seconds(lambda: encode(clip).cpu(), "cpu", repeats=5),
    }
    return row, embedding


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="CLIP-L alone")
    options = parser.parse_args()
    with torch.inference_mode():
        clip = random_encoder(options.small)
        stock, exact = measure(lambda: clip)
        fp8, rounded = measure(lambda: quantize_text_encoder(clip))
    print(
        json.dumps({
            "device": device_name(), "comfyui": comfyui_version.__version__, "torch": torch.__version__,
            "random": "weights", "tokens": exact.shape[1], "stock": stock, "fp8": fp8,
            "relative_error": relative_error(rounded, exact),
        })
    )  # fmt: skip


if __name__ == "__main__":
    main()
