"""Which kernel runs: the interface is the real one, the kernels are made to be fast, wrong, or to fail."""

import logging

import pytest
import torch
import torch.nn.functional as F
from skein.attention.kernels import KERNELS, Kernel, Problem, plain_attention
from skein.attention.kernels.kernel import package_obstacle
from skein.attention.op import active, attention
from skein.attention.overriding import is_exact_step
from skein.attention.selection import Selection
from skein.plan import KERNELS as NAMES
from skein.plan import AttentionConfig


def inputs(batch=1, heads=2, tokens=40, head_dim=16):
    torch.manual_seed(0)
    return torch.randn(3, batch, heads, tokens, head_dim).unbind()


def right(q, k, v, mask=None):
    assert mask is None
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def raising(error):
    def run(q, k, v):
        raise error

    return run


def kernel(name="flash2", run=right, exact=True, obstacle=None):
    return Kernel(name, f"{name}{'' if exact else ' in 8 bits'} of the test", exact, lambda problem: obstacle, run)


def stock(q, k, v, mask=None):
    return torch.full_like(right(q, k, v), 7.0)  # told apart from every kernel


def attend(kernels, config=None, exact=True, **sizes):
    selection = Selection(config or AttentionConfig(), stock, kernels)
    return selection.attend(*inputs(**sizes), exact=exact), selection.reasons


def is_right(out, **sizes):
    return torch.allclose(out, right(*inputs(**sizes)), atol=1e-6)


def test_plain_attention_is_attention():
    assert torch.allclose(plain_attention(*inputs()), right(*inputs()), atol=1e-6)


def test_the_first_that_runs_is_taken_and_named():
    out, reasons = attend([kernel("flash3", obstacle="no such GPU"), kernel("flash2")])
    assert is_right(out) and reasons == ["flash2 of the test runs"]


@pytest.mark.parametrize(
    ("run", "reason"),
    [
        (raising(RuntimeError("no kernel image")), "no kernel image"),
        (lambda q, k, v: right(q, k, v) * 1.01, "relative error 0.01"),
        (lambda q, k, v: right(q, k, v) * float("nan"), "relative error nan"),
    ],
)
def test_one_that_fails_or_is_off_is_dropped_with_its_reason(run, reason, caplog):
    out, reasons = attend([kernel("cudnn", run), kernel("flash2")])
    assert is_right(out) and reason in reasons[0] and reasons[1] == "flash2 of the test runs"
    assert any(record.levelno == logging.WARNING and reason in record.message for record in caplog.records)


def test_one_that_fails_later_is_replaced_in_the_same_call():
    calls = []

    def once(q, k, v):
        calls.append(q.shape[2])
        if len(calls) > 1:
            raise RuntimeError("illegal instruction")
        return right(q, k, v)

    out, reasons = attend([kernel("cudnn", once)], tokens=200)
    assert (out == 7).all() and calls == [64, 200] and "illegal instruction" in reasons[1]


def test_one_that_no_cuda_graph_can_hold_is_not_given_up(monkeypatch):
    selection = Selection(AttentionConfig(), stock, [kernel("cudnn")])
    chosen = selection.kernel_for(*inputs())
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="capturing"), selection._giving_up(chosen):
        raise RuntimeError("operation not permitted when stream is capturing")
    assert selection.kernel_for(*inputs()) is chosen


def test_out_of_memory_is_not_a_reason_to_try_another():
    with pytest.raises(torch.OutOfMemoryError):
        attend([kernel("cudnn", raising(torch.OutOfMemoryError("full"))), kernel("flash2")])


def test_a_named_kernel_that_cannot_run_says_so_and_what_auto_would_take_runs():
    missing = kernel("flash3", obstacle="runs on Hopper only")
    out, reasons = attend([missing, kernel("flash2")], AttentionConfig("flash3"))
    assert is_right(out) and "runs on Hopper only" in reasons[0] and reasons[1] == "flash2 of the test runs"
    out, reasons = attend([missing], AttentionConfig("flash3"))
    assert (out == 7).all() and "ComfyUI's own attention runs" in reasons[-1]
    out, reasons = attend([kernel("flash2")], AttentionConfig("stock"))
    assert (out == 7).all() and reasons == []


