"""From prototypes and coefficients to masks in COCO's run-length encoding, at the size of the image. No torch.

The definition: combine the prototypes, crop at the box, enlarge bilinearly to the image's size, keep what is above
the threshold. A mask so made is never held here. Down a column of the image an enlarged mask is a line from prototype
cell to prototype cell, so it crosses the threshold at most once between two cells, at a row that follows from their
values; and the crossings are the ends of the runs that COCO's encoding counts. The work is that of the cells within
the box, for each of its columns, instead of that of the image's pixels.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from helpers.images.rle import encode_runs


@dataclass(frozen=True)
class Axis:
    """How the pixels of one side of the image lie among the cells of the prototypes."""

    cells: int  # of this side
    pixels: int  # likewise
    cell: np.ndarray  # int `[pixels]`, the cell whose center is at or before each pixel's center, from -1
    weight: np.ndarray  # float32 `[pixels]`, of the cell after it, in linear interpolation
    first: np.ndarray  # int `[cells + 2]`, the first pixel of each cell from -1 to `cells`

    @classmethod
    def of(cls, cells: int, pixels: int) -> "Axis":
        """Sides match at their ends, not at the centers of their outer pixels."""
        position = (np.arange(pixels) + 0.5) * (cells / pixels) - 0.5
        cell = np.floor(position).astype(int)
        first = np.searchsorted(cell, np.arange(-1, cells + 1))
        return cls(cells, pixels, cell, (position - cell).astype(np.float32), first)


def encode_masks(
    prototypes: np.ndarray, coefficients: np.ndarray, boxes: np.ndarray, width: int, height: int, threshold: float = 0.5
) -> list[dict[str, Any]]:
    """Assemble the masks of one image's detections (section 3.3), as pycocotools reads them.

    Args:
        prototypes: float32 `[rows, columns, prototypes]`.
        coefficients: float32 `[n, prototypes]`.
        boxes: float32 `[n, 4]`, corners relative to the image.
        width: of the original image, in pixels.
        height: likewise.
        threshold: a pixel belongs to the mask if its probability is above; at least 0.
    """
    rows, columns, depth = prototypes.shape
    # Equation 1, without its sigmoid, which only the cells within the boxes need.
    combined = (coefficients @ prototypes.reshape(-1, depth).T).reshape(-1, rows, columns)
    windows = zip(_cells(boxes[:, 1::2], rows), _cells(boxes[:, ::2], columns), strict=True)
    axes = Axis.of(rows, height), Axis.of(columns, width)
    runs = [_runs(mask, window, axes, threshold) for mask, window in zip(combined, windows, strict=True)]
    return encode_runs(runs, width, height)


def _cells(sides: np.ndarray, cells: int) -> list[tuple[int, int]]:
    """First cell and the one past the last that each box covers, from its relative ends float32 `[n, 2]`."""
    # One cell is left around the box, because the boxes of training were so rounded.
    low = np.maximum(sides.min(axis=1) * np.float32(cells) - 1, 0)
    high = np.minimum(sides.max(axis=1) * np.float32(cells) + 1, cells)
    start = np.minimum(np.ceil(low), cells).astype(int)
    stop = np.maximum(np.ceil(high).astype(int), start)
    return list(zip(start.tolist(), stop.tolist(), strict=True))


def _runs(
    combined: np.ndarray, window: tuple[tuple[int, int], tuple[int, int]], axes: tuple[Axis, Axis], threshold: float
) -> np.ndarray:
    """Run lengths of one mask down the image's columns, those of the background first."""
    (top, bottom), (left, right) = window
    vertical, horizontal = axes
    pixels = vertical.pixels * horizontal.pixels
    if top == bottom or left == right:
        return np.array([pixels])
    with np.errstate(over="ignore"):  # far below 0 the exponential is infinite, and the probability 0
        inner = 1 / (1 + np.exp(-combined[top:bottom, left:right].T))
    cells = _surround(inner, (left == 0, right == horizontal.cells), (top == 0, bottom == vertical.cells))
    start, stop = horizontal.first[left], horizontal.first[right + 1]
    before = horizontal.cell[start:stop] - (left - 1)
    lines = np.diff(cells, axis=0)[before]  # [image columns, cells from top - 1 to bottom]
    lines *= horizontal.weight[start:stop, None]
    lines += cells[before]
    ends = _crossings(lines, top, vertical, threshold) + start * vertical.pixels
    return np.diff(ends[ends < pixels], prepend=0, append=pixels)


def _surround(inner: np.ndarray, columns: tuple[bool, bool], rows: tuple[bool, bool]) -> np.ndarray:
    """Add a cell on each side: what is outside of the crop is 0, and outside of the image as at its edge."""
    cells = np.zeros((inner.shape[0] + 2, inner.shape[1] + 2), np.float32)
    cells[1:-1, 1:-1] = inner
    for table, at_edges in ((cells.T, rows), (cells, columns)):
        for outer, inner_side, at_edge in zip((0, -1), (1, -2), at_edges, strict=True):
            if at_edge:
                table[outer] = table[inner_side]
    return cells


def _crossings(lines: np.ndarray, top: int, axis: Axis, threshold: float) -> np.ndarray:
    """Where the mask begins or ends, as pixels counted down one column after the other.

    `lines` are float32 `[columns, cells]`, probabilities at the cells from `top - 1` on, where `top` is the first cell
    that is not surrounding; `axis` is of the image's rows.
    """
    inside = lines > threshold
    # By position, because numpy finds those of a flat array many times faster than those of a table.
    column, cell = np.divmod(np.flatnonzero(inside[:, 1:] != inside[:, :-1]), lines.shape[1] - 1)
    before, after = lines[column, cell].astype(float), lines[column, cell + 1].astype(float)
    place = cell + (top - 1) + (threshold - before) / (after - before)  # in cells
    row = (place + 0.5) * (axis.pixels / axis.cells) - 0.5
    row = np.where(after > before, np.floor(row) + 1, np.ceil(row)).astype(int)  # the first that is as `after` is
    row = np.clip(row, axis.first[cell + top], axis.first[cell + top + 1])
    edges = [column * axis.pixels + row]
    edges += [np.flatnonzero(inside[:, 0]) * axis.pixels, np.flatnonzero(inside[:, -1]) * axis.pixels + axis.pixels]
    # Two ends at one place are none: a column's last run and the next one's first are the same run.
    ends, count = np.unique(np.concatenate(edges), return_counts=True)
    return ends[count % 2 == 1]
