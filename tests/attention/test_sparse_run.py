"""Sparse attention in a run of the embedded model: where it runs, what it says, and what it runs beside."""

import itertools

import pytest
import torch
from loras import with_lora
from skein import engine, live
from skein.attention.sparse import cost as costs
from skein.attention.sparse import run as sparse_run
from skein.attention.sparse.cost import NO_KERNEL, Cost
from skein.attention.sparse.kernels import PLAIN, SparseKernel
from skein.bench.errors import relative_error
from skein.demo.sampling import conditioning, sample
from skein.plan import AttentionConfig, CacheConfig, CompileConfig, FP8Config, SparseConfig

PROMPT = "a red circle moves left over sand"
SMALL = dict(shape=(1, 16, 3, 24, 24), steps=4)  # 432 tokens and the text: four blocks
SPARSE = SparseConfig(0.3, start_percent=0.0, min_tokens=1)
PARTS = {
    "cache": CacheConfig(threshold=0.3),
    "attention": AttentionConfig(),
    "fp8": FP8Config(),
    "compile": CompileConfig(),
}
SUBSETS = [subset for size in range(5) for subset in itertools.combinations(PARTS, size)]
LORA = ["diffusion_model.double_blocks.1.img_mlp.0", "diffusion_model.single_blocks.2.linear1"]


@pytest.fixture(autouse=True)
def measured_anew(monkeypatch):
    monkeypatch.setattr(sparse_run, "MEASURED", {})


@pytest.fixture
def shown(monkeypatch):
    texts = {}
    monkeypatch.setattr("skein.techniques.show", lambda node, text, about="": texts.update({about or node: text}))
    return texts


def run(model, config=SPARSE, prompt=PROMPT, **changes):
    """The latent, and the run's record."""
    arguments = {**SMALL, **{name: value for name, value in changes.items() if name not in PARTS}}
    plan = {name: value for name, value in changes.items() if name in PARTS}
    out = sample(engine.edit(model, sparse=config, **plan), prompt, **arguments)
    return out, live.sparse_runs()[-1]


@pytest.mark.parametrize("names", SUBSETS, ids="+".join)
@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m"])
def test_with_every_other_technique_two_samplers_and_a_lora(demo_model, names, sampler):
    model = with_lora(demo_model, 1.0, LORA, scale=0.07) if sampler == "dpmpp_2m" else demo_model
    plan = {name: PARTS[name] for name in names}
    stock = sample(model, PROMPT, sampler=sampler, **SMALL)
    out, record = run(model, sampler=sampler, **plan)
    computed = [call for call in record.calls if call.sparse > 1]  # in a reused call the first block alone
    assert record.ended and len(record.calls) == 4 and record.kernel == PLAIN.label
    assert computed and all(call.density < 0.9 and 0 < call.error <= 0.3 for call in computed)
    assert 1e-3 < relative_error(out, stock) < 0.8
    assert torch.equal(sample(model, PROMPT, sampler=sampler, **SMALL), stock)


def test_no_error_and_short_sequences_are_bit_equal(demo_model):
    stock, before = sample(demo_model, PROMPT, **SMALL), len(live.sparse_runs())
    for config in (SparseConfig(0.0), SparseConfig(0.0, min_tokens=1)):
        assert torch.equal(sample(engine.edit(demo_model, sparse=config), PROMPT, **SMALL), stock)
    assert len(live.sparse_runs()) == before
    assert relative_error(run(demo_model, SparseConfig(0.3, min_tokens=5000))[0], stock) == 0
    assert live.sparse_runs()[-1].summary() == "all attention was dense"


def test_one_run_is_as_the_next(demo_model):
    (first, one), (second, two) = run(demo_model), run(demo_model)
    assert torch.equal(first, second) and one.id != two.id
    assert [(call.density, call.error) for call in one.calls] == [(call.density, call.error) for call in two.calls]


def test_a_larger_error_computes_less_and_is_further_off(demo_model):
    stock = sample(demo_model, PROMPT, **SMALL)
    found = [run(demo_model, SparseConfig(e, start_percent=0.0, min_tokens=1)) for e in (0.05, 0.2, 0.5)]
    density = [record.density for _, record in found]
    errors = [relative_error(out, stock) for out, _ in found]
    assert density == sorted(density, reverse=True) and errors == sorted(errors) and density[0] > density[-1] + 0.2
    assert all(record.error <= record.max_error for _, record in found)


