"""Forms that people have checkpoints in, times techniques, in one process and in two workers.

The same weights each time (forms.py): relative error of the final latent of six steps against the bfloat16 file through
Load Diffusion Model. A cell that is refused is a sentence, and the model as it is without the technique.
GGUF is read by ComfyUI-GGUF, which SKEIN_TEST_PACKS names a folder of.
"""

import os
import re
from pathlib import Path

import comfy.sd
import folder_paths
import forms
import pytest
import torch
from comfy.quant_ops import QUANT_ALGOS
from loras import with_lora
from skein import engine, live
from skein.bench.errors import relative_error
from skein.demo.sampling import sample
from skein.plan import AttentionConfig, CacheConfig, CompileConfig, FP8Config, ParallelConfig, SparseConfig
from skein.worker import loading
from skein.workers import release
from skein.workers.loader_node import NODE_KEY, loader_in

SMALL = dict(shape=(1, 16, 3, 16, 16), steps=6)
PROMPT = "a red circle moves left"
LORA = ["diffusion_model.double_blocks.0.img_attn.qkv", "diffusion_model.single_blocks.1.linear1"]
LORA_KEY = "LoRA"

FORMS = {  # name -> as the README calls it, and how far it is from bfloat16 by itself
    "bf16": ("bfloat16, float16", 0.0),
    "fp8_e4m3fn": ("FP8, `fp8_e4m3fn`", 0.025),
    "fp8_scaled": ("FP8 with scales, `fp8_scaled`", 0.04),
    "mxfp8": ("MXFP8", 0.025),
    "nvfp4": ("NVFP4", 0.09),
    "q8_0": ("GGUF Q8_0", 0.015),
    "q6_k": ("GGUF Q6_K", 0.04),
    "q4_k": ("GGUF Q4_K", 0.17),
}
TECHNIQUES = {  # the README's column -> the plan's fields, and what it adds to the error
    "First-Block Cache": ({"cache": CacheConfig(threshold=0.1)}, 0.05),
    "Attention": ({"attention": AttentionConfig()}, 2e-5),
    "Sparse Attention": ({"sparse": SparseConfig(max_error=0.2, min_tokens=1)}, 0.08),
    "Compile Blocks": ({"compile": CompileConfig()}, 1e-3),
    "FP8 Quantize": ({"fp8": FP8Config()}, 0.045),
    LORA_KEY: ({}, 2e-5),
}
# ComfyUI-GGUF makes a Q4_K weight of three products and a difference in float16, each rounded: 8e-4 from the weight of
# the gguf package. Compiled, it is that weight.
ROUNDED_LESS = {("q4_k", "Compile Blocks"): 2e-3}
REFUSED = {(form, "FP8 Quantize"): "already quantized" for form in ("mxfp8", "nvfp4", "q6_k", "q4_k")}
GGUF = ("q8_0", "q6_k", "q4_k")
WORKERS = "Context Parallel"  # a column of its own: with each of the others


@pytest.fixture(scope="module", autouse=True)
def _workers():
    yield
    release()


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A form's model, loaded once, and what it and its LoRA give without our nodes."""
    folder, known = tmp_path_factory.mktemp("forms"), {}
    folder_paths.add_model_folder_path("diffusion_models", str(folder))

    def get(form):
        if form not in known:
            model = load_gguf(form, folder) if form in GGUF else load(form, folder)
            known[form] = model, {lora: sample(with_loras(model, lora), PROMPT, **SMALL) for lora in (False, True)}
        return known[form]

    return get


def load(form, folder):
    if form in ("mxfp8", "nvfp4") and form not in QUANT_ALGOS:
        pytest.skip(f"this ComfyUI has no {form}")
    path = folder / f"{form}.safetensors"
    getattr(forms, f"write_{form}")(path)
    return comfy.sd.load_diffusion_model(str(path))


def load_gguf(form, folder):
    packs = os.environ.get("SKEIN_TEST_PACKS", "")
    if not (Path(packs) / "ComfyUI-GGUF").is_dir():
        pytest.skip("SKEIN_TEST_PACKS names no folder with ComfyUI-GGUF")
    import nodes

    loading.import_pack(str(Path(packs) / "ComfyUI-GGUF"))
    getattr(forms, f"write_{form}")(folder / f"{form}.gguf")
    node = {"class_type": "UnetLoaderGGUF", "inputs": {"unet_name": f"{form}.gguf"}}
    (model,) = nodes.NODE_CLASS_MAPPINGS[node["class_type"]]().load_unet(**node["inputs"])
    vars(model.model)[NODE_KEY] = loader_in({"1": node}, "1")  # as a node of ours notes it in a server
    return model


def with_loras(model, lora):
    return with_lora(model, 1.0, LORA) if lora else model


@pytest.mark.parametrize("where", ["one process", "two workers"])
@pytest.mark.parametrize("technique", TECHNIQUES)
@pytest.mark.parametrize("form", FORMS)
def test_a_form_with_a_technique(models, form, technique, where):
    (model, alone), (_, plain) = models(form), models("bf16")
    lora, (fields, adds) = technique == LORA_KEY, TECHNIQUES[technique]
    adds = ROUNDED_LESS.get((form, technique), adds)
    parallel = {"parallel": ParallelConfig("cpu,cpu")} if where == "two workers" else {}
    planned = engine.edit(with_loras(model, lora), **fields, **parallel)
    out = sample(planned, PROMPT, **SMALL)
    errors = relative_error(out, alone[lora]), relative_error(out, plain[lora])
    if (form, technique) in REFUSED:
        assert REFUSED[form, technique] in told(), told()
        assert errors[0] < 2e-5
    else:
        assert errors[0] <= adds and errors[1] <= FORMS[form][1] + adds, errors
        if technique in ("First-Block Cache", "Sparse Attention", "FP8 Quantize"):
            assert errors[0] > 1e-3, "it did nothing"
    assert torch.equal(sample(with_loras(model, lora), PROMPT, **SMALL), alone[lora])  # and nothing is left behind


def told():
    """What the last run's nodes said."""
    return " ".join(live.notes().values())


def test_the_readme_says_which_files_work():
    """Its table has these forms and techniques, and a number of a footnote where one is refused."""
    page = (Path(__file__).parents[1] / "README.md").read_text()
    section = re.search(r"^## Which files work\n(.*?)^## ", page, flags=re.MULTILINE | re.DOTALL)[1]
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line.startswith("|")
    ]
    head, _, *body = rows
    assert head[1:] == [*TECHNIQUES, WORKERS]
    cells = {row[0]: row[1:] for row in body}
    for form, (called, _) in FORMS.items():
        says = ["no" if (form, technique) in REFUSED else "yes" for technique in TECHNIQUES]
        assert cells[called] == [*says, "yes"], called
