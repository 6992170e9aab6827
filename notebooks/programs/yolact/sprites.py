"""The paint of scenes: textured backgrounds, and Fashion-MNIST items in any color, size and place."""

from dataclasses import dataclass
from functools import cache

import cv2
import numpy as np

SIDE = 28  # pixels of an item as it comes
SCALES = (1.7, 2.6)  # enlargement of an item
ANGLE = 20  # degrees, either way
EDGE = 16  # brightness, of 255, from which a pixel is the item's; the background of the data set is 0


@dataclass(frozen=True)
class Cover:
    """An item at its place: its cover and its colors; `area` also counts the part beyond the image."""

    mask: np.ndarray  # bool [height, width]
    area: int
    top: int
    left: int
    opacity: np.ndarray  # float32 [rows, columns, 1], of the part within the image
    colors: np.ndarray  # float32 [rows, columns, 3]

    def paint(self, image: np.ndarray) -> None:
        """Lay the item over an image, in place; edges are blended over about a pixel."""
        rows, columns = self.opacity.shape[:2]
        part = image[self.top : self.top + rows, self.left : self.left + columns]
        part[:] = part * (1 - self.opacity) + self.colors * self.opacity


@dataclass(frozen=True)
class Sprite:
    """An item, its colors and its size and angle."""

    layers: np.ndarray  # uint8 [28, 28, 2]: brightness and opacity
    dark: np.ndarray  # float32 [3]: the color of the item's black
    bright: np.ndarray  # float32 [3]: and of its white
    scale: float
    angle: float  # degrees

    @classmethod
    def of(cls, item: np.ndarray, rng: np.random.Generator, zoom: float) -> "Sprite":
        """Choose the look of an item, uint8 `[28, 28]`; half of them are mirrored."""
        # The mask is closed, because dark parts within an item belong to it.
        solid = cv2.morphologyEx((item >= EDGE).astype(np.uint8) * 255, cv2.MORPH_CLOSE, np.ones((3, 3)))
        layers = np.dstack([item, solid])
        if rng.random() < 0.5:
            layers = layers[:, ::-1]
        bright = rng.uniform(110, 255, 3).astype(np.float32)
        dark = bright * np.float32(rng.uniform(0.05, 0.3))
        scale = np.exp(rng.uniform(*np.log(SCALES))) * zoom
        return cls(np.ascontiguousarray(layers), dark, bright, scale, rng.uniform(-ANGLE, ANGLE))

    def cover(self, x: float, y: float, height: int, width: int) -> Cover:
        """Put the item's center at a place of an image of that size."""
        turn = cv2.getRotationMatrix2D((SIDE / 2 - 0.5, SIDE / 2 - 0.5), self.angle, self.scale)
        reach = int(np.ceil(SIDE / 2 * np.abs(turn[0, :2]).sum())) + 1
        column, row = int(x), int(y)
        turn[:, 2] += np.array([reach + x - column - SIDE / 2, reach + y - row - SIDE / 2])
        warped = cv2.warpAffine(self.layers, turn, (2 * reach, 2 * reach), flags=cv2.INTER_LINEAR)
        top, left = row - reach, column - reach
        inside = (slice(max(-top, 0), height - top), slice(max(-left, 0), width - left))
        brightness, opacity = (warped[inside][..., layer, None].astype(np.float32) / 255 for layer in (0, 1))
        mask = np.zeros((height, width), bool)
        top, left = max(top, 0), max(left, 0)
        mask[top : top + opacity.shape[0], left : left + opacity.shape[1]] = opacity[..., 0] >= 0.5
        colors = self.dark + (self.bright - self.dark) * brightness
        return Cover(mask, int((warped[..., 1] >= 128).sum()), top, left, opacity, colors)


def make_background(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Blotches and waves in two colors that are not far apart, as of cloth, wood or stone: float32."""
    blotches = np.zeros((height, width), np.float32)
    for cells in (3, 8, 24):
        noise = rng.normal(0, 1, (cells, cells)).astype(np.float32)
        blotches += cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC) / 3
    angle, length = rng.uniform(0, np.pi), rng.uniform(4, 40)
    across = np.float32(np.cos(angle)) * np.arange(width, dtype=np.float32)
    down = np.float32(np.sin(angle)) * np.arange(height, dtype=np.float32)[:, None]
    waves = np.sin((across + down) * np.float32(2 * np.pi / length)) * np.float32(rng.uniform(0, 1))
    color, towards = rng.uniform(30, 225, 3), rng.uniform(-45, 45, 3)
    channels = [(blotches + waves) * np.float32(towards[c]) + np.float32(color[c]) for c in range(3)]
    return np.clip(cv2.merge(channels), 0, 255)


@cache
def _noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).normal(0, 1, (2 * height, 2 * width, 3)).astype(np.float32)


def add_grain(rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
    """Add a sensor's noise: a random window of one field, because a new field per scene would take longest of all."""
    height, width = image.shape[:2]
    top, left = rng.integers(0, height), rng.integers(0, width)
    noise = _noise(height, width)[top : top + height, left : left + width]
    return np.clip(image + noise * np.float32(rng.uniform(2, 7)), 0, 255).astype(np.uint8)
