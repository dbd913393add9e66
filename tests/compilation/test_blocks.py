"""Compiled blocks on real ComfyUI models: equal to eager, compiled once, and eager again where the compiler fails.

Compilations are counted as PyTorch counts them. Each costs seconds, so the tests share one small model's graphs.
"""

import os

import comfy.model_management as memory
import pytest
import torch
import torch._inductor.config as inductor
from loras import with_lora
from skein import engine
from skein.bench.errors import relative_error
from skein.compilation.blocks import CompiledBlocks
from skein.demo.sampling import sample
from skein.plan import AttentionConfig, CacheConfig, CompileConfig
from skein.report import recent_runs
from torch._dynamo.utils import counters

SMALL = dict(shape=(1, 16, 3, 8, 8), steps=4)
COMPILED = CompileConfig()
LORA = ["diffusion_model.double_blocks.0.img_attn.qkv", "diffusion_model.single_blocks.0.linear1"]


class Compilations:
    """How many graphs were compiled since the last question; no graph may break."""

    def __init__(self):
        self.seen = counters["stats"]["unique_graphs"]

    def new(self) -> int:
        before, self.seen = self.seen, counters["stats"]["unique_graphs"]
        assert not counters["graph_break"]
        return self.seen - before


def test_two_graphs_serve_every_run(tiny_model):
    """Equal to eager; nothing is compiled again for another run, prompt, seed, LoRA strength, kernel, hit or miss."""
    torch._dynamo.reset()
    compilations = Compilations()
    compiled = engine.edit(tiny_model, compile=COMPILED)
    stock = sample(tiny_model, "a red circle moves left", **SMALL)
    assert relative_error(sample(compiled, "a red circle moves left", **SMALL), stock) < 1e-5
    assert compilations.new() == 2  # one for each kind of block

    assert relative_error(sample(compiled, "a red circle moves left", **SMALL), stock) < 1e-5
    longer = "a small red square moves up over sand"
    assert relative_error(sample(compiled, longer, seed=2, **SMALL), sample(tiny_model, longer, seed=2, **SMALL)) < 1e-5
    assert compilations.new() == 0

    for strength in (1.0, 0.5):
        patched = with_lora(tiny_model, strength, LORA)
        expected = sample(patched, longer, **SMALL)
        assert relative_error(sample(engine.edit(patched, compile=COMPILED), longer, **SMALL), expected) < 1e-5
        assert relative_error(expected, sample(tiny_model, longer, **SMALL)) > 1e-3  # the patch does something
    assert compilations.new() == 0

    cached = dict(cache=CacheConfig(threshold=0.9))
    both = sample(engine.edit(tiny_model, compile=COMPILED, **cached), longer, **SMALL)
    reused = recent_runs()[-1].reused
    assert relative_error(both, sample(engine.edit(tiny_model, **cached), longer, **SMALL)) < 1e-4
    assert reused == recent_runs()[-1].reused > 0
    with_kernel = engine.edit(compiled, attention=AttentionConfig())
    assert relative_error(sample(with_kernel, "a red circle moves left", **SMALL), stock) < 1e-5
    assert compilations.new() == 0


def test_after_the_first_change_of_size_any_size_goes(tiny_model):
    compiled, compilations = engine.edit(tiny_model, compile=COMPILED), Compilations()
    sample(compiled, "a red circle moves left", **SMALL)
    compilations.new()
    sizes = [(1, 16, 3, 12, 8), (1, 16, 2, 8, 16), (1, 16, 5, 6, 10)]
    made = []
    for shape in sizes:
        expected = sample(tiny_model, "a red circle", shape=shape, steps=2)
        assert relative_error(sample(compiled, "a red circle", shape=shape, steps=2), expected) < 1e-5
        made.append(compilations.new())
    assert made[0] <= 2 and made[1:] == [0, 0]


def test_warming_up_changes_nothing_but_when(tiny_model):
    said = []
    cold = engine.edit(tiny_model, compile=CompileConfig(warm_up=False), cache=CacheConfig(threshold=0.9))
    warm = engine.edit(tiny_model, compile=COMPILED, cache=CacheConfig(threshold=0.9))
    expected = sample(cold, "a red circle", **SMALL)
    calls = [call.reused for call in recent_runs()[-1].calls]
    assert torch.equal(sample(warm, "a red circle", **SMALL), expected)
    assert [call.reused for call in recent_runs()[-1].calls] == calls  # the cache has not seen the warm-up

    ran = []
    blocks = CompiledBlocks(COMPILED, said.append)
    keys = [("double_block", 0), ("double_block", 1), ("single_block", 0)]

    def model(x, options):
        for key in keys:
            args = {"img": x, "txt": x, "pe": None, "transformer_options": dict(options)}
            block = blocks.around_block(key, torch.nn.Identity())
            block(args, lambda a, key=key: (ran.append(key), {"img": a["img"]})[1])
        return x

    for _ in range(2):
        blocks.around_model(model, torch.ones(1, 2, 3), {"sigmas": torch.ones(1)})
    assert ran == [keys[0], keys[2]] + keys + keys  # one of each kind, once for this size
    assert len(said) == 2 and "half a minute" in said[0]


