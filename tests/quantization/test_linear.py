"""The FP8 layer: near the exact one, torchao's recipe, whole under the compiler, and what ComfyUI asks of a layer."""

import pytest
import torch
import torch.nn.functional as F
from skein.quantization import linear
from skein.quantization.linear import QuantizedLinear, scale_of, to_fp8

MODES = ("per_row", "per_tensor", "weight_only")
TYPES = (torch.bfloat16, torch.float16, torch.float32)


def error(a, b):
    return float((a.float() - b.float()).norm() / b.float().norm())


def layer(mode, dtype=torch.float32, bias=True):
    torch.manual_seed(0)
    weight = torch.randn(96, 64)
    return QuantizedLinear(weight.to(dtype), torch.randn(96).to(dtype) if bias else None, mode), weight.to(dtype)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", [(5, 64), (2, 7, 64), (2, 1, 3, 64), (0, 64)])
def test_near_the_exact_layer_in_every_type_and_shape(mode, dtype, shape):
    quantized, weight = layer(mode, dtype)
    x = torch.randn(shape).to(dtype)
    out, exact = quantized(x), F.linear(x, weight, quantized.bias)
    assert out.dtype == dtype and out.shape == exact.shape
    if x.numel():
        assert 0 < error(out, exact) < 0.05


def test_a_scale_a_row_serves_rows_of_every_size():
    """Of 200 tokens one is a thousand times larger: with one scale for all, it costs the others their precision."""
    torch.manual_seed(1)
    x = torch.randn(200, 64)
    x[0] *= 3e4
    errors = {}
    for mode in ("per_row", "per_tensor"):
        quantized, weight = layer(mode, bias=False)
        errors[mode] = error(quantized(x)[1:], F.linear(x, weight)[1:])
    assert errors["per_row"] < 0.05 < 0.1 < errors["per_tensor"]


def test_many_rows_are_quantized_in_pieces_with_the_same_result(monkeypatch):
    x = torch.randn(100, 64)
    for mode in ("per_row", "per_tensor"):
        quantized, _ = layer(mode)
        whole = quantized(x)
        monkeypatch.setattr(linear, "ROWS_AT_ONCE", 33)
        assert torch.equal(quantized(x), whole)
        monkeypatch.undo()


@pytest.mark.parametrize("mode", MODES)
def test_zeros_stay_zeros_and_large_values_are_not_clipped(mode):
    quantized, weight = layer(mode, bias=False)
    assert not quantized(torch.zeros(3, 64)).any()
    x = 1e4 * torch.randn(3, 64)
    assert error(quantized(x), F.linear(x, weight)) < 0.05
    empty = QuantizedLinear(torch.zeros(32, 64), None, mode)
    assert not empty(torch.randn(2, 64)).any()


@pytest.mark.parametrize("mode", ["per_row", "per_tensor"])
def test_the_recipe_is_torchaos(mode):
    """Same values, same scales, same product as torchao's own tensor, in float32 to the last bits."""
    float8 = pytest.importorskip("torchao.quantization.quantize_.workflows", reason="torchao is not installed")
    from torchao.float8.inference import Float8MMConfig
    from torchao.quantization import PerRow, PerTensor
    from torchao.quantization.quantize_.common import KernelPreference

    granularity = PerRow() if mode == "per_row" else PerTensor()
    common = dict(granularity=granularity, mm_config=Float8MMConfig(use_fast_accum=True))
    common["kernel_preference"] = KernelPreference.TORCH
    quantized, weight = layer(mode)
    theirs = float8.Float8Tensor.from_hp(
        weight, **common, act_quant_kwargs=float8.QuantizeTensorToFloat8Kwargs(**common)
    )
    assert torch.equal(theirs.qdata.float(), quantized.weight.float())
    assert torch.equal(theirs.scale, quantized.weight_scale)
    x = torch.randn(17, 64)
    assert error(quantized(x), F.linear(x, theirs, quantized.bias)) < 1e-6


@pytest.mark.parametrize("mode", MODES)
def test_the_compiler_takes_it_whole(mode):
    quantized, _ = layer(mode, torch.bfloat16)
    compiled = torch.compile(quantized, backend="aot_eager", fullgraph=True, dynamic=True)
    for rows in (5, 9):
        x = torch.randn(2, rows, 64, dtype=torch.bfloat16)
        assert torch.equal(compiled(x), quantized(x))


def test_its_size_is_counted_in_bytes():
    import comfy.model_management

    quantized, _ = layer("per_row", torch.bfloat16)
    assert comfy.model_management.module_size(quantized) == 96 * 64 + 96 * 4 + 96 * 2


def test_comfyuis_way_of_patching_a_layer_and_back():
    """convert_weight, a patch, set_weight; then ComfyUI's backup of the weight alone restores the layer."""
    quantized, weight = layer("weight_only")
    backup = quantized.weight.clone()
    patched = quantized.convert_weight(quantized.weight.to(torch.float32)) + 0.1
    quantized.set_weight(patched)
    assert error(quantized.convert_weight(quantized.weight.float()), weight + 0.1) < 0.04
    assert quantized.set_weight(patched, return_weight=True).dtype == torch.float8_e4m3fn
    quantized.weight = torch.nn.Parameter(backup, requires_grad=False)
    assert error(quantized.convert_weight(quantized.weight.float()), weight) < 0.03


def test_patches_of_a_layer_that_is_loaded_in_part_are_applied_in_the_call():
    quantized, weight = layer("per_row")
    quantized.weight_function = [lambda w: w + 1.0]
    quantized.bias_function = [lambda b: b * 0.0]
    x = torch.randn(4, 64)
    assert error(quantized(x), F.linear(x, weight + 1.0)) < 0.03


def test_scales():
    x = torch.tensor([[1.0, -448.0], [2.0, 0.0]])
    assert scale_of(x, per_row=True).tolist() == [[1.0], [pytest.approx(2 / 448)]]
    assert scale_of(x, per_row=False).tolist() == [[1.0]]
    assert to_fp8(x, scale_of(x, per_row=True)).float()[1].tolist() == [448.0, 0.0]
