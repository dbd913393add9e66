"""Attention with its log-sum-exp: what runs where kernels fail."""

import pytest
import torch
from skein.attention import attention_with_lse, lse
from skein.attention.kernels import Problem
from skein.attention.kernels.kernel import Kernel, plain_attention, plain_attention_with_lse

INPUTS = [torch.randn(1, 2, n, 64, generator=torch.Generator().manual_seed(n)) for n in (9, 17, 17)]


@pytest.fixture
def tried(monkeypatch):
    """Kernels that take anything: one that gives no log-sum-exp, one that fails (with what is in the list's first
    place), and one that runs."""
    calls = [RuntimeError("FlashAttention only supports Ampere GPUs or newer.")]

    def first(q, k, v, spare):
        calls.append(("first", spare))
        raise calls[0]

    def second(q, k, v, spare):
        calls.append(("second", spare))
        return plain_attention_with_lse(q, k, v)

    kernels = [
        Kernel(name, name, True, lambda problem: None, plain_attention, run)
        for name, run in (("none", None), ("one", first), ("two", second))
    ]
    monkeypatch.setattr(lse, "KERNELS", kernels)
    monkeypatch.setattr(lse, "_failed", set())
    return calls


def test_a_kernel_that_fails_is_left_for_the_next_and_not_tried_again(tried, caplog):
    for _ in range(2):
        out, sums = attention_with_lse(*INPUTS, spare=3)
    assert tried[1:] == [("first", 3), ("second", 3), ("second", 3)] and caplog.text.count("one failed") == 1
    assert torch.allclose(out, plain_attention(*INPUTS), atol=1e-5)
    scores = INPUTS[0] @ INPUTS[1].transpose(-1, -2) / 8
    assert torch.allclose(sums, scores.logsumexp(-1), atol=1e-5)


def test_full_memory_says_nothing_about_a_kernel(tried):
    tried[0] = torch.OutOfMemoryError("full")
    for _ in range(2):
        with pytest.raises(torch.OutOfMemoryError):
            attention_with_lse(*INPUTS)
    assert tried[1:] == [("first", 0), ("first", 0)]


@pytest.mark.parametrize(("capability", "runs"), [((7, 5), False), ((8, 0), True)])
def test_flash_attention_2_is_not_asked_on_gpus_before_ampere(capability, runs, monkeypatch):
    """Such GPUs cannot be here."""
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda _: capability)
    monkeypatch.setattr("torch.version.cuda", "13.0")
    problem = Problem(torch.device("cuda", 0), torch.float16, 24, 128, 1000)
    able = [kernel for kernel in lse.KERNELS if kernel.run_with_lse and kernel.obstacle(problem) is None]
    assert [kernel.label for kernel in able] == (["FlashAttention-2"] if runs else [])
