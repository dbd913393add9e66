"""QuantizedLinear alone: error, types, shapes, compilation, ComfyUI's ways of patching and partial loading."""

import pytest
import torch
import torch.nn.functional as F
from live_bytes import LiveBytes
from skein.bench.errors import relative_error
from skein.float8 import FP8, SMALLEST
from skein.quantization.linear import (
    FP8_MAX,
    HEADROOM,
    QuantizedLinear,
    dequantize,
    quantize_rows,
    quantize_weight,
    reference_product,
    scaled_product,
    to_fp8,
)


@pytest.fixture(autouse=True)
def _forget_compiled_code():
    torch.compiler.reset()


MODES = ["per_tensor", "per_row", "weight_only"]
TYPES = [torch.bfloat16, torch.float32, torch.float16]


def weights(rows_differ=False, seed=0):
    torch.manual_seed(seed)
    weight, bias = torch.randn(96, 64) / 8, torch.randn(96)
    if rows_differ:
        weight *= torch.logspace(-3, 0, 96)[:, None]
    return weight, bias


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", [(5, 64), (2, 7, 64), (1, 64), (64,)])
def test_error_type_and_shape(mode, dtype, shape):
    weight, bias = weights()
    x = torch.randn(shape).to(dtype)
    layer = QuantizedLinear(weight.to(dtype), bias.to(dtype), mode)
    out = layer(x)
    stock = F.linear(x.float(), weight.to(dtype).float(), bias.to(dtype).float())
    assert out.dtype == dtype and out.shape == stock.shape
    assert 0.001 < relative_error(out, stock) < 0.04


def test_scales_per_row_keep_rows_of_different_size_apart():
    """With rows of the weight over three decades, per-row scales keep 4 %; one scale for all does not, row by row."""
    weight, _ = weights(rows_differ=True)
    x = torch.randn(50, 64) * torch.logspace(-4, 1, 50)[:, None]
    stock = F.linear(x, weight)
    errors = {}
    for mode in ("per_tensor", "per_row"):
        out = QuantizedLinear(weight, None, mode)(x)
        errors[mode] = max(relative_error(row, reference) for row, reference in zip(out, stock))
    assert errors["per_row"] < 0.06 < 0.3 < errors["per_tensor"]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", TYPES)
def test_rows_of_zeros_and_an_empty_batch(mode, dtype):
    weight, bias = weights()
    weight[3] = 0
    layer = QuantizedLinear(weight.to(dtype), bias.to(dtype), mode)
    x = torch.randn(4, 64).to(dtype)
    x[1] = 0
    out = layer(x)
    assert torch.isfinite(out).all()
    assert relative_error(out[1], bias) < 0.01
    assert torch.isfinite(layer(torch.zeros(4, 64, dtype=dtype))).all()
    assert layer(x[:0]).shape == (0, 96) and layer(x[None, :0]).shape == (1, 0, 96)


def test_sizes_are_real():
    weight, bias = weights()
    layer = QuantizedLinear(weight, bias, "per_row")
    assert layer.weight.nbytes == 96 * 64 and layer.weight_scale.shape == (96, 1)
    assert QuantizedLinear(weight, bias, "per_tensor").weight_scale.shape == (1, 1)
    assert sum(value.nbytes for value in layer.state_dict().values()) == 96 * 64 + 2 * 96 * 4


def test_activations_quantized_in_pieces_are_the_same(monkeypatch):
    x = torch.randn(100, 64, dtype=torch.bfloat16)
    for per_row in (False, True):
        data, scale = quantize_rows(x, per_row)
        monkeypatch.setattr("skein.quantization.linear.CHUNK", 64 * 7)
        pieces, piece_scale = quantize_rows(x, per_row)
        monkeypatch.undo()
        assert torch.equal(scale, piece_scale) and torch.equal(data.view(torch.uint8), pieces.view(torch.uint8))
        assert data.float().abs().max() == FP8_MAX


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_weights_are_quantized_as_torchao_does_it(dtype, monkeypatch):
    from torchao.quantization import Float8Tensor, PerRow, PerTensor

    weight = weights()[0].to(dtype)
    weight[3] = 0
    monkeypatch.setattr("skein.quantization.linear.WEIGHT_CHUNK", 64 * 7)
    for mode, granularity in (("per_tensor", PerTensor()), ("per_row", PerRow())):
        data, scale = quantize_weight(weight, mode)
        theirs = Float8Tensor.from_hp(weight.float(), FP8, granularity, hp_value_lb=SMALLEST)
        assert torch.equal(data.view(torch.uint8), theirs.qdata.view(torch.uint8)) and torch.equal(scale, theirs.scale)
    data, larger = quantize_weight(weight, "weight_only")
    assert torch.equal(larger, scale * HEADROOM) and torch.equal(data.float(), to_fp8(weight, larger).float())


