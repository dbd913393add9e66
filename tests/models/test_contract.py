"""What holds for each architecture that has a page in models/families: on a tiny random model of ComfyUI's own class,
through ComfyUI's sampler. Sharing over ranks is in test_ranks.py.
"""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from comfy.patcher_extension import WrappersMP
from offloading import Offloading
from skein import engine, live
from skein.attention.sparse import plain, selection
from skein.attention.sparse import run as sparse_run
from skein.bench.errors import relative_error
from skein.compilation.blocks import compile_settings
from skein.models import Network, Seam
from skein.plan import AttentionConfig, CacheConfig, CompileConfig, FP8Config, ParallelConfig, SparseConfig
from skein.report import recent_runs
from tiny_models import CASES, NOT_SHARED, guidance, sample

README = Path(__file__).parents[2] / "README.md"
HELP = README.parent / "web" / "docs" / "SkeinFirstBlockCache.md"
ON_RECORD = {  # models whose threshold users read, and by which name
    "HunyuanVideo": "HunyuanVideo", "FLUX.1": "FLUX", "Mochi": "Mochi", "CogVideoX": "CogVideoX", "Wan 2.1": "Wan",
    "LTX-Video": "LTX-Video", "SD3": "SD3",
}  # fmt: skip
NOT_RECORDED = ("Chroma", "FLUX.2", "LTX-2")  # their blocks are given tensors inside of objects
PLANS = {
    "cache": CacheConfig(threshold=1e-9, order=0),
    "attention": AttentionConfig(),
    "fp8": FP8Config(),
    "compile": CompileConfig(),
    "parallel": ParallelConfig("cpu,cpu"),
    "sparse": SparseConfig(0.2, start_percent=0.0, min_tokens=1),
}
BOUNDS = {"cache": 0.0, "attention": 1e-5, "fp8": 0.2, "compile": 1e-5}
AT_WORK = {"attention": "FlashAttention-2 runs", "compile": "compiled", "fp8": "FP8: "}  # what each says then
NOT_QUANTIZED = ("OmniGen 2", "Boogu")  # no layer of theirs has sides that are multiples of 16, nor has the real one


@pytest.fixture(scope="module", params=CASES)
def model(request):
    case = CASES[request.param]
    patcher = case.patcher()
    return SimpleNamespace(name=request.param, case=case, patcher=patcher, stock=sample(case, patcher))


@pytest.fixture(autouse=True)
def _traced_only(monkeypatch):
    """PyTorch traces whole graphs, and makes no code of them, which takes a minute a model and is tested elsewhere."""
    monkeypatch.setattr(
        "skein.compilation.blocks.compile_settings", lambda config: {**compile_settings(config), "backend": "eager"}
    )
    torch._dynamo.reset()


def refused(model, technique):
    return technique in Network(model.patcher.model.diffusion_model).architecture.refuses


def test_wrappers_that_do_nothing_change_nothing_and_find_the_image(model):
    network, seam = Network(model.patcher.model.diffusion_model), Seam()
    calls, seen = [], []
    seam.models.append(lambda call, run: (calls.append(call), run(call))[1])

    def around_block(call, block, values, run):
        before = call.image(block, values).shape
        out = run(values)
        seen.append((block.index, before == call.image(block, out).shape, before[1]))
        return out

    seam.blocks.append(around_block)

    def around(executor, *args, **kwargs):
        with seam.on(executor.class_obj.diffusion_model):
            return executor(*args, **kwargs)

    patcher = model.patcher.clone()
    patcher.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "test", around)
    assert torch.equal(sample(model.case, patcher), model.stock)
    in_stacks = [each for each in seen if each[0] < len(network.blocks)]
    assert len(calls) == 2 and len(in_stacks) >= 2 * len(network.blocks) and all(same for _, same, _ in seen)
    if not network.architecture.whole and not model.case.extra.get("reference_latents") and not model.case.audio:
        assert {tokens for *_, tokens in seen} == {network.tokens(model.case.latent)}
    assert not any("forward" in vars(module) or "_forward" in vars(module) for module in network.module.modules())