def test_a_package_that_this_gpu_would_be_faster_with_is_named():
    hint = "fa3-fwd is not installed (python -m pip install fa3-fwd)"
    _, reasons = attend([kernel("flash3", obstacle=hint), kernel("flash2")])
    assert reasons == ["flash2 of the test runs", f"it can be faster: {hint}"]
    _, reasons = attend([kernel("flash4", obstacle=hint), kernel("flash3")])
    assert reasons == ["flash3 of the test runs"]


def test_eight_bits_run_only_where_allowed():
    rough = kernel("sage", lambda q, k, v: right(q, k, v) * 1.05, exact=False)
    kernels = [kernel("flash2"), rough]
    assert is_right(attend(kernels, exact=False)[0])  # not allowed by the configuration
    allowed = AttentionConfig("sage", allow_8bit=True)
    assert is_right(attend(kernels, allowed, exact=True)[0])  # not in this step
    assert (attend([rough], allowed, exact=True)[0] == 7).all()
    assert torch.allclose(attend(kernels, allowed, exact=False)[0], right(*inputs()) * 1.05, atol=1e-6)
    named = AttentionConfig("flash2", allow_8bit=True)
    assert is_right(attend(kernels, named, exact=False)[0])  # an exact kernel by name has no 8-bit form
    both = [kernel("flash3", raising(RuntimeError("no FP8 in this build")), exact=False), kernel("flash3")]
    assert is_right(attend(both, AttentionConfig("flash3", allow_8bit=True), exact=False)[0])  # its exact form is left
    broken = kernel("sage", lambda q, k, v: right(q, k, v) * 2, exact=False)
    assert (attend([broken], allowed, exact=False)[0] == 7).all()


def test_the_operator_reads_the_kernel_of_the_moment():
    q, k, v = inputs()
    compiled = torch.compile(lambda q, k, v: attention(q, k, v) + 0, backend="aot_eager", fullgraph=True)
    with active(right):
        assert torch.allclose(compiled(q, k, v), right(q, k, v).flatten(2))
        with active(stock):
            assert (compiled(q, k, v) == 7).all()
        assert torch.allclose(compiled(q, k, v), right(q, k, v).flatten(2))


def test_every_kernel_of_the_pack_says_what_keeps_it_from_a_cpu_or_runs_there():
    q, k, v = inputs()
    problem = Problem.of(q)
    assert {"auto", "stock", *(kernel.name for kernel in KERNELS)} == set(NAMES)
    obstacles = {kernel.label: kernel.obstacle(problem) for kernel in KERNELS}
    runnable = [kernel for kernel in KERNELS if obstacles[kernel.label] is None]
    if q.device.type == "cpu":
        assert [kernel.name for kernel in runnable] == ["flash2"]
        assert all("GPU" in obstacle for obstacle in obstacles.values() if obstacle)
    for kernel in runnable:
        assert torch.allclose(kernel.run(q, k, v), right(q, k, v), atol=1e-5)


def test_exact_steps_are_the_first_and_the_last():
    schedule = torch.tensor([1.0, 0.9, 0.8, 0.6, 0.4, 0.2, 0.0])

    def exact(sigmas, steps):
        return [is_exact_step({"sample_sigmas": schedule, "sigmas": torch.tensor([s])}, steps) for s in sigmas]

    assert exact(schedule[:-1].tolist(), 2) == [True, True, False, False, True, True]
    assert exact(schedule[:-1].tolist(), 0) == [False] * 6
    assert exact([0.95, 0.7, 0.1], 1) == [True, False, True]  # between two steps: as the step before
    assert is_exact_step({}, 0)  # nothing known of the schedule


def test_a_package_that_cannot_be_imported_is_an_obstacle(tmp_path, monkeypatch):
    """As one that was built for another PyTorch."""
    (tmp_path / "stale_kernels").mkdir()
    (tmp_path / "stale_kernels" / "__init__.py").write_text("raise ImportError('stale.so: undefined symbol: _ZN3c10')")
    monkeypatch.syspath_prepend(tmp_path)
    assert package_obstacle("stale_kernels.cute", "stale") == (
        "stale cannot be imported (stale.so: undefined symbol: _ZN3c10)"
    )
    assert package_obstacle("not_there.cute", "it") == package_obstacle("not_there", "it") == "it is not installed"
    assert package_obstacle("torch.nn", "torch") is None
