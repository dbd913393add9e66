"""Sparse attention's parts on a CPU: what is kept, the error that is promised, and the kernels' interface."""

import pytest
import torch
from interpreter import interpret
from pack import ROOT
from skein.attention.kernels.kernel import Problem, plain_attention
from skein.attention.sparse import kernels
from skein.attention.sparse.kernels import SPARSE_KERNELS, flex_blocks, lists, within_32_bits
from skein.attention.sparse.plain import (
    BLOCK,
    add_tail,
    block_outputs,
    means,
    sparse_attention,
    sparse_attention_of_rows,
)
from skein.attention.sparse.selection import Heads, choose, deviations, pool, sampled_rows, shares
from skein.plan import SparseConfig

TOKENS, TEXT = 1500, range(1400, 1500)


def inputs(seed=0, heads=3, batch=1, width=1.5):
    """Queries and keys near each other in place attend to each other, more or less by head."""
    generator = torch.Generator().manual_seed(seed)
    place = torch.arange(TOKENS)[:, None] / TOKENS * torch.arange(1, 17) * 6.28
    waves = torch.cat([place.sin(), place.cos()], dim=1)
    sharp = torch.linspace(0.3, width, heads)[:, None, None]
    q, k, v = (torch.randn(batch, heads, TOKENS, 32, generator=generator) for _ in range(3))
    return sharp * (waves + 0.3 * q), sharp * (waves + 0.3 * k), v + waves


def computed(q, k, v, chosen, tail=True):
    out, sums = sparse_attention(q, k, v, chosen.kept)
    return add_tail(out, sums, q, chosen.k.means, chosen.v.means, chosen.k.counts, chosen.kept) if tail else out


def root_mean_square(values):
    return float(values.square().mean().sqrt())


def error(out, exact):
    return ((out - exact).square().sum(dim=(1, 2, 3)) / exact.square().sum(dim=(1, 2, 3))).sqrt()


@pytest.mark.parametrize("tail", [True, False])
@pytest.mark.parametrize("max_error", [0.02, 0.05, 0.1, 0.2])
def test_the_error_stays_below_what_is_accepted(max_error, tail):
    measured, true = [], []
    for seed in range(6):
        q, k, v = inputs(seed, batch=2, width=1.0)
        chosen = choose(q, k, v, TEXT, SparseConfig(max_error, tail=tail), turn=seed)
        measured.append(chosen.error)
        true.append(error(computed(q, k, v, chosen, tail), plain_attention(q, k, v)))
    measured, true = torch.cat(measured), torch.cat(true)
    assert (measured <= max_error).all() and (true <= max_error).float().mean() >= 0.75
    assert root_mean_square(measured) == pytest.approx(root_mean_square(true), rel=0.2, abs=0.002)


def test_more_error_leaves_more_out_and_text_is_whole():
    q, k, v = inputs()
    densities = [choose(q, k, v, TEXT, SparseConfig(e)).density.mean() for e in (0.01, 0.05, 0.1, 0.3)]
    assert densities == sorted(densities, reverse=True) and densities[-1] < 0.5 < densities[0]
    kept = choose(q, k, v, TEXT, SparseConfig(0.3)).kept
    first = TEXT.start // BLOCK
    assert kept[:, :, first:].all() and kept[..., first:].all() and not kept.all()


def test_no_error_is_dense():
    q, k, v = inputs()
    chosen = choose(q, k, v, TEXT, SparseConfig(0.0))
    assert chosen.kept.all() and (chosen.error < 1e-6).all()


def test_each_sample_of_a_batch_has_blocks_of_its_own():
    q, k, v = (torch.cat(pair) for pair in zip(inputs(0), inputs(1, width=0.5)))
    config = SparseConfig(0.1)
    both = choose(q, k, v, TEXT, config)
    for sample in range(2):
        one = slice(sample, sample + 1)
        assert torch.equal(both.kept[one], choose(q[one], k[one], v[one], TEXT, config).kept)
    assert not torch.equal(both.kept[0], both.kept[1])