def test_a_weight_is_quantized_with_little_beside_it(monkeypatch):
    """What is made on the way is freed between the FP8 weights that stay."""
    weight, small = torch.randn(512, 64).bfloat16(), 64 * 16
    monkeypatch.setattr("skein.quantization.linear.WEIGHT_CHUNK", small)
    for mode in MODES:
        with LiveBytes() as live:
            data, scale = quantize_weight(weight, mode)
        assert live.peak < data.nbytes + 4 * scale.nbytes + 4 * 4 * small


def test_the_product_of_torchao_is_the_reference():
    weight, bias = weights()
    x = torch.randn(7, 64, dtype=torch.bfloat16)
    for per_row in (False, True):
        operands = (
            *quantize_rows(x, per_row),
            *quantize_weight(weight, "per_row" if per_row else "per_tensor"),
            bias.bfloat16(),
        )
        assert relative_error(scaled_product(*operands), reference_product(*operands)) < 0.005


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_it_compiles_as_one_graph(mode, dtype):
    weight, bias = weights()
    layer = QuantizedLinear(weight.to(dtype), bias.to(dtype), mode)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for rows in (5, 9, 12):
        x = torch.randn(2, rows, 64).to(dtype)
        assert relative_error(compiled(x), layer(x)) < 0.005


def test_the_product_of_torchao_compiles_as_one_graph(monkeypatch):
    monkeypatch.setattr("skein.quantization.linear.reference_product", scaled_product)
    weight, bias = weights()
    for mode in ("per_tensor", "per_row"):
        layer = QuantizedLinear(weight.bfloat16(), bias.bfloat16(), mode)
        x = torch.randn(2, 5, 64, dtype=torch.bfloat16)
        assert relative_error(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x)) < 0.005


@pytest.mark.parametrize("mode", MODES)
def test_comfyui_patches_a_weight_and_puts_it_back(mode):
    """As ModelPatcher.patch_weight_to_device does: the FP8 values in float16 or float32, plain, patched, set."""
    weight, bias = weights()
    layer = QuantizedLinear(weight, bias, mode)
    before, x = layer.weight, torch.randn(5, 64)
    out = layer(x)
    plain = layer.convert_weight(before.to(torch.float16), inplace=True)
    assert torch.equal(plain, dequantize(before, layer.weight_scale, torch.float32))
    assert layer.set_weight(plain * 0.5, return_weight=True).dtype == torch.float8_e4m3fn
    assert torch.equal(layer(x), out)
    layer.set_weight(plain * 0.5)
    assert relative_error(layer(x), F.linear(x, weight * 0.5, bias)) < 0.06
    layer.weight = before
    assert torch.equal(layer(x), out)
    layer.set_weight(plain, inplace_update=True)
    assert layer.weight is before and torch.equal(layer(x), out)
    assert torch.equal(to_fp8(plain, layer.weight_scale).float(), before.float())


@pytest.mark.parametrize("mode", MODES)
def test_patch_functions_of_a_partly_loaded_model_are_applied(mode):
    weight, bias = weights()
    layer = QuantizedLinear(weight, bias, mode)
    x = torch.randn(5, 64)
    layer.weight_function, layer.bias_function = [lambda w: w * 2], [lambda b: b * 3]
    assert relative_error(layer(x), F.linear(x, weight * 2, bias * 3)) < 0.04
