"""Synthetic videos with captions, and the reader that tells what a video shows.

A scene is one coloured shape that moves in a straight line over a textured ground. Scenes are rendered
at latent resolution (one pixel per 8 x 8 patch of the real video, one frame per latent frame), because the
demo model works on latents that are lifted straight from RGB (see lift.py).

Letters: B batch, T latent frames, H and W latent height and width, L words.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

# Shapes are saturated, grounds are not: that is what lets `read_video` tell them apart.
COLOURS = {
    "red": (0.90, 0.08, 0.08),
    "green": (0.06, 0.70, 0.10),
    "blue": (0.10, 0.18, 0.92),
    "yellow": (0.95, 0.88, 0.06),
    "purple": (0.62, 0.08, 0.85),
    "cyan": (0.05, 0.85, 0.92),
    "orange": (0.98, 0.48, 0.02),
}
GROUNDS = {
    "grass": (0.36, 0.45, 0.33),
    "sand": (0.64, 0.58, 0.48),
    "stone": (0.42, 0.42, 0.43),
    "snow": (0.84, 0.84, 0.86),
    "water": (0.36, 0.43, 0.52),
}
SHAPES = ("circle", "square", "triangle")
DIRECTIONS = {"left": (0.0, -1.0), "right": (0.0, 1.0), "up": (-1.0, 0.0), "down": (1.0, 0.0)}  # (y, x)
SIZES = {"small": 0.13, "large": 0.22}  # radius, of the frame's shorter side
SIZE_JITTER = 0.02

LONGEST_PATH = 0.6  # of the frame's side

VOCABULARY = ["a", "moves", "over", *COLOURS, *SHAPES, *DIRECTIONS, *SIZES, *GROUNDS]
_WORD_INDEX = {word: i for i, word in enumerate(VOCABULARY)}


@dataclass(frozen=True)
class Look:
    """What the words leave open. speed: of the frame's side, per latent frame. grown: a shape's radius beside SIZES.
    texture: least and most strength of each of the ground's waves; wavelength: theirs, in pixels."""

    speed: tuple[float, float] = (0.055, 0.075)
    grown: float = 1.0
    texture: tuple[float, float] = (0.02, 0.05)
    wavelength: tuple[float, float] = (6, 16)


LOOKS = {"plain": Look(), "slow": Look((0.03, 0.05), 1.4, (0.04, 0.1), (3, 10))}


@dataclass(frozen=True)
class Scenes:
    """A batch of scenes as index tensors of shape (B,) into the tables above."""

    colour: Tensor
    shape: Tensor
    direction: Tensor
    size: Tensor
    ground: Tensor

    @staticmethod
    def random(batch: int, rng: torch.Generator) -> "Scenes":
        def draw(options) -> Tensor:
            return torch.randint(len(options), (batch,), generator=rng, device=rng.device)

        return Scenes(draw(COLOURS), draw(SHAPES), draw(DIRECTIONS), draw(SIZES), draw(GROUNDS))

    def words(self, with_size: bool, with_ground: bool) -> Tensor:
        """Captions as vocabulary indices, (B, L): "a [small] red circle moves left [over sand]"."""

        def constant(word: str) -> Tensor:
            return torch.full_like(self.colour, _WORD_INDEX[word])

        def choice(indices: Tensor, options: Iterable[str]) -> Tensor:
            table = torch.tensor([_WORD_INDEX[word] for word in options], device=indices.device)
            return table[indices]

        columns = [constant("a")]
        if with_size:
            columns.append(choice(self.size, SIZES))
        columns += [choice(self.colour, COLOURS), choice(self.shape, SHAPES)]
        columns += [constant("moves"), choice(self.direction, DIRECTIONS)]
        if with_ground:
            columns += [constant("over"), choice(self.ground, GROUNDS)]
        return torch.stack(columns, dim=1)

    def captions(self, with_size: bool, with_ground: bool) -> list[str]:
        return [" ".join(VOCABULARY[i] for i in row) for row in self.words(with_size, with_ground).tolist()]