@pytest.mark.parametrize("density", [0.3, 0.6])
def test_a_fixed_density_and_what_it_costs(density):
    q, k, v = inputs()
    config = SparseConfig(rule="density", density=density)
    turns = [choose(q, k, v, range(0), config, turn) for turn in range(12)]  # each measures on other queries
    assert turns[0].density.tolist()[0] == pytest.approx([density] * 3, abs=0.08)
    true = error(computed(q, k, v, turns[0]), plain_attention(q, k, v))
    measured = root_mean_square(torch.cat([chosen.error for chosen in turns]))
    assert measured == pytest.approx(float(true), rel=0.2) and true > 0.01


def test_tau_keeps_what_is_so_many_deviations_above_the_mean():
    q, k, v = inputs()
    kept = choose(q, k, v, range(0), SparseConfig(rule="tau", tau=0.5)).kept
    scores = deviations(pool(q), pool(k))
    assert torch.equal(kept, (scores >= 0.5) | (scores == scores.amax(dim=-1, keepdim=True)))
    assert scores.mean(dim=-1).abs().max() < 1e-5


@pytest.mark.parametrize("rule", [dict(max_error=0.9), dict(rule="density", density=0.01), dict(rule="tau", tau=10.0)])
def test_each_block_of_queries_keeps_a_block_of_keys(rule):
    q, k, v = inputs(width=3.0)
    chosen = choose(q, k, v, range(0), SparseConfig(**rule))
    assert chosen.kept.any(dim=-1).all() and not chosen.kept.all()
    assert torch.isfinite(computed(q, k, v, chosen)).all()


def test_processes_with_some_of_the_heads_choose_what_one_with_all_chooses():
    q, k, v = inputs(heads=4)
    config = SparseConfig(0.1)
    whole, tables = choose(q, k, v, TEXT, config, turn=3), {}

    def part(heads, gather):
        one = slice(*heads)
        return choose(q[:, one], k[:, one], v[:, one], TEXT, config, turn=3, heads=Heads(gather, heads[0]))

    for heads in ((0, 3), (3, 4)):  # what each of them has to tell
        part(heads, lambda table, heads=heads: tables.setdefault(heads, table)[:, [0, 0, 0, 0]])
    told = torch.cat([tables[0, 3], tables[3, 4]], dim=1)
    parts = [part(heads, lambda table: told) for heads in ((0, 3), (3, 4))]
    assert torch.equal(torch.cat([each.kept for each in parts], dim=1), whole.kept)
    assert torch.equal(torch.cat([each.errors for each in parts], dim=1), whole.errors)
    assert all(torch.equal(each.error, whole.error) for each in parts)


def test_a_tail_of_means_is_better_than_none():
    q, k, v = inputs()
    chosen, exact = choose(q, k, v, TEXT, SparseConfig(0.2)), plain_attention(q, k, v)
    assert error(computed(q, k, v, chosen), exact) < 0.8 * error(computed(q, k, v, chosen, tail=False), exact)


def test_all_blocks_are_attention_itself():
    q, k, v = inputs()
    kept = torch.ones(1, 3, 12, 12, dtype=torch.bool)
    out, sums = sparse_attention(q, k, v, kept)
    assert torch.allclose(out, plain_attention(q, k, v), atol=1e-5)
    assert torch.allclose(sums, torch.logsumexp(q @ k.transpose(-1, -2) * 32**-0.5, dim=-1), atol=1e-4)
    counts = pool(k).counts
    assert torch.allclose(add_tail(out, sums, q, means(k), means(v), counts, kept), out, atol=1e-6)


def test_some_rows_are_those_of_the_whole():
    q, k, v = inputs()
    kept = torch.rand(1, 3, 12, 12, generator=torch.Generator().manual_seed(0)) < 0.5
    kept[..., 3] = True
    rows = torch.tensor([0, 127, 128, 700, 1499])
    whole = sparse_attention(q, k, v, kept)[0]
    assert torch.allclose(sparse_attention_of_rows(q, k, v, kept, rows), whole[:, rows], atol=1e-5)


