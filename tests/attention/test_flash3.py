"""What FlashAttention-3 in FP8 is fed; the kernel itself runs on Hopper only (bench/attention.py, bench/quality.py)."""

import torch
from skein.attention.kernels.flash3 import quantize_heads
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
