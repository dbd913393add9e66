"""Compiled blocks in slices: the same result, one graph for each part of a kind of block, and in each graph only what
that part computes.
"""

import pytest
import torch
from skein import engine, live
from skein.attributes import changed
from skein.bench.errors import relative_error
from skein.compilation.blocks import compile_settings
from skein.compilation.errors import FORWARD, reason
from skein.models import Network
from skein.plan import AttentionConfig, CacheConfig, CompileConfig, FP8Config, SlicesConfig
from skein.slices.layers import before_attention
from tiny_models import CASES, sample
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters

HUNYUAN = CASES["HunyuanVideo"]
PRODUCTS = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default}


@pytest.fixture
def graphs(monkeypatch):
    """Each compiled graph; no code is made of it."""
    found = []

    def keep(graph, _inputs):
        found.append(graph.graph)
        return graph

    def settings(config):
        return {**compile_settings(config), "backend": aot_autograd(fw_compiler=keep, inference_compiler=keep)}

    monkeypatch.setattr("skein.compilation.blocks.compile_settings", settings)
    torch._dynamo.reset()
    yield found
    torch._dynamo.reset()


def widths(graph):
    """Of what a graph's layers compute, in hidden states: 6 and 3 are modulation."""
    return sorted(node.meta["val"].shape[-1] // 256 for node in graph.nodes if node.target in PRODUCTS)


def test_each_part_computes_what_the_other_does_not(graphs):
    stock, plan = sample(HUNYUAN, HUNYUAN.patcher()), {"compile": CompileConfig(), "attention": AttentionConfig()}
    assert relative_error(sample(HUNYUAN, engine.edit(HUNYUAN.patcher(), **plan)), stock) < 1e-5
    assert [widths(graph) for graph in graphs] == [[1, 1, 1, 1, 3, 3, 4, 4, 6, 6], [1, 3, 7]]
    graphs.clear()
    sliced = engine.edit(HUNYUAN.patcher(), slices=SlicesConfig(4), **plan)
    assert relative_error(sample(HUNYUAN, sliced), stock) < 1e-5
    assert [widths(graph) for graph in graphs] == [[3, 3, 6, 6], [1, 1, 1, 1, 4, 4, 6, 6], [3, 3], [1, 3, 4]]


@pytest.mark.parametrize("plan", [{}, {"fp8": FP8Config()}, {"fp8": FP8Config(mode="per_tensor")}], ids=str)
def test_a_part_is_given_the_rows_of_weights_that_it_needs(graphs, plan):
    """PyTorch 2.11 makes no FP8 product of a bias that is a piece of a graph's input on a GPU."""
    plan = {**plan, "compile": CompileConfig(), "attention": AttentionConfig(), "slices": SlicesConfig(4)}
    sample(HUNYUAN, engine.edit(HUNYUAN.patcher(), **plan))
    assert len(graphs) == 4
    for graph in graphs:
        pieces = [node.args[0] for node in graph.nodes if node.target is torch.ops.aten.slice.Tensor]
        assert not [piece for piece in pieces if piece.op == "placeholder" and piece.meta["val"].shape[0] > 256]


def test_what_the_compiler_fails_of_runs_eagerly_in_slices(monkeypatch):
    def fail(*_):
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(
        "skein.compilation.blocks.compile_settings", lambda config: {**compile_settings(config), "backend": fail}
    )
    torch._dynamo.reset()
    patcher, seen = HUNYUAN.patcher(), []
    stock = sample(HUNYUAN, patcher)
    layer = patcher.model.diffusion_model.double_blocks[0].img_mlp[2]
    out = sample(HUNYUAN, engine.edit(patcher, slices=SlicesConfig(4), compile=CompileConfig()))
    assert relative_error(out, stock) < 3e-6
    assert live.snapshot()["sampling"]["notes"]["compile"].startswith("uncompiled")
    layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[1]))
    plan = {"slices": SlicesConfig(4), "compile": CompileConfig(warm_up=False)}
    sample(HUNYUAN, engine.edit(patcher, **plan), steps=1)
    assert seen == [9] * 4
    torch._dynamo.reset()


def test_what_a_part_puts_on_a_layer_is_not_taken_for_another_nodes():
    """The reason that a block could not be compiled for is the compiler's."""
    module, width = HUNYUAN.patcher().model.diffusion_model, 256
    block = Network(module).blocks[-1]
    with changed(before_attention(block, width)):
        assert reason(RuntimeError("the compiler's"), block.module, block.module.forward).endswith("the compiler's")
    block.module.linear2.forward = lambda x: x
    assert reason(RuntimeError("the compiler's"), block.module, block.module.forward) == FORWARD


def test_compiled_once_for_every_run():
    """Compiled by Inductor; with the cache and FP8 too. Slices of one size, or of another: 36 image tokens in 4 and 5
    (which become 6), 43 of the sequence."""
    torch._dynamo.reset()
    patcher = HUNYUAN.patcher()
    stock, before = sample(HUNYUAN, patcher, steps=4), counters["stats"]["unique_graphs"]
    plan = {"compile": CompileConfig(), "attention": AttentionConfig(), "slices": SlicesConfig(4)}
    assert relative_error(sample(HUNYUAN, engine.edit(patcher, **plan), steps=4), stock) < 1e-5
    assert counters["stats"]["unique_graphs"] - before == 4
    again = sample(HUNYUAN, engine.edit(patcher, cache=CacheConfig(threshold=1e-9, order=0), **plan), steps=4)
    assert relative_error(again, stock) < 1e-5 and counters["stats"]["unique_graphs"] - before == 4
    fp8 = {**plan, "fp8": FP8Config()}
    whole = sample(HUNYUAN, engine.edit(patcher, **{**fp8, "slices": SlicesConfig(1)}), steps=4)
    before = counters["stats"]["unique_graphs"]
    assert relative_error(sample(HUNYUAN, engine.edit(patcher, **fp8), steps=4), whole) < 0.02
    assert counters["stats"]["unique_graphs"] - before == 4
    assert torch.equal(sample(HUNYUAN, patcher, steps=4), stock)
