"""One Linear layer of HunyuanVideo in each form of file: seconds as its loader runs it, and as FP8 Quantize does.

    python3 -m bench.form_layer [--packs FOLDER] [--rows 118860]

A single block's first layer (3072 -> 21504), random weights and inputs, in bfloat16, eager and compiled. FOLDER holds
ComfyUI-GGUF, of which only the layer is imported; without it GGUF is left out. Errors are relative, against the layer
in bfloat16. Ends with one JSON line.
"""

import argparse
import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT / "tests")]
from pack import load_pack  # noqa: E402

load_pack()

import comfy.ops  # noqa: E402
import forms  # noqa: E402
import torch  # noqa: E402
from comfy.quant_ops import QUANT_ALGOS, QuantizedTensor  # noqa: E402
from skein.bench.errors import relative_error  # noqa: E402
from skein.bench.timing import device_name, median_seconds  # noqa: E402
from skein.quantization.given import dequantized, scaled_fp8  # noqa: E402
from skein.quantization.linear import QuantizedLinear  # noqa: E402
from torch import Tensor, nn  # noqa: E402

SIZES = 21504, 3072
COMFYUI = {"fp8_scaled": "float8_e4m3fn", "mxfp8": "mxfp8", "nvfp4": "nvfp4"}
GGUF = {"q8_0": "Q8_0", "q6_k": "Q6_K", "q4_k": "Q4_K"}


def by_comfyui(weight: Tensor, form: str, exact: bool) -> nn.Module:
    """ComfyUI's layer over its quantized tensor. exact: with products in bfloat16, as many files ask for."""
    operations = comfy.ops.mixed_precision_ops({}, torch.bfloat16, full_precision_mm=exact)
    layer = operations.Linear(SIZES[1], SIZES[0], bias=False, device="meta", dtype=torch.bfloat16)
    layout = QUANT_ALGOS[COMFYUI[form]]["comfy_tensor_layout"]
    scale = "recalculate" if form == "fp8_scaled" else None
    layer.weight = nn.Parameter(QuantizedTensor.from_float(weight, layout, scale=scale), requires_grad=False)
    layer.layout_type, layer.quant_format = layout, COMFYUI[form]
    return layer


def by_gguf(weight: Tensor, form: str, operations: ModuleType) -> nn.Module:
    import gguf

    kind, rows = gguf.GGMLQuantizationType[GGUF[form]], weight.float().cpu().numpy()
    data = gguf.quants.quantize(rows, kind) if form == "q8_0" else getattr(forms, form)(rows)
    layer = operations.GGMLOps.Linear(SIZES[1], SIZES[0], bias=False)
    stored = operations.GGMLTensor(
        torch.from_numpy(data).to(weight.device), tensor_type=kind, tensor_shape=weight.shape
    )
    layer.weight = nn.Parameter(stored, requires_grad=False)
    return layer


def layers_of(weight: Tensor, packs: Path | None) -> dict[str, Callable[[], nn.Module]]:
    made: dict[str, Callable[[], nn.Module]] = {}
    for form in (each for each in COMFYUI if COMFYUI[each] in QUANT_ALGOS):
        made[form] = lambda form=form: by_comfyui(weight, form, False)
        made[f"{form}, bfloat16 products"] = lambda form=form: by_comfyui(weight, form, True)
    if packs:
        pack = ModuleType("gguf_pack")
        pack.__path__ = [str(packs / "ComfyUI-GGUF")]
        sys.modules["gguf_pack"] = pack
        operations = importlib.import_module("gguf_pack.ops")
        made |= {form: lambda form=form: by_gguf(weight, form, operations) for form in GGUF}
    return made


def row_of(name: str, layer: nn.Module, x: Tensor, reference: Tensor) -> dict:
    row = {"form": name}
    for how, run in (("eager", layer), ("compiled", torch.compile(layer))):
        try:
            row[f"{how}_error"] = relative_error(run(x), reference)
            row[f"{how}_ms"] = 1000 * median_seconds(lambda run=run: run(x), x.device, 5)
        except Exception as error:  # a form that this card or this ComfyUI cannot compute
            row[how] = f"{type(error).__name__}: {str(error)[:80]}"
    print("  ".join(f"{each:.3g}" if isinstance(each, float) else str(each) for each in row.values()), flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packs", type=Path, help="folder that holds ComfyUI-GGUF")
    parser.add_argument("--rows", type=int, default=118860)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    with torch.inference_mode():
        weight = torch.randn(SIZES, device=device, dtype=torch.bfloat16) / SIZES[1] ** 0.5
        x = torch.randn(1, options.rows, SIZES[1], device=device, dtype=torch.bfloat16)
        reference = torch.nn.functional.linear(x, weight)
        plain = nn.Linear(SIZES[1], SIZES[0], bias=False, device="meta")
        plain.weight = nn.Parameter(weight, requires_grad=False)
        rows = [row_of("bfloat16", plain, x, reference)]
        rows.append(row_of("bfloat16, FP8 Quantize", QuantizedLinear(weight, None, "per_row"), x, reference))
        for name, make in layers_of(weight, options.packs).items():
            layer = make()
            rows.append(row_of(name, layer, x, reference))
            if name in ("fp8_scaled", *GGUF):  # the others FP8 Quantize cannot read
                given = layer.weight if scaled_fp8(layer.weight) else dequantized(layer.weight, device)
                rows.append(row_of(f"{name}, FP8 Quantize", QuantizedLinear(given, None, "per_row"), x, reference))
    print(json.dumps({"device": device_name(), "torch": torch.__version__, "rows": options.rows, "results": rows}))


if __name__ == "__main__":
    main()