def test_width_and_heads_are_those_of_the_blocks(model):
    network = Network(model.patcher.model.diffusion_model)
    assert network.width % network.heads == 0 and network.width >= 128
    assert any(network.width in weight.shape for weight in network.blocks[0].module.parameters())


def test_the_table_in_the_readme_is_true(model):
    """Of what the other tests here and in test_ranks.py show."""
    rows = [line.strip("| ").split(" | ") for line in README.read_text().splitlines() if line.startswith("| ")]
    (cells,) = [cells for names, *cells in rows if model.name in names.split(", ") and len(cells) == len(PLANS) - 1]
    refuses = Network(model.patcher.model.diffusion_model).architecture.refuses
    works = {name: name not in refuses for name in ("cache", "attention", "compile", "fp8", "parallel")}
    works["fp8"] &= model.name not in NOT_QUANTIZED
    assert cells == ["yes" if each else "no" for each in works.values()]


def test_the_cache_takes_the_models_threshold_unless_one_is_named(model):
    default = Network(model.patcher.model.diffusion_model).architecture.threshold
    plans = [engine.plan_of(engine.edit(model.patcher, cache=CacheConfig(*named))) for named in ([], [0.25])]
    assert [plan.cache.threshold for plan in plans] == [default, 0.25]
    if model.name in ON_RECORD:
        for page in (README, HELP):
            assert f"{ON_RECORD[model.name]} {default:g}" in " ".join(page.read_text().split())
    assert default == {"HunyuanVideo": 0.06, "FLUX.1": 0.08, "CogVideoX": 0.04}.get(model.name, default)


@pytest.mark.parametrize("technique", ["cache", "attention", "compile", "fp8"])
def test_each_technique_is_within_its_bound_and_leaves_nothing(model, technique):
    if refused(model, technique):
        with pytest.raises(ValueError, match=f"cannot work with {type(model.patcher.model.diffusion_model).__name__}"):
            engine.edit(model.patcher, **{technique: PLANS[technique]})
        return
    out = sample(model.case, engine.edit(model.patcher, **{technique: PLANS[technique]}))
    error, said = relative_error(out, model.stock), live.snapshot()["sampling"]["notes"].get(technique, "")
    print(f"{model.name}, {technique}: {error:.1e} ({said})")
    assert error <= BOUNDS[technique] and "cannot be replaced" not in said
    if technique == "cache":
        assert [call.reused for call in recent_runs()[-1].calls] == [False, False]
    elif technique == "fp8" and model.name in NOT_QUANTIZED:
        assert said.startswith("No layer of this model's blocks")
    else:
        assert said.startswith(AT_WORK[technique]), said
    if technique == "fp8":
        assert (error > 1e-4) == (model.name not in NOT_QUANTIZED)
    assert torch.equal(sample(model.case, model.patcher), model.stock)


@pytest.fixture
def small_blocks(monkeypatch):
    """Sparse attention in blocks of 8 tokens, so that these short sequences have several."""
    for module in (plain, selection):
        monkeypatch.setattr(module, "BLOCK", 8)
    monkeypatch.setattr(sparse_run, "MEASURED", {})


