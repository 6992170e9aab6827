"""What a network says per cell of a grid over its input, per pixel of the image. Executors import this module."""

import numpy as np

from helpers.images.geometry import Placement

Window = tuple[int, int, int, int]  # left, top, right, bottom, in pixels of the image


def enlarge(grid: np.ndarray, placement: Placement, window: Window) -> np.ndarray:
    """Interpolate a grid bilinearly at the pixels of a part of the image, float32 `[..., rows, columns]` both.

    Sides of the grid and of the network's input match at their ends, as `align_corners=False` of torch has it. The work
    and the memory are those of the part.
    """
    left, top, right, bottom = window
    columns, across = _axis(grid.shape[-1], placement, 0, left, right)
    rows, down = _axis(grid.shape[-2], placement, 1, top, bottom)
    return _interpolate(_interpolate(grid[..., rows, columns], -1, *across), -2, *down)


def nearest(grid: np.ndarray, placement: Placement, window: Window) -> np.ndarray:
    """The values of the nearest cells `[..., rows, columns]` at the pixels of a part of the image; see `enlarge`."""
    left, top, right, bottom = window
    columns = np.clip(np.floor(_positions(grid.shape[-1], placement, 0, left, right) + 0.5), 0, grid.shape[-1] - 1)
    rows = np.clip(np.floor(_positions(grid.shape[-2], placement, 1, top, bottom) + 0.5), 0, grid.shape[-2] - 1)
    return grid[..., rows.astype(int)[:, None], columns.astype(int)]


def visible_window(placement: Placement) -> Window:
    """The part of the image that the network's input shows: all but what `crop` cuts off."""
    sides = zip(placement.image, placement.resized, placement.offset, placement.input, strict=True)
    (left, right), (top, bottom) = (
        (max(0, round(-offset * image / resized)), min(image, round((side - offset) * image / resized)))
        for image, resized, offset, side in sides
    )
    return left, top, right, bottom


def _positions(cells: int, placement: Placement, side: int, start: int, stop: int) -> np.ndarray:
    """Centers of pixels in cells, the first cell's center as 0: float64 `[stop - start]`."""
    scale = placement.resized[side] / placement.image[side]
    inputs = (np.arange(start, stop) + 0.5) * scale + placement.offset[side]
    return inputs * (cells / placement.input[side]) - 0.5


def _axis(
    cells: int, placement: Placement, side: int, start: int, stop: int
) -> tuple[slice, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """The cells of one side of a grid that some pixels need, and where the pixels' centers are among them.

    Of each pixel int `[pixels]` the cell whose center is at or before its own, and the one after it, counted from the
    first that is needed, and float32 `[pixels]` the latter's weight.
    """
    position = np.clip(_positions(cells, placement, side, start, stop), 0, cells - 1)
    before = np.floor(position).astype(int)
    after = np.minimum(before + 1, cells - 1)
    first, last = int(before.min(initial=cells - 1)), int(after.max(initial=0))
    return slice(first, last + 1), (before - first, after - first, (position - before).astype(np.float32))


def _interpolate(
    values: np.ndarray, along: int, before: np.ndarray, after: np.ndarray, weight: np.ndarray
) -> np.ndarray:
    low = values.take(before, along)
    result = values.take(after, along)
    result -= low
    result *= weight if along == -1 else weight[:, None]
    result += low
    return result
