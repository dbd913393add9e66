"""What FlashAttention-3 in FP8 is fed; the kernel itself runs on Hopper only (bench/attention.py, bench/quality.py)."""

import pytest
import torch
from interpreter import interpret
from pack import ROOT
from skein.attention.kernels import flash3
from skein.attention.kernels.flash3 import FLASH3, quantize_heads
from skein.attention.kernels.kernel import plain_attention


def test_heads_are_quantized_apart_and_keys_lose_their_mean():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 3, 70, 16, dtype=torch.bfloat16).unbind()
    q[:, 1] *= 1000  # one head's size is not another's
    k = k + 50.0
    parts = quantize_heads(q, k, v)
    for (values, scale), original in zip(parts, (q, k - k.mean(dim=2, keepdim=True, dtype=torch.float32), v)):
        assert values.dtype == torch.float8_e4m3fn and scale.shape == (2, 3) and scale.dtype == torch.float32
        restored = values.float() * scale[:, :, None, None]
        by_head = (restored - original.float()).norm(dim=(2, 3)) / original.float().norm(dim=(2, 3))
        assert by_head.max() < 0.04


def test_attention_of_quantized_heads_is_near_attention():
    """Taking the mean off the keys changes no softmax; without it, keys with an offset lose their differences."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 200, 32, dtype=torch.bfloat16).unbind()
    k = k + 20.0
    restored = [values.float() * scale[:, :, None, None] for values, scale in quantize_heads(q, k, v)]
    exact = plain_attention(q, k, v)
    error = (plain_attention(*restored) - exact).norm() / exact.norm()
    rough = plain_attention(restored[0], k.to(torch.float8_e4m3fn), restored[2])
    assert error < 0.1 and (rough - exact).norm() / exact.norm() > 2 * error


INTERPRETED = """
import sys
sys.path.insert(0, sys.argv[1])
from fp8_triton import quantize_head
import torch
torch.manual_seed(0)
qkv = torch.randn(2, 70, 3, 3, 48).permute(2, 0, 3, 1, 4)  # views, a head dim that is no power of two
x, offset = qkv[2] + 3.0, torch.randn(2, 3, 1, 48)
values, scale = quantize_head(x, offset)
expected = (x - offset).abs().amax(dim=(2, 3)) / 448
assert torch.allclose(scale, expected, rtol=1e-6), (scale, expected)
restored = values.float() * scale[:, :, None, None] + offset
error = (restored - x).norm(dim=(2, 3)) / (x - offset).norm(dim=(2, 3))
assert values.dtype == torch.float8_e4m3fn and float(error.max()) < 0.06, error  # the interpreter's cast is coarser
print("same")
"""


def test_the_triton_kernels_compute_the_same_under_tritons_interpreter():
    interpret(INTERPRETED, ROOT / "attention" / "kernels")


@pytest.mark.parametrize(
    ("text", "raised"),
    [
        (
            'torch_call_dispatcher( "aten::new_empty", "", stack.data(), (2ULL << 56)) API call failed at ops.h',
            True,
        ),
        (
            "CUDA out of memory. Tried to allocate 712.00 MiB. (originally from aoti_torch_new_empty API call failed)",
            True,
        ),
        ("This flash attention build does not support headdim 512.", False),
        ('torch_call_dispatcher("aten::transpose", "int", stack.data()) API call failed at ops.h, line 2', False),
    ],
    ids=["as of 2.11", "as of 2.14", "a shape", "another call"],
)
def test_a_full_gpu_is_told_from_a_kernel_that_fails(monkeypatch, text, raised):
    """Its library reports both in the same way."""

    def function(*_):
        raise RuntimeError(text)

    monkeypatch.setattr(flash3, "_function", lambda: function)
    with pytest.raises(RuntimeError) as caught:
        FLASH3.run(*torch.randn(3, 1, 2, 8, 16).unbind())
    assert isinstance(caught.value, torch.OutOfMemoryError) is raised