def test_the_first_steps_and_named_blocks_stay_dense(demo_model):
    _, record = run(demo_model, SparseConfig(0.3, start_percent=0.5, end_percent=0.8, min_tokens=1), steps=10)
    sparse = [call.step for call in record.calls if call.sparse]
    assert sparse and sparse == list(range(sparse[0], sparse[-1] + 1)) and sparse[0] > 0 and sparse[-1] < 9
    assert all(call.density == 1.0 and call.error == 0.0 for call in record.calls if not call.sparse)
    _, all_blocks = run(demo_model)
    _, some = run(demo_model, SparseConfig(0.3, start_percent=0.0, min_tokens=1, dense_blocks="0-1, -1"))
    left_out = {"double_blocks.0", "double_blocks.1", all_blocks.layers[-1].path}
    assert {layer.path for layer in all_blocks.layers} - {layer.path for layer in some.layers} == left_out


def test_the_record_tells_of_each_head(demo_model):
    _, record = run(demo_model)
    network = demo_model.model.diffusion_model
    assert [layer.path for layer in record.layers] == [
        *(f"double_blocks.{i}" for i in range(len(network.double_blocks))),
        *(f"single_blocks.{i}" for i in range(len(network.single_blocks))),
    ]
    for layer in record.layers:
        assert len(layer.density) == len(layer.error) == network.num_heads and layer.calls == 4
        assert all(0 < each <= 1 for each in layer.density) and all(0 <= each < 1.5 for each in layer.error)
    assert record.speedup > 0 and all(call.ms > 0 for call in record.calls)
    assert record.summary().startswith(f"{100 * record.density:.0f} % of attention computed, ")


def test_guidance_and_batches_choose_for_each_sample(demo_model):
    arguments = dict(cfg=3.0, negative="a blue square", latent=torch.zeros(2, 16, 3, 24, 24))
    stock = sample(demo_model, PROMPT, **{**SMALL, **arguments})
    out, record = run(demo_model, SparseConfig(0.1, start_percent=0.0, min_tokens=1), **arguments)
    assert record.density < 0.95 and 1e-4 < relative_error(out, stock) < 0.6


def test_text_with_padding_is_cut(demo_model):
    text, extra = conditioning(PROMPT)[0]
    padded = torch.cat([text, torch.ones(1, 9, text.shape[2])], dim=1)
    mask = (torch.arange(padded.shape[1]) < text.shape[1]).long()[None]
    out, record = run(demo_model, prompt=[[padded, {**extra, "attention_mask": mask}]])
    assert record.density < 0.9 and torch.equal(out, run(demo_model)[0])


def test_a_mask_with_holes_is_dense_and_said(demo_model, shown):
    text, extra = conditioning(PROMPT)[0]
    mask = torch.ones(1, text.shape[1], dtype=torch.long)
    mask[0, 1] = 0
    prompt = [[text, {**extra, "attention_mask": mask}]]
    out, record = run(demo_model, prompt=prompt)
    assert relative_error(out, sample(demo_model, prompt, **SMALL)) < 1e-5
    assert not any(call.sparse for call in record.calls) and "attention with a mask runs dense" in shown["sparse"]


def test_without_a_number_of_tokens_it_runs_where_it_is_faster(demo_model, shown, monkeypatch):
    found, said = [], []
    for cost in (Cost(PLAIN, 100.0, 1.0, 12.0), Cost(PLAIN, 10.0, 11.0, 1.0), Cost(PLAIN, 10.0, 9.0, 5.0)):
        monkeypatch.setattr(sparse_run, "MEASURED", {})
        monkeypatch.setattr(sparse_run, "measure", lambda *_, cost=cost: cost)
        _, record = run(demo_model, SparseConfig(0.3, start_percent=0.0))
        found.append([call.sparse for call in record.calls])
        said.append(shown["sparse"])
    layers = len(demo_model.model.diffusion_model.double_blocks) + len(demo_model.model.diffusion_model.single_blocks)
    assert found[0] == [layers] * 4
    assert found[1] == [0] * 4 and "dense attention is faster at 439 tokens" in said[1]
    assert found[2][0] == layers and sum(found[2][1:]) == 0  # what it leaves out is known after the first call


def broken(obstacle=None, fails_after=None):
    """A kernel that works for some calls, then raises."""
    calls = itertools.count()

    def compute(q, k, v, kept):
        if fails_after is None:
            return q.transpose(1, 2) * 0, torch.zeros(q.shape[:3])
        if next(calls) >= fails_after:
            raise RuntimeError("out of order")
        return PLAIN.run(q, k, v, kept)

    return SparseKernel("a broken kernel", lambda problem: obstacle, compute)


