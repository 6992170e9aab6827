"""What every decoder of boxes does: formats, non-maximum suppression, the way back to the image.

Boxes are corners x1, y1, x2, y2, float32, in pixels. Executors import this module.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations
from typing import Any, Literal

import cv2
import numpy as np

from helpers.images.geometry import Placement
from helpers.images.rle import Mask
from helpers.tasks.interface import OutputError, Outputs, Prediction, make_prediction

Order = Literal["xy", "yx"]
BoxFormat = Literal["xyxy", "yxyx", "xywh", "cxcywh"]
SIDES = ("x1", "y1", "x2", "y2")
STRIDES = (4, 8, 16, 32, 64, 128)  # of grids, in pixels of the input; a network has some that follow each other
MOST_ANCHORS = 9  # of a cell
LARGEST_RELATIVE = 1.5  # coordinates relative to the input reach so far at most; boxes may reach beyond it


@dataclass(frozen=True)
class Detections:
    """Those of one image, the best first."""

    boxes: np.ndarray  # float32 `[n, 4]`, in pixels of the image and within it
    classes: np.ndarray  # int `[n]`, the first label's as 0
    scores: np.ndarray  # float32 `[n]`
    rows: np.ndarray  # int `[n]`, the place of each among the candidates, for what else belongs to it
    masks: Sequence[Mask] | None = None  # one per detection, at the image's size
    keypoints: np.ndarray | None = None  # x, y in pixels of the image and score, float32 `[n, K, 3]`

    def to_predictions(self, labels: Sequence[str]) -> list[Prediction]:
        """The same as the results' schema has them."""
        none = [None] * len(self.rows)
        boxes = [dict(zip(SIDES, box, strict=True)) for box in self.boxes.tolist()]
        points: Sequence[Any] = none
        if self.keypoints is not None:
            points = [[{"x": x, "y": y, "score": score} for x, y, score in own] for own in self.keypoints.tolist()]
        columns = self.classes.tolist(), self.scores.tolist(), boxes, self.masks or none, points
        return [make_prediction(labels, *values) for values in zip(*columns, strict=True)]


def to_corners(boxes: np.ndarray, box_format: BoxFormat) -> np.ndarray:
    """Boxes `[n, 4]` of any format as corners."""
    if box_format == "yxyx":
        return boxes[:, [1, 0, 3, 2]]
    if box_format == "xyxy":
        return boxes
    low = boxes[:, :2] - boxes[:, 2:] / 2 if box_format == "cxcywh" else boxes[:, :2]
    return np.concatenate([low, low + boxes[:, 2:]], axis=1)


def to_input(boxes: np.ndarray, placement: Placement) -> np.ndarray:
    """Boxes `[n, 4]` relative to the network's input, 0 to 1, in its pixels."""
    return boxes * np.array(placement.input * 2, np.float32)