def test_where_the_compiler_fails_the_run_goes_on_and_the_log_names_the_block(tiny_model, tmp_path, caplog):
    """The C++ compiler is really missing; the next run, with it, compiles."""
    torch._dynamo.reset()
    stock = sample(tiny_model, "a red circle", **SMALL)
    model = engine.edit(tiny_model, compile=CompileConfig(cache_folder=str(tmp_path / "fails")))
    missing = {"cpp.cxx": (str(tmp_path / "no-such-compiler"),), "fx_graph_cache": False}
    with inductor.patch(missing), torch._functorch.config.patch(enable_autograd_cache=False):
        assert relative_error(sample(model, "a red circle", **SMALL), stock) < 1e-6
    assert "double_block 0 failed, this run goes on uncompiled" in caplog.text
    torch._dynamo.reset()
    compilations = Compilations()
    assert relative_error(sample(model, "a red circle", **SMALL), stock) < 1e-5
    assert compilations.new() == 2


def test_past_the_limit_of_graphs_the_run_goes_on(tiny_model, monkeypatch, caplog):
    monkeypatch.setattr("skein.compilation.blocks.RECOMPILE_LIMIT", 1)
    torch._dynamo.reset()
    compiled = engine.edit(tiny_model, compile=CompileConfig(dynamic="off"))
    for shape in ((1, 16, 1, 8, 8), (1, 16, 1, 8, 12)):
        expected = sample(tiny_model, "a red circle", shape=shape, steps=2)
        assert relative_error(sample(compiled, "a red circle", shape=shape, steps=2), expected) < 1e-5
    assert "this run goes on uncompiled" in caplog.text


def test_blocks_whose_lora_is_put_on_as_they_run_are_not_compiled(tiny_model, monkeypatch, caplog):
    """ComfyUI does so with what is not on the device; each such layer would make another graph of its block."""
    torch._dynamo.reset()
    compilations, patched = Compilations(), with_lora(tiny_model, 1.0, LORA)
    expected = sample(patched, "a red circle", **SMALL)
    memory.unload_all_models()
    planned = engine.edit(patched, compile=COMPILED)
    planned.partially_load(torch.device("cpu"), planned.model_size() // 8)
    assert planned.model.model_lowvram
    with monkeypatch.context() as as_it_is:
        as_it_is.setattr(memory, "load_models_gpu", lambda *a, **k: None)
        assert relative_error(sample(planned, "a red circle", **SMALL), expected) < 1e-5
    planned.detach()
    assert compilations.new() <= 2 and "blocks that are not wholly on the GPU run uncompiled" in caplog.text


def test_the_cache_folder_is_used_and_the_environment_put_back(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/unused")
    torch._dynamo.reset()
    folder = tmp_path / "compiled"
    sample(engine.edit(tiny_model, compile=CompileConfig(cache_folder=str(folder))), "a red circle", **SMALL)
    assert any(folder.rglob("*.py")) and os.environ["TORCHINDUCTOR_CACHE_DIR"] == "/unused"


def test_undo_is_exact_also_after_an_exception(tiny_model):
    before = sample(tiny_model, "a red circle", **SMALL)

    def stop(step, *_):
        raise KeyError(step)

    with pytest.raises(KeyError):
        sample(engine.edit(tiny_model, compile=COMPILED), "a red circle", **SMALL, callback=stop)
    assert type(tiny_model.model.diffusion_model.double_blocks[0]).__name__ == "DoubleStreamBlock"
    assert torch.equal(sample(tiny_model, "a red circle", **SMALL), before)


def test_another_packs_block_replacement_sees_everything(tiny_model):
    """It runs outside of the compiled block, eagerly, with all options and once a call; nothing is compiled for it."""
    seen = []

    def replacement(args, extra):
        seen.append(args["transformer_options"]["sigmas"])
        out = extra["original_block"](args)
        return {**out, "img": out["img"] * 1.01}

    model = tiny_model.clone()
    model.set_model_patch_replace(replacement, "dit", "double_block", 1)
    stock = sample(model, "a red circle", **SMALL)
    sample(engine.edit(tiny_model, compile=COMPILED), "a red circle", **SMALL)
    compilations = Compilations()
    out = sample(engine.edit(model, compile=COMPILED), "a red circle", **SMALL)
    assert relative_error(out, stock) < 1e-5 and len(seen) == 2 * 4
    sample(engine.edit(model, compile=COMPILED, cache=CacheConfig(threshold=0.9)), "a red circle", **SMALL)
    assert recent_runs()[-1].reused > 0 and compilations.new() == 0


def test_cores_own_compilation_is_refused_with_a_sentence(tiny_model):
    from comfy_extras.nodes_torch_compile import TorchCompileModel

    both = TorchCompileModel.execute(engine.edit(tiny_model, compile=COMPILED), "inductor")[0]
    with pytest.raises(ValueError, match="remove one of them"):
        sample(both, "a red circle", **SMALL)