def test_means_of_blocks_and_the_last_shorter_one():
    x = torch.randn(2, 3, 300, 8)
    pooled = pool(x)
    assert pooled.counts.tolist() == [128, 128, 44]
    assert torch.allclose(pooled.means[:, :, 2], x[:, :, 256:].mean(dim=2), atol=1e-6)
    assert torch.allclose(shares(pooled, pooled).sum(dim=-1), torch.tensor(3.0))


def test_blocks_by_themselves_are_merged_to_attention():
    q, k, v = inputs()
    outs, sums = block_outputs(q[:, :, :5], k, v)
    merged = (torch.softmax(sums, dim=-1).unsqueeze(-2) @ outs).squeeze(-2).transpose(1, 2)
    assert torch.allclose(merged, plain_attention(q[:, :, :5], k, v), atol=1e-5)


@pytest.mark.parametrize("text", [range(1400, 1500), range(0, 100), range(0)])
def test_sampled_queries_are_of_the_image_and_others_in_each_turn(text):
    found = [sampled_rows(TOKENS, text, torch.device("cpu"), turn) for turn in (0, 0, 1)]
    for rows in found:
        assert len(rows) == 64 and not set(rows.tolist()) & set(text) and max(rows) < TOKENS
        assert rows.tolist() == sorted(rows.tolist())
    assert torch.equal(found[0], found[1]) and not torch.equal(found[1], found[2])


def test_lists_of_blocks():
    kept = torch.tensor([[[[1, 0, 1], [0, 1, 0]]]], dtype=torch.bool)
    counts, indices = lists(kept)
    assert counts.tolist() == [[[2, 1]]] and indices.dtype == counts.dtype == torch.int32
    assert indices.tolist() == [[[[0, 2, 0], [1, 0, 0]]]]


def test_flex_attention_is_told_of_the_kept_blocks():
    kept = torch.rand(1, 2, 12, 12, generator=torch.Generator().manual_seed(0)) < 0.5
    mask = flex_blocks(kept, TOKENS)
    assert mask.seq_lengths == (TOKENS, TOKENS) and mask.BLOCK_SIZE == (BLOCK, BLOCK)
    assert torch.equal(mask.to_dense().bool(), kept)


def test_flex_attention_is_given_what_32_bits_can_reach(monkeypatch):
    wide = torch.randn(1, 50, 3, 2, 16).permute(2, 0, 3, 1, 4)[2]  # values in a fused projection
    assert within_32_bits(wide) is wide
    monkeypatch.setattr(kernels, "REACH", 4000)
    near = within_32_bits(wide)
    assert torch.equal(near, wide) and near.is_contiguous() and not wide.is_contiguous()
    monkeypatch.setattr(kernels, "REACH", 1000)
    with pytest.raises(ValueError, match="1600 values are too many for FlexAttention"):
        within_32_bits(wide)


def test_which_kernels_say_that_they_cannot():
    problem = Problem(torch.device("cpu"), torch.float32, 3, 32, TOKENS)
    assert [kernel.obstacle(problem) is None for kernel in SPARSE_KERNELS] == [False, False, True]


INTERPRETED = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
import plain, sparse_triton
torch.manual_seed(0)
for width in (64, 48):  # views, and a head dim that is no power of two
    q, k, v = torch.randn(2, 300, 3, 3, width).permute(2, 0, 3, 1, 4)
    kept = torch.rand(2, 3, 3, 3) < 0.4
    kept[..., 0] = True
    kept[0, 0, 1] = True  # nothing is left out
    rows = torch.tensor([3, 100, 200, 250, 299])
    out, sums = plain.sparse_attention(q, k, v, kept)
    tail = sums, q, plain.means(k), plain.means(v), torch.tensor([128.0, 128.0, 44.0]), kept
    for triton, torch_ in (
        (sparse_triton.means(k), plain.means(k)),
        *zip(sparse_triton.block_outputs(q[:, :, rows], k, v), plain.block_outputs(q[:, :, rows], k, v)),
        (sparse_triton.add_tail(out.clone(), *tail), plain.add_tail(out, *tail)),
    ):
        assert torch.allclose(triton, torch_, atol=1e-5), width
print("same")
"""


def test_the_triton_kernels_compute_the_same_under_tritons_interpreter():
    interpret(INTERPRETED, ROOT / "attention" / "sparse")