@lru_cache(maxsize=8)  # of images of any size each has its own
def make_cells(rows: int, input_size: tuple[int, int], levels: int = 0) -> np.ndarray:
    """The cells of a network's grids, whose strides the number of candidates tells.

    Candidates, `rows` of them, are of all cells, the smallest stride's first, each once or once per anchor; there may
    be so many `levels`, or 0 if nobody has said. Raises OutputError if no grids have so many cells.

    Returns:
        For each candidate the column and the row of its cell, and the stride in pixels, float32 `[rows, 3]`.
    """
    runs = [STRIDES[first:stop] for first, stop in combinations(range(len(STRIDES) + 1), 2)]
    grids = [
        [(s, *(-(-side // s) for side in input_size)) for s in run] for run in runs if len(run) == (levels or len(run))
    ]
    for anchors in range(1, MOST_ANCHORS + 1):
        for sizes in grids:
            if rows == anchors * sum(width * height for _, width, height in sizes):
                cells = [np.stack([*np.meshgrid(range(w), range(h)), np.full((h, w), s)], -1) for s, w, h in sizes]
                places = np.concatenate([grid.reshape(-1, 3) for grid in cells])
                return np.repeat(places, anchors, axis=0).astype(np.float32)
    grids_of = f"{', '.join(map(str, STRIDES))} pixels in an input of {' x '.join(map(str, input_size))}"
    raise OutputError(f"no grids of {grids_of} have {rows} cells: mend the input's size")


def in_order(points: np.ndarray, order: Order) -> np.ndarray:
    """Points `[..., 2]` of either order as x, y."""
    return points[..., ::-1] if order == "yx" else points


def clip(points: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Points x, y `[..., 2 * n]` moved into an image of a width and height."""
    pairs = points.reshape(*points.shape[:-1], points.shape[-1] // 2, 2)
    return np.clip(pairs, 0, np.array(size, np.float32)).reshape(points.shape)


def suggest_format(boxes: np.ndarray) -> dict[str, Any]:
    """The parameters `box_format` and `relative` of boxes `[..., 4]`, as far as their values tell them.

    Corners whose coordinates are in the other order look the same, and so do low corners and centers.
    """
    boxes = boxes.reshape(-1, 4)
    parameters: dict[str, Any] = {}
    if 0 < boxes.max(initial=0) <= LARGEST_RELATIVE:
        parameters["relative"] = True
    if np.count_nonzero((boxes[:, 2:] < boxes[:, :2]).any(axis=1)) > 0.01 * len(boxes):
        parameters["box_format"] = "cxcywh"
    return parameters


def suppress(boxes: np.ndarray, scores: np.ndarray, threshold: float, classes: np.ndarray | None = None) -> np.ndarray:
    """Greedy non-maximum suppression: each box that overlaps a better one's survivor goes.

    Boxes are float32 `[n, 4]` and finite, scores float32 `[n]` and above 0. A box is suppressed above the threshold of
    intersection over union; boxes of different classes, int `[n]` if there are several, do not suppress each other.
    Returns the places of the survivors, the best first.
    """
    corners = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1).astype(np.float64)
    order = np.arange(len(boxes)) if classes is None else np.argsort(classes, kind="stable")
    bounds = order[:0] if classes is None else np.flatnonzero(np.diff(classes[order])) + 1
    nms: Any = cv2.dnn.NMSBoxes  # its stub knows of no arrays
    # A class at a time, because OpenCV's own NMSBoxesBatched compares the boxes of all classes.
    groups = [rows for rows in np.split(order, bounds) if len(rows)]
    survivors = [rows[np.array(nms(corners[rows], scores[rows], 0.0, threshold), int)] for rows in groups]
    places = np.concatenate([*survivors, order[:0]])
    return places[np.argsort(-scores[places], kind="stable")]


def locate(
    outputs: Outputs, boxes: np.ndarray, classes: np.ndarray, scores: np.ndarray, rows: np.ndarray, max_detections: int
) -> Detections:
    """Take boxes, float32 `[n, 4]` in pixels of the input, to the image; leave out those outside of it or no boxes.

    The first label's class is 0, and `rows` is the place of each among the candidates. Raises OutputError if a class
    has no label.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        located = outputs.placement.to_image(boxes)
    located = clip(located, outputs.placement.image)
    # A comparison with not-a-number is false, so a damaged network's boxes go too.
    visible = (located[:, 2:] > located[:, :2]).all(axis=1) & np.isfinite(boxes).all(axis=1) & np.isfinite(scores)
    best = np.flatnonzero(visible)
    best = best[np.argsort(-scores[best], kind="stable")][:max_detections]
    check_classes(classes[best], outputs.labels)
    return Detections(located[best], classes[best].astype(int), scores[best], rows[best])


def check_classes(classes: np.ndarray, labels: Sequence[str], parameter: str = "first_class") -> None:
    """Raises OutputError if a class has no label; `parameter` may be the reason."""
    if len(classes) and not (classes.min() >= 0 and classes.max() < len(labels)):
        odd = classes[(classes < 0) | ~(classes < len(labels))][0]
        problem = f"the model gives class {odd:g}, counted from 0, and there are {len(labels)} labels"
        raise OutputError(f"{problem}: mend the labels, or postprocess.{parameter}")


def to_keypoints(points: np.ndarray, scores: np.ndarray, placement: Placement) -> np.ndarray:
    """Points `[n, K, 2]` in the input's pixels, and their scores `[n, K]` or `[n]`, as `Detections` has them."""
    located = clip(placement.to_image(np.ascontiguousarray(points)), placement.image)
    each = scores if scores.ndim == 2 else np.broadcast_to(scores[:, None], points.shape[:2])
    return np.concatenate([located, each[..., None]], axis=-1)
