"""Samples and encodes under dynamic VRAM as far as a CPU has it, and tells what of the host's memory it took. A script,
because ComfyUI switches dynamic VRAM on before it is imported.

    under_dynamic_vram.py folder plans|types|text_encoder

What there is: ComfyUI's own mapping of files, and its layers that take weights from there. What is not: its
ModelPatcher, which gives way to the ordinary one on a CPU; here that one says that it is dynamic.
"""

import comfy_aimdo.control

assert comfy_aimdo.control.init()

import ctypes  # noqa: E402
import gc  # noqa: E402
import json  # noqa: E402
import logging  # noqa: E402
import sys  # noqa: E402
import weakref  # noqa: E402
from pathlib import Path  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))
from pack import load_pack  # noqa: E402

load_pack()

import comfy.memory_management  # noqa: E402
import comfy.model_management  # noqa: E402
import comfy.model_patcher  # noqa: E402
import comfy.sd  # noqa: E402
import torch  # noqa: E402
from random_checkpoints import SMALL, random_model, text  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from skein import engine, techniques  # noqa: E402
from skein.attributes import changed  # noqa: E402
from skein.bench.errors import relative_error  # noqa: E402
from skein.demo.sampling import sample  # noqa: E402
from skein.files import memory_of_files  # noqa: E402
from skein.patchers import PLAIN_KEY, TWIN_KEY, is_kept, keep, without_dynamic_vram  # noqa: E402
from skein.plan import AttentionConfig, CacheConfig, CompileConfig, FP8Config  # noqa: E402
from skein.quantization import quantize_text_encoder  # noqa: E402
from small_models import random_clip  # noqa: E402


class Dynamic(comfy.model_patcher.ModelPatcher):
    def is_dynamic(self):
        return True


def own_bytes() -> int:
    """What this process has in memory that is in no file; what was freed is given back before."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    (line,) = [each for each in Path("/proc/self/status").read_text().splitlines() if each.startswith("RssAnon")]
    return int(line.split()[1]) << 10


def outside(model, path: str) -> int:
    """Bytes of weights that are not in the memory of a file."""
    files = [each.addresses for each in memory_of_files() if each.path == path]
    weights = [each for each in model.parameters() if not any(each.data_ptr() in file for file in files)]
    return sum(weight.nbytes for weight in weights)


def plans(folder: Path) -> dict:
    """FP8 with compiled blocks, then compiled blocks alone, then neither: what each leaves in the process's memory."""
    techniques_here = [each for each in techniques.TECHNIQUES if each.__name__ != "_compiling"]  # it needs a compiler
    model = random_model(folder, 4, torch.float32)
    path = model.cached_patcher_init[1][0]
    stock, told = sample(model, text(7), **SMALL), {"file": Path(path).stat().st_size}
    with changed([(engine, "TECHNIQUES", techniques_here)]):
        on = engine.edit(model, compile=CompileConfig(), attention=AttentionConfig(kernel="stock"))
        before = own_bytes()
        told["compile_error"] = relative_error(sample(on, text(7), **SMALL), stock)
        told["compile"] = own_bytes() - before
        second = keep(on, PLAIN_KEY).value.root.model
        told["compile_outside"] = outside(second, path)
        on = engine.edit(on, fp8=FP8Config())
        told["fp8_error"] = relative_error(sample(on, text(7), **SMALL), stock)
        told["fp8"] = own_bytes() - before
        twin = keep(on, TWIN_KEY).value
        told["twin_outside"], told["twin"] = outside(twin.model, path), twin.bytes
        assert keep(on, PLAIN_KEY).value.root.model is second, "loaded once for both"
        gone = [weakref.ref(second), weakref.ref(twin.model)]
        del second, twin
        cheaper = engine.edit(model, cache=CacheConfig())
        del on  # as when the nodes go from the workflow: the loader's output stays
        told["kept"] = [is_kept(model, key) for key in (PLAIN_KEY, TWIN_KEY)] + [each() is not None for each in gone]
        sample(cheaper, text(7), **SMALL)
        told["after"] = own_bytes() - before
    told["stock_is_back"] = torch.equal(sample(model, text(7), **SMALL), stock)
    return told


def types(folder: Path) -> dict:
    """A file in float32, loaded in another type: the second model's weights, beside those of ComfyUI's own load."""
    told = {}
    for dtype in (torch.bfloat16, torch.float8_e4m3fn):
        model = random_model(folder, 2, dtype)
        with changed([(comfy.memory_management, "aimdo_enabled", False)]):
            load, arguments = model.cached_patcher_init
            expected = load(*arguments, disable_dynamic=True).model.state_dict()
        second = without_dynamic_vram(model).model.state_dict()
        told[str(dtype)] = second.keys() == expected.keys() and all(
            weight.dtype == expected[name].dtype and torch.equal(weight.float(), expected[name].float())
            for name, weight in second.items()
        )
    told["dynamic_again"] = comfy.memory_management.aimdo_enabled
    told["vram_state"] = comfy.model_management.vram_state.name
    return told


def text_encoder(folder: Path) -> dict:
    path = folder / "clip_l.safetensors"
    with changed([(comfy.memory_management, "aimdo_enabled", False)]):
        weights = random_clip().cond_stage_model.clip_l.transformer.state_dict()
    save_file({name: weight.half().clone() for name, weight in weights.items()}, path)
    clip = comfy.sd.load_clip([str(path)])
    prompt = "a red circle moves left"
    stock, before = clip.encode(prompt), own_bytes()
    quantized = quantize_text_encoder(clip)
    told = {"file": path.stat().st_size, "own": own_bytes() - before, "twin": quantized.patcher.model_size()}
    told["outside"] = outside(quantized.cond_stage_model, str(path))
    told["error"] = relative_error(quantized.encode(prompt), stock)
    books = [entry.model for entry in comfy.model_management.current_loaded_models]
    told["in_the_books"] = [each is not None for each in books]
    told["stock_is_back"] = torch.equal(clip.encode(prompt), stock)
    return told


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    comfy.model_patcher.CoreModelPatcher = Dynamic
    comfy.memory_management.aimdo_enabled = True
    with torch.inference_mode():
        print(
            json.dumps({"plans": plans, "types": types, "text_encoder": text_encoder}[sys.argv[2]](Path(sys.argv[1])))
        )
