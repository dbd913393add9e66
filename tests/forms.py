"""The embedded demo model in the forms that people have checkpoints in: each function writes one, of the same weights.

Weights of blocks are quantized, and others of two dimensions too where a file of that form has them so: GGUF.
"""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from comfy.quant_ops import QUANT_ALGOS, QuantizedTensor
from safetensors.torch import load_file, save_file
from skein.demo import MODEL_FOLDER, MODEL_NAME

K = 256  # values in a block of GGUF's K types


def demo_weights() -> dict[str, torch.Tensor]:
    return load_file(MODEL_FOLDER / MODEL_NAME)


def in_blocks(name: str, weight: torch.Tensor) -> bool:
    """Whether a weight is one of a block's Linear layers."""
    return "_blocks." in name and name.endswith("weight") and weight.ndim == 2


def write_bf16(path: Path) -> None:
    save_file(demo_weights(), str(path))


def write_fp8_e4m3fn(path: Path) -> None:
    """Each weight of a block cast to FP8 as it is, without scales."""
    state = demo_weights()
    save_file(
        {name: each.to(torch.float8_e4m3fn) if in_blocks(name, each) else each for name, each in state.items()}, path
    )


def write_fp8_scaled(path: Path) -> None:
    """FP8 with a scale for each weight, in the older way of `scaled_fp8` and `scale_weight`."""
    state = {"scaled_fp8": torch.empty(0, dtype=torch.float8_e4m3fn)}
    for name, weight in demo_weights().items():
        if in_blocks(name, weight):
            scale = weight.float().abs().max() / torch.finfo(torch.float8_e4m3fn).max
            state[f"{name.removesuffix('weight')}scale_weight"] = scale
            weight = (weight.float() / scale).to(torch.float8_e4m3fn)
        state[name] = weight
    save_file(state, str(path))


def write_mxfp8(path: Path) -> None:
    _write_quantized(path, "mxfp8")


def write_nvfp4(path: Path) -> None:
    _write_quantized(path, "nvfp4")


def _write_quantized(path: Path, form: str) -> None:
    """As ComfyUI saves its own quantized tensors, with a mark at each layer that says the form."""
    state, mark = {}, torch.tensor(list(json.dumps({"format": form}).encode()), dtype=torch.uint8)
    for name, weight in demo_weights().items():
        if in_blocks(name, weight):
            quantized = QuantizedTensor.from_float(weight, QUANT_ALGOS[form]["comfy_tensor_layout"])
            state |= {key: each.contiguous() for key, each in quantized.state_dict(name).items()}
            state[f"{name.removesuffix('weight')}comfy_quant"] = mark.clone()
        else:
            state[name] = weight
    save_file(state, str(path))


def write_q8_0(path: Path) -> None:
    import gguf

    _write_gguf(path, "Q8_0", 32, lambda rows: gguf.quants.quantize(rows, gguf.GGMLQuantizationType.Q8_0))


def write_q6_k(path: Path) -> None:
    _write_gguf(path, "Q6_K", K, q6_k)


def write_q4_k(path: Path) -> None:
    _write_gguf(path, "Q4_K", K, q4_k)


def _write_gguf(path: Path, kind: str, block: int, quantize: Callable[[np.ndarray], np.ndarray]) -> None:
    """GGUF as ComfyUI-GGUF reads it; rows that are no multiple of a block stay in float32."""
    import gguf

    writer = gguf.GGUFWriter(path, "hyvid")
    for name, value in demo_weights().items():
        rows = value.float().numpy()
        if value.ndim == 2 and value.shape[1] % block == 0:
            writer.add_tensor(name, quantize(rows), raw_dtype=gguf.GGMLQuantizationType[kind])
        else:
            if value.ndim > 4:  # GGUF has four dimensions at most
                shape = list(rows.shape)
                writer.add_array(f"comfy.gguf.orig_shape.{name}", shape)
                rows = rows.reshape(shape[0], -1)
            writer.add_tensor(name, rows, raw_dtype=gguf.GGMLQuantizationType.F32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def q6_k(rows: np.ndarray) -> np.ndarray:
    """Rows (O, I) in GGUF's Q6_K, which its library reads and does not write: (O, I / 256 * 210) bytes.

    16 values each have a scale of 8 bits of the block's own in float16; a value is 6 bits, around 32.
    """
    blocks = rows.reshape(-1, K)
    scales = np.abs(blocks.reshape(-1, 16, 16)).max(-1) / 31
    d = (scales.max(-1, keepdims=True) / 127).astype(np.float16)
    scales = np.rint(_divided(scales, d)).astype(np.int8)
    steps = np.repeat(d.astype(np.float32) * scales, 16, axis=-1)
    values = (np.clip(np.rint(_divided(blocks, steps)), -32, 31) + 32).astype(np.uint8).reshape(-1, 2, 4, 32)
    low, high = values & 15, values >> 4
    low = np.concatenate([low[:, :, :2] | low[:, :, 2:] << 4], axis=-1).reshape(-1, 128)
    high = (high[:, :, 0] | high[:, :, 1] << 2 | high[:, :, 2] << 4 | high[:, :, 3] << 6).reshape(-1, 64)
    return np.concatenate([low, high, scales.view(np.uint8), d.view(np.uint8)], axis=-1).reshape(len(rows), -1)


def q4_k(rows: np.ndarray) -> np.ndarray:
    """Rows (O, I) in GGUF's Q4_K: (O, I / 256 * 144) bytes.

    32 values each have a scale and a smallest value of 6 bits of the block's own two in float16; a value is 4 bits.
    """
    parts = rows.reshape(-1, 8, 32)
    least = np.minimum(parts.min(-1), 0)
    scales, least = (parts.max(-1) - least) / 15, -least
    d, dmin = ((each.max(-1, keepdims=True) / 63).astype(np.float16) for each in (scales, least))
    scales, least = (np.clip(np.rint(_divided(*each)), 0, 63).astype(np.uint8) for each in ((scales, d), (least, dmin)))
    offset = (dmin.astype(np.float32) * least)[..., None]
    values = np.clip(np.rint(_divided(parts + offset, (d.astype(np.float32) * scales)[..., None])), 0, 15).astype(
        np.uint8
    )
    values = (values[:, 0::2] | values[:, 1::2] << 4).reshape(-1, 128)
    packed = [scales[:, :4] | scales[:, 4:] >> 4 << 6, least[:, :4] | least[:, 4:] >> 4 << 6]
    packed.append(scales[:, 4:] & 15 | (least[:, 4:] & 15) << 4)
    return np.concatenate([d.view(np.uint8), dmin.view(np.uint8), *packed, values], axis=-1).reshape(len(rows), -1)


def _divided(values: np.ndarray, by: np.ndarray) -> np.ndarray:
    """Quotients in float32; of a block of zeros, zeros."""
    by = by.astype(np.float32)
    return np.divide(values, by, out=np.zeros(np.broadcast(values, by).shape, np.float32), where=by != 0)
