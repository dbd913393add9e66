"""Saved videos: reading them back and comparing them."""

import math
from pathlib import Path

import numpy as np


def read_frames(video: Path) -> np.ndarray:
    """All frames of an animated picture as (T, H, W, 3) in 0..1."""
    from PIL import Image, ImageSequence

    with Image.open(video) as image:
        frames = [np.asarray(frame.convert("RGB"), dtype=np.float32) for frame in ImageSequence.Iterator(image)]
    return np.stack(frames) / 255


def psnr(video: np.ndarray, reference: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of values in 0..1; 99 for equal videos."""
    error = float(((video - reference) ** 2).mean())
    return min(-10 * math.log10(error), 99.0) if error else 99.0