def render(
    scenes: Scenes, frames: int, height: int, width: int, rng: torch.Generator, look: Look = LOOKS["plain"]
) -> Tensor:
    """Draw scenes as RGB video, (B, 3, T, H, W) in 0..1. Everything the caption leaves open comes from `rng`."""
    device, batch = rng.device, scenes.colour.shape[0]

    def uniform(low: float, high: float) -> Tensor:
        return torch.rand(batch, generator=rng, device=device) * (high - low) + low

    def column(values: Tensor) -> Tensor:
        return values.reshape(batch, 1, 1, 1)

    side = min(height, width)
    y = (torch.arange(height, device=device) + 0.5).reshape(1, 1, height, 1)
    x = (torch.arange(width, device=device) + 0.5).reshape(1, 1, 1, width)
    t = torch.arange(frames, device=device).reshape(1, frames, 1, 1)

    step = torch.tensor(list(DIRECTIONS.values()), device=device)[scenes.direction]  # (B, 2)
    speed = uniform(*look.speed).clamp(max=LONGEST_PATH / max(frames - 1, 1)) * side
    travelled = column(speed) * (t - (frames - 1) / 2)
    centre_y = column(height / 2 + uniform(-0.18, 0.18) * height * (step[:, 0] == 0)) + travelled * column(step[:, 0])
    centre_x = column(width / 2 + uniform(-0.18, 0.18) * width * (step[:, 1] == 0)) + travelled * column(step[:, 1])
    size = torch.tensor(list(SIZES.values()), device=device)[scenes.size] + uniform(-SIZE_JITTER, SIZE_JITTER)
    cover = _coverage(scenes.shape, (y - centre_y), (x - centre_x), column(look.grown * size * side))  # (B, T, H, W)

    ground = torch.tensor(list(GROUNDS.values()), device=device)[scenes.ground]
    ground = ground[:, :, None, None] + _texture(batch, height, width, rng, look)[:, None]
    colour = torch.tensor(list(COLOURS.values()), device=device)[scenes.colour]
    cover = cover[:, None]
    video = ground[:, :, None] * (1 - cover) + colour[:, :, None, None, None] * cover
    return video.clamp(0, 1)


def _coverage(shape: Tensor, dy: Tensor, dx: Tensor, radius: Tensor) -> Tensor:
    """How much of each pixel the shape covers, from signed distances in pixels: a one-pixel soft edge."""
    circle = (dy.square() + dx.square()).sqrt() - radius
    half = radius * 0.89  # same area as the circle
    square = torch.maximum(dy.abs(), dx.abs()) - half
    # An upright triangle: below its base line nothing, left and right of its flanks nothing.
    flank = math.sqrt(3) / 2 * dx.abs() - 0.5 * dy - radius * 0.7
    triangle = torch.maximum(flank, dy - radius * 0.7)
    kinds = torch.stack(torch.broadcast_tensors(circle, square, triangle))
    distance = kinds.gather(0, shape.reshape(1, -1, 1, 1, 1).expand(1, *kinds.shape[1:]))[0]
    return (0.5 - distance).clamp(0, 1)


def _texture(batch: int, height: int, width: int, rng: torch.Generator, look: Look, waves: int = 3) -> Tensor:
    """A still, grey pattern of a few plane waves, (B, H, W)."""

    def uniform(low: float, high: float) -> Tensor:
        return torch.rand((batch, waves, 1, 1), generator=rng, device=rng.device) * (high - low) + low

    angle, wavelength, phase = uniform(0, 2 * math.pi), uniform(*look.wavelength), uniform(0, 2 * math.pi)
    y = torch.arange(height, device=rng.device).reshape(1, 1, height, 1)
    x = torch.arange(width, device=rng.device).reshape(1, 1, 1, width)
    along = y * angle.sin() + x * angle.cos()
    return (uniform(*look.texture) * (2 * math.pi * along / wavelength + phase).sin()).sum(dim=1)


def read_video(video: Tensor) -> tuple[str, str]:
    """Read colour and direction of motion back from an RGB video, (T, H, W, 3) in 0..1.

    The shape is what is saturated; its colour is the nearest table entry to the weighted mean, its direction
    the larger part of the way that its centre of mass goes from the first to the last third of the frames.
    """
    video = video.float().clamp(0, 1)
    saturation = video.amax(dim=-1) - video.amin(dim=-1)
    weight = (saturation - 0.35).clamp(min=0)
    weight = weight + 1e-8  # a video without any shape reads as something, not as NaN
    mean = (video * weight[..., None]).sum(dim=(0, 1, 2)) / weight.sum()
    table = torch.tensor(list(COLOURS.values()), device=video.device)
    colour = list(COLOURS)[int((table - mean).norm(dim=1).argmin())]

    frames, height, width = weight.shape
    mass = weight.sum(dim=(1, 2))
    y = (weight.sum(dim=2) * torch.arange(height, device=video.device)).sum(dim=1) / mass
    x = (weight.sum(dim=1) * torch.arange(width, device=video.device)).sum(dim=1) / mass
    third = max(frames // 3, 1)
    way = torch.stack([y[-third:].mean() - y[:third].mean(), x[-third:].mean() - x[:third].mean()])
    table = torch.tensor(list(DIRECTIONS.values()), device=video.device)
    direction = list(DIRECTIONS)[int((table @ way).argmax())]
    return colour, direction
