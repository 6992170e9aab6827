"""What the decoders of YOLO's networks share: candidates of all anchors, and the best of them."""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from helpers.tasks.boxes import LARGEST_RELATIVE, Detections, locate, make_cells, suppress, to_corners, to_input
from helpers.tasks.interface import Arrays, DecoderParameters, Outputs


@dataclass(frozen=True)
class Parameters(DecoderParameters):
    """How detections are chosen; the defaults are usual for a look at images."""

    score_threshold: float = 0.25  # of the best class's score, which is above
    nms_threshold: float = 0.45  # intersection over union above which a box is suppressed
    max_detections: int = 300  # of an image
    class_agnostic: bool = False  # boxes suppress those of other classes too
    # `strides` if boxes are raw, as YOLOX gives them: offsets from the cells of grids, such as those of 8, 16 and 32
    # pixels, and logarithms of sizes; `decoded` if they are boxes.
    grid: Literal["decoded", "strides"] = "decoded"
    relative: bool = False  # the numbers of boxes are relative to the network's input, 0 to 1, and not its pixels


def suggest_parameters(samples: Arrays, labels: int) -> dict[str, Any]:
    """Boxes are raw where some have sides below 0, which are logarithms, and relative where none is above 1.

    See `Decoder`.
    """
    predictions = samples["predictions"]
    table = predictions if predictions.shape[1] < predictions.shape[2] else predictions.swapaxes(1, 2)
    if table[:, 2:4].min(initial=0) < 0:
        return {"grid": "strides"}
    return {"relative": True} if 0 < table[:, :4].max(initial=0) <= LARGEST_RELATIVE else {}


def find_objects(outputs: Outputs, parameters: Parameters) -> Detections:
    """The detections of the output `predictions`."""
    return find_with_others(outputs, parameters)[0]


def find_with_others(outputs: Outputs, parameters: Parameters, others: int = 0) -> tuple[Detections, np.ndarray]:
    """The detections, and the other numbers of each, float32 `[n, others]`.

    The output `predictions` is float32 `[4 + C + others, A]` or transposed, boxes as center and size, and the scores of
    the classes; or `[A, 5 + C + others]` with the objectness that the scores are multiplied with.
    """
    labels, placement = len(outputs.labels), outputs.placement
    table = _orient(outputs.values["predictions"], labels + others)
    first = table.shape[0] - others - labels  # 4, or 5 where objectness stands between
    scores = table[first : table.shape[0] - others]
    best = scores.max(axis=0) if first == 4 else scores.max(axis=0) * table[4]
    candidates = np.flatnonzero((best > parameters.score_threshold) & np.isfinite(best))
    classes, best = scores[:, candidates].argmax(axis=0), best[candidates]
    raw = table[:4, candidates].T
    with np.errstate(over="ignore", invalid="ignore"):
        if parameters.grid == "strides":
            cells = make_cells(table.shape[1], placement.input)[candidates]
            raw = np.concatenate([raw[:, :2] + cells[:, :2], np.exp(raw[:, 2:])], axis=1) * cells[:, 2:]
        boxes = to_corners(raw, "cxcywh")
        boxes = to_input(boxes, placement) if parameters.relative else boxes
    usable = np.isfinite(boxes).all(axis=1)
    candidates, classes, best, boxes = candidates[usable], classes[usable], best[usable], boxes[usable]
    rows = suppress(boxes, best, parameters.nms_threshold, None if parameters.class_agnostic else classes)
    detections = locate(outputs, boxes[rows], classes[rows], best[rows], candidates[rows], parameters.max_detections)
    return detections, table[table.shape[0] - others :, detections.rows].T


def _orient(predictions: np.ndarray, numbers: int) -> np.ndarray:
    """The output with a row per number; `numbers` follow the box, and perhaps objectness."""
    widths = 4 + numbers, 5 + numbers
    sides = [side in widths for side in predictions.shape]
    if all(sides):  # there are more anchors than numbers
        return predictions if predictions.shape[0] <= predictions.shape[1] else predictions.T
    return predictions if sides[0] else predictions.T
