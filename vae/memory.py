"""How much memory a decode takes, and how much there is."""

from collections.abc import Sequence
from typing import Any

from .families import Family
from .layers import SCORES

SCORE_BYTES = 10  # of an attention score, its probability, and that in 16 bits
MARGIN = 1.05  # what the allocator loses between blocks


def whole_bytes(vae: Any, family: Family, shape: Sequence[int], world: int) -> int:
    """Bytes that decoding a latent of this shape (B, C, T, H, W) takes on each of `world` devices, beside the weights.

    ComfyUI's own estimate of the layers, for the widest strip and corrected by what was measured; the attention scores
    of the middle block; and the frames, once as they are decoded and once as ComfyUI wants them. Videos of a batch
    follow one another.
    """
    _, channels, frames, *sides = shape
    strip = [min(sides), -(-max(sides) // world)]
    layers = family.memory_share * vae.memory_used_decode((1, channels, frames, *strip), vae.vae_dtype)
    scores = _score_bytes(frames**2 * strip[0] * strip[1] * sides[0] * sides[1])
    count, *scale = vae.upscale_ratio
    pixels = count(frames) * strip[0] * scale[0] * strip[1] * scale[1] * vae.output_channels
    return int(MARGIN * (max(layers, scores) + pixels * (2 * vae.vae_dtype.itemsize + 4)))


def sliced_bytes(vae: Any, family: Family, shape: Sequence[int]) -> tuple[int, int]:
    """The same for a decode in slices on one device, which frames leave as they are decoded; and how many bytes of
    carried frames may be there besides, or on the host."""
    assert family.sliced_share is not None
    estimate = MARGIN * vae.memory_used_decode((1, *shape[1:]), vae.vae_dtype)
    scores = _score_bytes((shape[2] * shape[3] * shape[4]) ** 2)
    return int(max(family.sliced_share * estimate, MARGIN * scores)), int(family.carried_share * estimate)


def _score_bytes(scores: int) -> int:
    return min(SCORES, scores) * SCORE_BYTES


def tile_bytes(vae: Any, tile: Sequence[int]) -> int:
    """Bytes that decoding a tile of this shape takes, as ComfyUI estimates it."""
    return int(vae.memory_used_decode(tuple(tile), vae.vae_dtype))
