"""The Triton kernels of an FP8 Linear layer, by Triton's interpreter in a process of its own; as part of a graph."""

from pathlib import Path

import pytest
import torch
from interpreter import interpret
from skein.quantization import linear
from skein.quantization.linear import QuantizedLinear

ROOT = Path(__file__).resolve().parents[2]
INTERPRETED = """
import sys
sys.path.insert(0, sys.argv[1])
from linear_triton import few_rows_product, quantize_wide_rows
import torch
torch.manual_seed(0)

x = torch.randn(8200, 5).t()  # not contiguous, a width that is no power of two
x = torch.cat([x, torch.zeros(1, 8200), 1e4 * torch.randn(1, 8200)])
values, scale = quantize_wide_rows(x)
largest = x.abs().amax(dim=1, keepdim=True)
assert torch.allclose(scale, largest.clamp(min=1e-12) / 448, rtol=1e-6), scale
assert values.dtype == torch.float8_e4m3fn and not values[5].float().any()
error = (values.float() * scale - x).norm(dim=1) / x.norm(dim=1).clamp(min=1e-12)
assert float(error.max()) < 0.12, error  # the interpreter's cast loses carries: it makes 64 of 127

for rows, outs, width in ((1, 34, 2064), (3, 16, 64), (4, 100, 1024)):
    weight = torch.randn(outs, width)
    scale = weight.abs().amax(dim=1, keepdim=True) / 448
    weight = (weight / scale).to(torch.float8_e4m3fn)
    x = torch.randn(rows, width, dtype=torch.bfloat16)
    out, expected = few_rows_product(x, weight, scale), x.float() @ (weight.float() * scale).t()
    assert out.shape == expected.shape and torch.allclose(out, expected, rtol=1e-4, atol=1e-3), (rows, outs, width)
print("same")
"""


def test_the_triton_kernels_compute_what_they_say():
    interpret(INTERPRETED, ROOT / "quantization")


class Hopper:
    """What Triton asks of a GPU's driver where it is only traced."""

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)


@pytest.mark.parametrize("mode, shape", [("per_row", (70, 8192)), ("weight_only", (2, 64))])
def test_they_are_part_of_one_compiled_graph(mode, shape, monkeypatch):
    """As PyTorch traces a layer on a GPU; the graph itself cannot run here."""
    kernels = pytest.importorskip("skein.quantization.linear_triton", reason="no Triton for this platform")
    monkeypatch.setattr("triton.runtime.driver._active", Hopper())
    monkeypatch.setattr("torch.utils._triton.has_triton", lambda: True)
    monkeypatch.setattr(linear, "_kernels", kernels)
    monkeypatch.setattr(linear, "_by_triton", lambda device: torch.compiler.is_compiling())
    layer, graphs = QuantizedLinear(torch.randn(32, shape[1]), torch.randn(32), mode), []

    def keep(graph, inputs):
        graphs.append(graph)
        return lambda *args: (torch.zeros(shape[0], 32),)

    torch.compile(layer.forward, backend=keep, fullgraph=True)(torch.randn(shape))
    called = [str(node.target) for graph in graphs for node in graph.graph.nodes]
    assert len(graphs) == 1 and sum("triton_kernel_wrapper" in name for name in called) == 1, called
