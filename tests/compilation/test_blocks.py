"""Compiled blocks on real ComfyUI models: equal to eager, compiled once, and eager again where the compiler fails.

Compilations are counted as PyTorch counts them. Each costs seconds, so the tests share one small model's graphs.
"""

import functools
import os
import subprocess
import sys
from pathlib import Path
from types import MethodType

import comfy.model_management as memory
import pytest
import torch
import torch._inductor.config as inductor
from loras import with_lora
from offloading import Offloading
from skein import engine
from skein.bench.errors import relative_error
from skein.compilation.blocks import CompiledBlocks
from skein.demo.sampling import sample
from skein.models import Forward, ModelCall, Network
from skein.plan import AttentionConfig, CacheConfig, CompileConfig, FP8Config
from skein.report import recent_runs
from small_models import random_hunyuan_video
from torch._dynamo.utils import counters

SMALL = dict(shape=(1, 16, 3, 8, 8), steps=4)
COMPILED = CompileConfig()
LORA = ["diffusion_model.double_blocks.0.img_attn.qkv", "diffusion_model.single_blocks.0.linear1"]


class Compilations:
    """How many graphs were compiled since the last question; no graph may break."""

    def __init__(self):
        self.seen = counters["stats"]["unique_graphs"]
        counters["graph_break"].clear()  # those of other tests

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
    network = Network(random_hunyuan_video(depth_single_blocks=1).model.diffusion_model)

    class Own(Forward):
        """A block's forward that only notes that it has run."""

        def by(self, _forward, values):
            ran.append(str(self))
            return values

        def __str__(self):
            return self.stack.key

    def run(call):
        x = torch.ones(1, 2, 3)
        for block in network.blocks:
            blocks.around_block(call, block, {block.stack.image: x, "txt": x, "transformer_options": {}}, Own(block))
        return x

    for _ in range(2):
        blocks.around_model(ModelCall(network, {"x": torch.ones(1, 2, 3), "transformer_options": {}}), run)
    kinds = ["double_block", "double_block", "single_block"]
    assert ran == kinds[1:] + kinds + kinds  # one of each kind, once for this size
    assert len(said) == 2 and "half a minute" in said[0]


NO_CACHES = {"fx_graph_cache": False}


def test_where_the_compiler_fails_the_run_goes_on_and_the_log_names_the_block(tiny_model, tmp_path, caplog):
    """The C++ compiler is really missing; the next run, with it, compiles."""
    torch._dynamo.reset()
    stock = sample(tiny_model, "a red circle", **SMALL)
    model = engine.edit(tiny_model, compile=COMPILED)
    missing = {"cpp.cxx": (str(tmp_path / "no-such-compiler"),), **NO_CACHES}
    with inductor.patch(missing), torch._functorch.config.patch(enable_autograd_cache=False):
        assert relative_error(sample(model, "a red circle", **SMALL), stock) < 1e-6
    assert "double_block 0 failed, this run goes on uncompiled (PyTorch finds no C++ compiler" in caplog.text
    torch._dynamo.reset()
    compilations = Compilations()
    assert relative_error(sample(model, "a red circle", **SMALL), stock) < 1e-5
    assert compilations.new() == 2


@pytest.mark.parametrize(
    ("folder", "why"), [("with a space", "has a space or a letter in its path"), ("plain", "the C++ compiler fails: ")]
)
def test_what_a_c_compiler_says_is_told_in_words(tmp_path, folder, why):
    """A folder whose name it takes for two files; and a compiler that refuses everything."""
    environment = {
        **os.environ,
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / folder),
        "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1",
        **({"CXX": str(compiler_that_fails(tmp_path))} if folder == "plain" else {}),
    }
    script = Path(__file__).parent / "compile_once.py"
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and float(done.stdout) < 1e-6, done.stderr
    assert why in done.stderr and "inductor" not in done.stderr.partition("uncompiled")[2].splitlines()[0]


def compiler_that_fails(folder):
    """One that has a version, and refuses each program."""
    path = folder / "c++"
    path.write_text('#!/bin/sh\ncase "$*" in *--version*) exec g++ "$@";; esac\necho "fatal error: no" >&2\nexit 1\n')
    path.chmod(0o755)
    return path


@pytest.mark.parametrize("way", ["on the block", "object patch", "on a layer"])
def test_a_forward_that_another_pack_has_put_on_a_block(way, caplog):
    """A bound functools.partial: set on a module, PyTorch does not trace it, and the blocks run eagerly; as an object
    patch it was traced (PyTorch 2.14; no promise). The forward runs in the blocks either way."""
    model = random_hunyuan_video().clone()
    block = model.model.diffusion_model.double_blocks[0]
    owner = block.img_attn.qkv if way == "on a layer" else block
    original = type(owner).forward
    seen = []

    def forward(self, *args, strength, **kwargs):
        seen.append(strength)
        return original(self, *args, **kwargs)

    replaced = MethodType(functools.partial(forward, strength=2.0), owner)
    stock = sample(model, "a red circle", **SMALL)
    if way == "object patch":
        model.add_object_patch("diffusion_model.double_blocks.0.forward", replaced)
    else:
        owner.forward = replaced
    out = sample(engine.edit(model, compile=COMPILED), "a red circle", **SMALL)
    assert relative_error(out, stock) < 1e-5 and len(seen) >= SMALL["steps"]
    assert way == "object patch" or "another node has put a forward of its own on it" in caplog.text


def test_what_is_not_the_compilers_own_is_raised_as_it_is(tiny_model):
    """An error of the attention, which runs inside of the compiled block."""

    def fails(func, q, k, v, heads, **kwargs):
        raise ZeroDivisionError("mine")

    model = tiny_model.clone()
    sample(engine.edit(model, compile=COMPILED), "a red circle", **SMALL)  # compiled before
    options = model.model_options["transformer_options"]
    options["optimized_attention_override"] = lambda func, *args, **kwargs: (
        fails(func, *args, **kwargs) if "block_index" in kwargs["transformer_options"] else func(*args, **kwargs)
    )
    for reset in (False, True):
        if reset:
            torch._dynamo.reset()
        with pytest.raises(ZeroDivisionError, match="mine"):
            sample(engine.edit(model, compile=COMPILED), "a red circle", **SMALL)


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


@pytest.mark.parametrize("fp8", [{}, {"fp8": FP8Config()}], ids=["", "fp8"])
def test_blocks_whose_weights_come_and_go_are_not_recorded(tiny_model, monkeypatch, recorder, fp8):
    """A CUDA graph reads weights where they were. Nor are they compiled anew."""
    compiled = engine.edit(tiny_model, compile=CompileConfig(warm_up=False), **fp8)
    whole, compilations = sample(compiled, "a red circle", **SMALL), Compilations()
    assert recorder.calls.count("record") == 4
    recorder.calls.clear()
    offloading = Offloading(monkeypatch)
    offloading.paths = ["double_blocks.1", "single_blocks.0"]
    assert torch.equal(sample(offloading.put_on(compiled), "a red circle", **SMALL), whole)
    assert recorder.calls.count("record") == 2 and compilations.new() == 0


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
