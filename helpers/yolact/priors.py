"""The anchors that boxes are predicted relative to (section 4). numpy only."""

from collections.abc import Iterable
from itertools import product
from math import sqrt

import numpy as np

from helpers.yolact.configurations import Configuration

STRIDE_3 = 3  # halvings from the input to P3


def level_sizes(size: int, levels: int = 5) -> list[int]:
    """Sides of the maps from P3 on, in cells, for an input of `size` pixels: each half the last, rounded up."""
    return [-(-size // 2**halvings) for halvings in range(STRIDE_3, STRIDE_3 + levels)]


def make_priors(configuration: Configuration, sizes: Iterable[tuple[int, int]] | None = None) -> np.ndarray:
    """Return the anchors of all levels, one after the other, for maps of the configured input's or of other `sizes`.

    Returns:
        float32 `[anchors, 4]`, center x, center y, width and height, relative to the input. They go by level, row,
        column and ratio, the last fastest, as the head's outputs do.
    """
    sizes = sizes or [(side, side) for side in level_sizes(configuration.size, len(configuration.scales))]
    levels = zip(sizes, configuration.scales, strict=True)
    return np.concatenate([_level(height, width, scale, configuration) for (height, width), scale in levels])


def _level(height: int, width: int, scale: int, configuration: Configuration) -> np.ndarray:
    shapes = []
    for ratio in configuration.ratios:
        anchor_width = scale * sqrt(ratio) / configuration.size
        square = anchor_width if configuration.square_anchors else scale / sqrt(ratio) / configuration.size
        shapes.append((anchor_width, square))
    # Computed in double precision and rounded once, as the checkpoints' own anchors were.
    centers = product((np.arange(height) + 0.5) / height, (np.arange(width) + 0.5) / width)
    return np.array([(x, y, *shape) for y, x in centers for shape in shapes], np.float32)