def test_a_kernel_that_computes_something_else_or_fails_is_not_used(demo_model, shown, monkeypatch, caplog):
    exact = sample(demo_model, PROMPT, **SMALL)
    monkeypatch.setattr(costs, "SPARSE_KERNELS", (broken(), PLAIN))
    out, record = run(demo_model)
    assert record.kernel == PLAIN.label and relative_error(out, exact) < 0.8
    assert "relative error 1 against plain attention" in caplog.text
    monkeypatch.setattr(sparse_run, "MEASURED", {})
    monkeypatch.setattr(costs, "SPARSE_KERNELS", (broken(),))
    assert relative_error(run(demo_model)[0], exact) < 1e-5
    assert "a broken kernel failed" in shown["sparse"]
    monkeypatch.setattr(sparse_run, "MEASURED", {})
    monkeypatch.setattr(costs, "SPARSE_KERNELS", (broken(fails_after=9),))
    out, record = run(demo_model)
    assert "attention is dense from here on (out of order)" in shown["sparse"] and torch.isfinite(out).all()
    assert not any(call.sparse for call in record.calls)
    monkeypatch.setattr(sparse_run, "MEASURED", {})
    monkeypatch.setattr(costs, "SPARSE_KERNELS", (broken(obstacle="it is for another card"),))
    assert relative_error(run(demo_model)[0], exact) < 1e-5
    assert "attention of 439 tokens is dense: it is for another card" in shown["sparse"]


def test_out_of_memory_is_raised(demo_model, monkeypatch):
    def full(q, k, v, kept):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(costs, "SPARSE_KERNELS", (SparseKernel("full", lambda problem: None, full),))
    with pytest.raises(torch.OutOfMemoryError):
        run(demo_model)
    monkeypatch.undo()
    assert torch.isfinite(run(demo_model)[0]).all()


def test_another_nodes_attention_and_who_wins(demo_model, shown):
    """As ComfyUI's own sparse attention sets one."""
    theirs = []

    def attention(func, q, k, v, heads, **kwargs):
        theirs.append(kwargs["transformer_options"].get("block_index"))
        return func(q, k, v, heads, **kwargs)

    model = demo_model.clone()
    model.model_options["transformer_options"]["optimized_attention_override"] = attention
    out, record = run(model)
    assert "in the blocks Skein's sparse attention runs in place of another node's" in shown["sparse"]
    assert all(call.sparse for call in record.calls)
    assert [block for block in theirs if block is not None] == [0, 0]  # it was timed; the others: in the text refiner
    assert torch.equal(out, run(demo_model)[0])


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (dict(max_error=-0.1), "max_error must lie between 0 and 1"),
        (dict(max_error=float("nan")), "max_error must lie between 0 and 1"),
        (dict(density=0.0), "density must lie above 0"),
        (dict(density=float("nan")), "density must lie above 0"),
        (dict(tau=float("inf")), "tau must lie between"),
        (dict(rule="best"), "must be one of max_error, density, tau"),
        (dict(start_percent=0.5, end_percent=0.2), "swap the two"),
        (dict(min_tokens=-1), "min_tokens must be 0"),
        (dict(dense_blocks="first"), 'dense_blocks must be numbers of blocks such as "0-2, -1"'),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        SparseConfig(**settings)


def test_blocks_by_their_numbers():
    dense = SparseConfig(dense_blocks="0-2, 7 ,-1,")
    assert [n for n in range(20) if dense.stays_dense(n, 20)] == [0, 1, 2, 7, 19]
    assert not any(SparseConfig().stays_dense(n, 20) for n in range(20))


def test_an_interrupt_leaves_nothing_behind(demo_model):
    stock = sample(demo_model, PROMPT, **SMALL)

    def stop(step, *_):
        if step == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(demo_model, callback=stop)
    record = live.sparse_runs()[-1]
    assert record.ended and 0 < len(record.calls) < 4
    assert torch.equal(sample(demo_model, PROMPT, **SMALL), stock)


def test_the_slowest_process_decides():
    fast, slow = Cost(PLAIN, 10.0, 1.0, 8.0), Cost(PLAIN, 9.0, 2.0, 7.0)
    agreed = fast.agreed(lambda numbers: [max(pair) for pair in zip(numbers, (slow.dense, slow.fixed, slow.whole))])
    assert (agreed.dense, agreed.fixed, agreed.whole) == (10.0, 2.0, 8.0)
    assert agreed.pays(0.5) and not agreed.pays(1.0) and not Cost(None, 10.0, 1.0, NO_KERNEL).pays(0.1)
