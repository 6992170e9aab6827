"""Masks in COCO's run-length encoding, as results and annotations hold them. Executors import this module.

An encoded mask is `{"size": [height, width], "counts": str}`: the lengths of the runs down the image's columns, those
of the background first. pycocotools writes it; reading is here, because pycocotools takes counts on trust and crashes
on damaged ones.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from pycocotools import mask as coco

Mask = dict[str, Any]

CHARACTER = 48  # the first of the 64 that the encoding uses
MORE, SIGN = 32, 16  # bits of a character: another follows; the number is negative
LONGEST = 12  # characters of a number, so that it has no more than 63 bits


def encode(mask: np.ndarray) -> Mask:
    """Encode a mask, `[height, width]`, bool or not zero inside."""
    return _as_text(coco.encode(np.asfortranarray(mask != 0, np.uint8)))


def encode_runs(runs: Sequence[np.ndarray], width: int, height: int) -> list[Mask]:
    """Encode the masks of one image from their run lengths, an integer array per mask."""
    masks = [{"size": [height, width], "counts": lengths.tolist()} for lengths in runs]
    return [_as_text(encoded) for encoded in coco.frPyObjects(masks, height, width)] if masks else []


def encode_part(part: np.ndarray, corner: tuple[int, int], width: int, height: int) -> Mask:
    """Encode a mask of an image's width and height that is known for a part only, and empty elsewhere.

    The part is bool `[rows, columns]`, its left upper corner x, y in pixels, and all of it lies within the image. The
    work is that of the part.
    """
    left, top = corner
    rows = np.zeros((part.shape[1], part.shape[0] + 2), bool)  # with a gap, so that no run leaves its column
    rows[:, 1:-1] = part.T
    flat = rows.ravel()
    # Runs begin and end where a value differs from the one before it.
    column, row = np.divmod(np.flatnonzero(flat[1:] != flat[:-1]), rows.shape[1])
    ends = (column + left) * height + (row + top)
    joined = np.flatnonzero(ends[1:] == ends[:-1])  # where a column's last run and the next one's first are the same
    ends = np.delete(ends, np.concatenate([joined, joined + 1]))
    pixels = width * height
    (mask,) = encode_runs([np.diff(ends[ends < pixels], prepend=0, append=pixels)], width, height)
    return mask


def join(masks: Sequence[Mask]) -> Mask:
    """The union of encoded masks of one size."""
    return _as_text(coco.merge(list(masks)))


def decode(mask: Mask) -> np.ndarray:
    """Read a mask, its counts a string or a list of run lengths: bool `[height, width]`.

    Raises ValueError if the runs are not those of an image of the mask's size.
    """
    height, width = mask["size"]
    runs = _runs(mask)
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(width, height).T


def reduce(mask: Mask, side: int) -> Mask:
    """A mask at a smaller size, its longer side so many pixels; the work does not grow with the image.

    Raises ValueError as `decode` does.
    """
    height, width = mask["size"]
    scale = min(1.0, side / max(height, width))
    rows, columns = (max(1, round(length * scale)) for length in (height, width))
    row, column = (((np.arange(n) + 0.5) * m / n).astype(int) for n, m in ((rows, height), (columns, width)))
    pixels = column[:, None] * height + row
    return encode(np.searchsorted(np.cumsum(_runs(mask)), pixels, side="right").T % 2 == 1)


def area(mask: Mask) -> int:
    """How many pixels an encoded mask has inside; raises ValueError as `decode` does."""
    return int(_runs(mask)[1::2].sum())


def _runs(mask: Mask) -> np.ndarray:
    """Lengths of the runs, int64 `[N]`."""
    height, width = mask["size"]
    runs = np.array(mask["counts"], np.int64) if isinstance(mask["counts"], list) else _run_lengths(mask["counts"])
    if runs.sum() != height * width or (runs < 0).any():
        raise ValueError(f"its runs come to {runs.sum()} pixels and the image has {height * width}")
    return runs


def _run_lengths(text: str) -> np.ndarray:
    """A number is written in groups of five bits, the lowest first; from the fourth on, as a difference.

    The difference is to the run before the last.
    """
    bits = np.frombuffer(text.encode("ascii"), np.uint8).astype(np.int64) - CHARACTER
    ends = np.flatnonzero(bits & MORE == 0)
    if not len(ends):
        return ends
    starts, bits = np.concatenate([[0], ends[:-1] + 1]), bits[: ends[-1] + 1]
    if (ends - starts).max() >= LONGEST:
        raise ValueError("a number in its counts is too long")
    places = np.arange(len(bits)) - np.repeat(starts, ends - starts + 1)
    runs = np.add.reduceat((bits & (MORE - 1)) << 5 * places, starts)
    runs -= np.where(bits[ends] & SIGN, 1 << 5 * (ends - starts + 1), 0)
    for first in (1, 2):
        runs[first::2] = np.cumsum(runs[first::2])
    return runs


def _as_text(encoded: dict[str, Any]) -> Mask:
    return {"size": list(encoded["size"]), "counts": encoded["counts"].decode("ascii")}
