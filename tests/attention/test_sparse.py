"""Block-sparse attention on a CPU: what is kept, the error that is promised, and the kernels' interface."""

import pytest
import torch
from skein.attention.kernels.kernel import plain_attention
from skein.attention.sparse.kernels import lists
from skein.attention.sparse.plain import merged, pooled_attention, sparse_attention
from skein.attention.sparse.selection import BLOCK, choose, pool, sampled_rows, shares

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
    out = sparse_attention(q, k, v, chosen.kept)
    return merged(out, pooled_attention(q, pool(k), pool(v), chosen.kept)) if tail else out[0]


def error(out, exact):
    return ((out - exact).square().sum(dim=(1, 2, 3)) / exact.square().sum(dim=(1, 2, 3))).sqrt()


@pytest.mark.parametrize("tail", [True, False])
@pytest.mark.parametrize("max_error", [0.02, 0.05, 0.1, 0.2])
def test_the_error_stays_below_what_is_accepted(max_error, tail):
    held = []
    for seed in range(6):
        q, k, v = inputs(seed, batch=2)
        chosen = choose(q, k, v, TEXT, max_error, tail)
        true = error(computed(q, k, v, chosen, tail), plain_attention(q, k, v))
        held += (true <= max_error).tolist()
        assert (chosen.error <= max_error).all()
        assert torch.allclose(chosen.error, true, rtol=0.35, atol=0.003)
    assert sum(held) >= 0.9 * len(held)


def test_more_error_leaves_more_out_and_text_is_whole():
    q, k, v = inputs()
    densities = [choose(q, k, v, TEXT, e).density.mean() for e in (0.01, 0.05, 0.1, 0.3)]
    assert densities == sorted(densities, reverse=True) and densities[-1] < 0.5 < densities[0]
    kept = choose(q, k, v, TEXT, 0.3).kept
    first = TEXT.start // BLOCK
    assert kept[:, :, first:].all() and kept[..., first:].all() and not kept.all()


def test_no_error_is_dense():
    q, k, v = inputs()
    chosen = choose(q, k, v, TEXT, 0.0)
    assert chosen.kept.all() and not chosen.error.any()


def test_a_tail_of_means_is_better_than_none():
    q, k, v = inputs()
    chosen, exact = choose(q, k, v, TEXT, 0.2), plain_attention(q, k, v)
    assert error(computed(q, k, v, chosen), exact) < 0.8 * error(computed(q, k, v, chosen, tail=False), exact)


def test_all_blocks_are_attention_itself():
    q, k, v = inputs()
    kept = torch.ones(1, 3, 12, 12, dtype=torch.bool)
    out, lse = sparse_attention(q, k, v, kept)
    assert torch.allclose(out, plain_attention(q, k, v), atol=1e-5)
    assert torch.allclose(lse, torch.logsumexp(q @ k.transpose(-1, -2) * 32**-0.5, dim=-1), atol=1e-4)
    assert torch.allclose(merged((out, lse), pooled_attention(q, pool(k), pool(v), kept)), out, atol=1e-6)


def test_means_of_blocks_and_the_last_shorter_one():
    x = torch.randn(2, 3, 300, 8)
    pooled = pool(x)
    assert pooled.counts.tolist() == [128, 128, 44]
    assert torch.allclose(pooled.means[:, :, 2], x[:, :, 256:].mean(dim=2), atol=1e-6)
    assert torch.allclose(shares(pooled, pooled, range(0)).sum(dim=-1), torch.tensor(3.0))


@pytest.mark.parametrize("text", [range(1400, 1500), range(0, 100), range(0)])
def test_sampled_queries_are_of_the_image(text):
    rows = sampled_rows(TOKENS, text, torch.device("cpu"))
    assert len(rows) == 64 and not set(rows.tolist()) & set(text) and max(rows) < TOKENS
    assert rows.tolist() == sorted(rows.tolist())


def test_lists_of_blocks():
    kept = torch.tensor([[[[1, 0, 1], [0, 1, 0]]]], dtype=torch.bool)
    counts, indices = lists(kept)
    assert counts.tolist() == [[[2, 1]]]
    assert indices[0, 0, 0, :2].tolist() == [0, 2] and indices[0, 0, 1, :1].tolist() == [1]
