"""Resizing with a filter that grows as an image shrinks, as Pillow does it and as most networks were trained.

OpenCV's `resize` skips pixels of an image that becomes much smaller. torchvision's and timm's transforms use all of
them, and a network's scores follow. Only the part of the result that is asked for is computed. Executors import this
module.
"""

from dataclasses import dataclass

import numpy as np

BLOCK = 16  # outputs that are computed together; more of them multiply more zeros


@dataclass(frozen=True)
class Taps:
    """The source pixels of each output along one side."""

    first: np.ndarray  # int `[n]`, the first source pixel of each output
    weights: np.ndarray  # float32 `[n, taps]`, of it and those after it; they sum to 1

    @classmethod
    def of(cls, source: int, target: int, window: tuple[int, int], interpolation: str) -> "Taps":
        """Those of the outputs in a window of one side, which is resized from `source` to `target` pixels."""
        kernel, support = KERNELS[interpolation]
        scale = source / target
        stretch = max(scale, 1.0)
        centers = (np.arange(*window) + 0.5) * scale
        first = np.maximum((centers - support * stretch + 0.5).astype(int), 0)
        stop = np.minimum((centers + support * stretch + 0.5).astype(int), source)
        places = first[:, None] + np.arange((stop - first).max())
        weights = kernel((places + 0.5 - centers[:, None]) / stretch) * (places < stop[:, None])
        return cls(first, (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32))

    def reach(self, source: int) -> tuple[int, int]:
        """The first source pixel that is needed, and the one past the last."""
        return int(self.first[0]), min(source, int(self.first[-1]) + self.weights.shape[1])

    def blocks(self) -> list[tuple[slice, slice, np.ndarray]]:
        """Outputs, the sources they need, and the matrix float32 `[sources, outputs]` between them."""
        blocks = []
        for start in range(0, len(self.first), BLOCK):
            first, weights = self.first[start : start + BLOCK], self.weights[start : start + BLOCK]
            low, count = int(first[0]), weights.shape[1]
            matrix = np.zeros((int(first[-1]) - low + count, len(first)), np.float32)
            rows = (first - low)[:, None] + np.arange(count)
            matrix[rows, np.arange(len(first))[:, None]] = weights
            blocks.append((slice(start, start + len(first)), slice(low, low + len(matrix)), matrix))
        return blocks


def resample(
    image: np.ndarray, size: tuple[int, int], window: tuple[int, int, int, int], interpolation: str
) -> np.ndarray:
    """Resize an image and cut a window out of the result.

    Equal to Pillow's `resize` with `BILINEAR` or `BICUBIC` to a gray level where a value lies between two.

    Args:
        image: uint8 `[height, width, channels]`.
        size: width and height of the whole result.
        window: left, top, right, bottom of the part that is returned, uint8 as well.
        interpolation: `linear` or `cubic`.
    """
    height, width = image.shape[:2]
    left, top, right, bottom = window
    rows = Taps.of(height, size[1], (top, bottom), interpolation)
    columns = Taps.of(width, size[0], (left, right), interpolation)
    low, high = rows.reach(height)
    image, rows = image[low:high], Taps(rows.first - low, rows.weights)
    # The order shows in the rounding between; Pillow takes rows first since version 13 where that is much less work.
    if height - size[1] > max(0, 2 * (width - size[0])):
        low, high = columns.reach(width)
        columns = Taps(columns.first - low, columns.weights)
        return _along_rows(_down_columns(image[:, low:high], rows), columns)
    return _down_columns(_along_rows(image, columns), rows)


def _along_rows(image: np.ndarray, taps: Taps) -> np.ndarray:
    height, width, channels = image.shape
    result = np.empty((height, len(taps.first), channels), np.uint8)
    for outputs, sources, matrix in taps.blocks():
        part = image[:, sources]  # the last block may ask for pixels beyond the edge, whose weights are 0
        wide = np.kron(matrix[: part.shape[1]], np.eye(channels, dtype=np.float32))
        product = part.reshape(height, -1).astype(np.float32) @ wide
        result[:, outputs] = _round(product).reshape(height, -1, channels)
    return result


def _down_columns(image: np.ndarray, taps: Taps) -> np.ndarray:
    height, width, channels = image.shape
    flat = image.reshape(height, -1)
    result = np.empty((len(taps.first), width * channels), np.uint8)
    for outputs, sources, matrix in taps.blocks():
        part = flat[sources]
        result[outputs] = _round(matrix[: len(part)].T @ part.astype(np.float32))
    return result.reshape(-1, width, channels)


def _round(values: np.ndarray) -> np.ndarray:
    return np.clip(np.floor(values + 0.5), 0, 255).astype(np.uint8)


def _cubic(x: np.ndarray, a: float = -0.5) -> np.ndarray:
    """Keys, "Cubic convolution interpolation for digital image processing", 1981, equation 15."""
    x = np.abs(x)
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


# And how far each reaches, in output pixels.
KERNELS = {"linear": (lambda x: np.maximum(1 - np.abs(x), 0), 1.0), "cubic": (_cubic, 2.0)}
