"""Out of memory as ComfyUI knows it, PyTorch's AcceleratorError included: each place that catches what a device raises
tells it from other failures. (Workers: tests/workers/test_faults.py.)"""

import comfy.model_management as memory
import pytest
import torch
import vaes
from skein import engine
from skein.attention import attention_with_lse, lse
from skein.attention.kernels.kernel import Kernel, plain_attention
from skein.attention.selection import Selection
from skein.demo.sampling import sample
from skein.out_of_memory import is_out_of_memory
from skein.plan import AttentionConfig, CompileConfig, DecodeConfig
from skein.quantization import layers
from skein.vae.decode import decode

INPUTS = torch.randn(3, 1, 2, 17, 64, generator=torch.Generator().manual_seed(0)).unbind()
ACCELERATOR = getattr(torch, "AcceleratorError", None)


def accelerator_error(text, code=None):
    """As CUDA raises it where the allocator is not PyTorch's own: a RuntimeError, no OutOfMemoryError."""
    error = ACCELERATOR(text)
    assert not isinstance(error, memory.OOM_EXCEPTION)
    if code is not None:
        error.error_code = code
    return error


FULL = [pytest.param(lambda: torch.OutOfMemoryError("full"), id="OutOfMemoryError")]
OTHER = [pytest.param(lambda: RuntimeError("CUDA error: no kernel image is available"), id="RuntimeError")]
if ACCELERATOR and hasattr(memory, "is_oom"):
    FULL += [
        pytest.param(lambda: accelerator_error("CUDA error: out of memory"), id="AcceleratorError-text"),
        pytest.param(lambda: accelerator_error("CUDA error", 2), id="AcceleratorError-code"),
    ]
    OTHER += [pytest.param(lambda: accelerator_error("CUDA error: an illegal access", 700), id="AcceleratorError")]
full = pytest.mark.parametrize("error", FULL)


def raising(error, calls=None):
    def run(*_, **__):
        if calls is not None:
            calls.append(error)
        raise error

    return run


@pytest.mark.parametrize(
    ("error", "is_full"), [(p.values[0], True) for p in FULL] + [(p.values[0], False) for p in OTHER]
)
def test_what_is_out_of_memory(error, is_full):
    assert is_out_of_memory(error()) is is_full


@full
def test_a_decode_goes_on_in_tiles(error, monkeypatch, caplog):
    vae, latent = vaes.vae(), vaes.latent("Wan 2.1", (1, 2, 3, 4))
    config = DecodeConfig("whole", str(vae.device), tile_size=128, overlap=32, temporal_size=8, temporal_overlap=4)
    monkeypatch.setattr("skein.vae.decode.frames_of", raising(error()))
    assert (decode(vae, latent, config) - vae.decode(latent)).abs().max() < 1e-4  # one tile
    assert "memory" in caplog.text


@full
def test_a_kernel_with_lse_is_not_given_up(error, monkeypatch):
    """It would be for the life of the process."""
    calls, failure = [], error()
    kernel = Kernel("flash2", "flash2", True, lambda problem: None, plain_attention, raising(failure, calls))
    monkeypatch.setattr(lse, "KERNELS", [kernel])
    monkeypatch.setattr(lse, "_failed", set())
    for _ in range(2):
        with pytest.raises(type(failure)):
            attention_with_lse(*INPUTS)
    assert len(calls) == 2 and not lse._failed


@full
def test_a_kernel_is_not_given_up_in_the_run(error):
    failure, stock = error(), lambda *_: pytest.fail("another attention ran")
    kernel = Kernel("flash2", "flash2", True, lambda problem: None, raising(failure))
    selection = Selection(AttentionConfig(), stock, [kernel])
    with pytest.raises(type(failure)):
        selection.attend(*INPUTS)
    assert not selection._failed


@full
def test_a_full_compiler_is_no_failed_compiler(error, tiny_model, monkeypatch, caplog):
    failure, settings = error(), {"backend": raising(error()), "fullgraph": True, "dynamic": None, "mode": None}
    monkeypatch.setattr("skein.compilation.blocks.compile_settings", lambda config: settings)
    torch._dynamo.reset()
    model = engine.edit(tiny_model, compile=CompileConfig(warm_up=False))
    with pytest.raises(type(failure)):
        sample(model, "a red circle", shape=(1, 16, 1, 8, 8), steps=1)
    assert "uncompiled" not in caplog.text
    torch._dynamo.reset()


@full
def test_a_mode_of_fp8_is_not_taken_for_one_that_the_device_lacks(error, monkeypatch):
    failure = error()
    monkeypatch.setattr(layers, "QuantizedLinear", raising(failure))
    layers.supported_mode.cache_clear()
    with pytest.raises(type(failure)):
        layers.supported_mode("per_row", torch.device("cpu"))
    layers.supported_mode.cache_clear()