def test_sparse_attention_finds_image_and_text(model, small_blocks, monkeypatch):
    """It leaves out blocks of the image only, wherever the image's tokens attend to themselves."""
    if refused(model, "sparse"):
        with pytest.raises(ValueError, match="Sparse Attention cannot work with"):
            engine.edit(model.patcher, sparse=PLANS["sparse"])
        return
    texts = []

    def chosen(q, k, v, text, *arguments):
        found = selection.choose(q, k, v, text, *arguments)
        first, last = text.start // 8, (text.stop - 1) // 8 + 1 if text else 0
        texts.append((q.shape[2], len(text)))
        assert len(text) < q.shape[2] and found.kept[:, :, first:last].all() and found.kept[..., first:last].all()
        return found

    monkeypatch.setattr(sparse_run, "choose", chosen)
    out = sample(model.case, engine.edit(model.patcher, sparse=PLANS["sparse"]))
    record, network = live.sparse_runs()[-1], Network(model.patcher.model.diffusion_model)
    print(f"{model.name}: {record.summary()}, sequences and text {sorted(set(texts))}")
    assert {layer.path.split(" ")[0] for layer in record.layers} == {block.path for block in network.blocks}
    assert record.density < 1.0 and relative_error(out, model.stock) < 0.3
    joint = any(stack.order for stack in network.architecture.stacks) and not network.architecture.whole
    assert any(length for _, length in texts) == joint
    assert torch.equal(sample(model.case, model.patcher), model.stock)


def test_blocks_as_cuda_graphs_compute_the_same(model, recorder):
    """What a block changes of its inputs, or keeps of them, is no longer the caller's tensors."""
    if refused(model, "compile"):
        pytest.skip("the model's page refuses Compile, which the test above checks")
    out = sample(model.case, engine.edit(model.patcher, compile=CompileConfig()), steps=3)
    assert relative_error(out, sample(model.case, model.patcher, steps=3)) <= BOUNDS["compile"]
    assert ("replay" in recorder.calls) == (model.name not in NOT_RECORDED)


def test_weights_off_the_device_come_for_each_block(model, monkeypatch):
    patcher = engine.edit(model.patcher, fp8=FP8Config())
    whole = sample(model.case, patcher)
    offloading = Offloading(monkeypatch)
    assert torch.equal(sample(model.case, offloading.put_on(patcher)), whole)
    assert offloading.fetched and offloading.log.count("begun") == offloading.log.count("came")


def test_a_reused_call_is_what_a_computed_one_would_be(model):
    """The same call three times, as no sampler makes them: with nothing to predict, a hit gives the same output."""
    outputs = []

    def again(denoise, x, sigmas, extra_args=None, **_):
        sigma = sigmas[1] * x.new_ones([x.shape[0]])
        outputs.extend(denoise(x, sigma, **(extra_args or {})) for _ in range(3))
        return outputs[-1]

    sample(model.case, engine.edit(model.patcher, cache=CacheConfig(threshold=0.5, order=0)), sampler=again)
    assert [call.reused for call in recent_runs()[-1].calls] == [False, True, True]
    assert relative_error(outputs[2], outputs[0]) < 1e-6


def test_everything_together(model):
    names = [name for name in ("cache", "attention", "fp8", "compile") if not refused(model, name)]
    plan = {name: PLANS[name] for name in names} | {"cache": CacheConfig(threshold=0.9, order=0)}
    how = {"steps": 4, "cfg": guidance(model.name), "near": True}
    out = sample(model.case, engine.edit(model.patcher, **plan), **how)
    error = relative_error(out, sample(model.case, model.patcher, **how))
    print(f"{model.name}: {recent_runs()[-1].reused} calls reused, error {error:.2f}")
    assert error < 0.5 and recent_runs()[-1].reused > 0


@pytest.mark.parametrize("name", NOT_SHARED)
def test_what_cannot_be_shared_is_refused(name):
    with pytest.raises(ValueError, match="Context Parallel cannot work with"):
        engine.edit(CASES[name].patcher(), parallel=PLANS["parallel"])


def test_a_block_that_is_called_otherwise_gets_a_sentence():
    """Another pack's block in the model's place, or a ComfyUI that has changed its own."""
    patcher = CASES["FLUX.1"].patcher().clone()

    class Another(torch.nn.Module):
        def forward(self, hidden, **rest):
            return hidden

    patcher.add_object_patch("diffusion_model.single_blocks.0", Another())
    with pytest.raises(ValueError, match="does not know the arguments of single_block 0 of this model"):
        sample(CASES["FLUX.1"], engine.edit(patcher, cache=PLANS["cache"]))
