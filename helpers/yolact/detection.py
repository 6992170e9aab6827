"""From one image's raw heads to its instances: box decoding, non-maximum suppression, masks. numpy only.

Boxes are corners x1, y1, x2, y2, float32, relative to the image, and may reach beyond it. The order of operations and
every comparison is that of the official implementation's evaluation, so that its thresholds mean the same here.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from helpers.errors import check_parameters
from helpers.yolact.masks import encode_masks

CENTER_VARIANCE, SIZE_VARIANCE = np.float32(0.1), np.float32(0.2)  # the scale that offsets were trained at
EVALUATION_THRESHOLD = 0.05
BLOCK = 256  # candidates that fast NMS looks at together

Pairs = tuple[np.ndarray, np.ndarray]  # classes and anchors, of as many detections, the best first


@dataclass(frozen=True)
class Parameters:
    """How detections are chosen, by default as in the official evaluation; an impossible value raises ConfigError."""

    # An anchor takes part if its best class has more. Up to 0.05 it is then a candidate for every class, however
    # improbable, because average precision counts those too; with a higher threshold, which asks for what is probable,
    # each detection must have more.
    score_threshold: float = EVALUATION_THRESHOLD
    # `fast` (section 5), `cross_class` (the same, over all classes at once) or `traditional` (greedy).
    nms: Literal["fast", "cross_class", "traditional"] = "fast"
    nms_threshold: float = 0.5  # intersection over union above which a box is suppressed
    top_k: int = 200  # candidates of each class, for `fast`, or of all together, for `cross_class`
    max_detections: int = 100  # of an image; the official `cross_class` does not apply it, and gives up to `top_k`
    mask_threshold: float = 0.5  # a pixel belongs to a mask if its probability is above

    def __post_init__(self) -> None:
        check_parameters(self)


@dataclass(frozen=True)
class Detections:
    """Those of one image, the best first: boxes `[n, 4]`, classes `[n]` without the background, scores, coefficients.

    `boxes`, `scores [n]` and the mask `coefficients [n, prototypes]` are float32; `classes` counts the first
    foreground class as 0.
    """

    boxes: np.ndarray
    classes: np.ndarray
    scores: np.ndarray
    coefficients: np.ndarray


def find_instances(
    heads: Sequence[np.ndarray],
    priors: np.ndarray,
    parameters: Parameters,
    input_size: int,
    image_size: tuple[int, int],
    labels: Sequence[str],
) -> list[dict[str, Any]]:
    """Detect the instances of one image and assemble their masks.

    The heads are `loc`, `conf` and `mask` as for `detect`, and `proto`, float32 `[H, W, prototypes]`; labels are of the
    foreground classes. Boxes are in pixels of the image, of `image_size` (width, height), and masks of that size.

    Returns:
        Predictions as the pipeline's results hold them, the most probable first.
    """
    loc, conf, mask, proto = heads
    detections = detect(loc, conf, mask, priors, parameters, input_size)
    boxes = to_pixels(detections.boxes, *image_size).tolist()
    masks = encode_masks(proto, detections.coefficients, detections.boxes, *image_size, parameters.mask_threshold)
    return [
        {
            "class_id": class_id,
            "label": labels[class_id],
            "score": score,
            "box": dict(zip(("x1", "y1", "x2", "y2"), box, strict=True)),
            "mask": encoded,
            "keypoints": None,
        }
        for class_id, score, box, encoded in zip(
            detections.classes.tolist(), detections.scores.tolist(), boxes, masks, strict=True
        )
    ]


def detect(
    loc: np.ndarray, conf: np.ndarray, mask: np.ndarray, priors: np.ndarray, parameters: Parameters, size: int
) -> Detections:
    """Decode and select the detections of one image.

    Args:
        loc: float32 `[A, 4]`, offsets.
        conf: float32 `[A, classes]`, probabilities, the background first.
        mask: float32 `[A, prototypes]`, mask coefficients.
        priors: float32 `[A, 4]`, anchors.
        parameters: thresholds and method.
        size: side of the network's input in pixels, the unit of boxes in traditional NMS.
    """
    candidates = np.flatnonzero(conf[:, 1:].max(axis=1) > parameters.score_threshold)
    with np.errstate(over="ignore", invalid="ignore"):
        boxes = decode(loc[candidates], priors[candidates])
    usable = np.isfinite(boxes).all(axis=1)  # a damaged or badly quantized network's sizes can be beyond all numbers
    candidates, boxes = candidates[usable], boxes[usable]
    probabilities = np.ascontiguousarray(conf[candidates, 1:].T)
    classes, anchors = NMS[parameters.nms](probabilities, boxes, parameters, size)
    scores = probabilities[classes, anchors]
    lowest = parameters.score_threshold if parameters.score_threshold > EVALUATION_THRESHOLD else 0.0
    count = int(np.count_nonzero(scores > lowest))  # they are in order
    classes, anchors = classes[:count], anchors[:count]
    return Detections(boxes[anchors], classes, scores[:count], mask[candidates[anchors]])


def decode(loc: np.ndarray, priors: np.ndarray) -> np.ndarray:
    """Turn offsets and anchors (center, size), float32 `[n, 4]` each, into boxes (corners), float32 `[n, 4]`."""
    centers = priors[:, :2] + loc[:, :2] * CENTER_VARIANCE * priors[:, 2:]
    sizes = priors[:, 2:] * np.exp(loc[:, 2:] * SIZE_VARIANCE)
    low = centers - sizes / 2
    return np.concatenate([low, low + sizes], axis=1)


def to_pixels(boxes: np.ndarray, width: int, height: int) -> np.ndarray:
    """Relative boxes to whole pixels of an image, float32 `[n, 4]`, their fractions cut off.

    The low side is at least 0 and the high side at most the image's; a box that lies wholly outside has a high side
    below its low one.
    """
    scaled = boxes * np.array([width, height, width, height], np.float32)
    low, high = np.minimum(scaled[:, :2], scaled[:, 2:]), np.maximum(scaled[:, :2], scaled[:, 2:])
    high = np.minimum(high, np.array([width, height], np.float32))
    return np.trunc(np.concatenate([np.maximum(low, 0), high], axis=1))


def overlaps(one: np.ndarray, other: np.ndarray, border: float = 0.0) -> np.ndarray:
    """Intersection over union of boxes `[..., 4]`, broadcast; two boxes without area give not-a-number.

    `border` is added to every side: 1 where boxes are pixels, both ends included.
    """
    low, high = np.maximum(one[..., :2], other[..., :2]), np.minimum(one[..., 2:], other[..., 2:])
    both = np.maximum(high - low + np.float32(border), 0).prod(axis=-1)
    areas = [(b[..., 2:] - b[..., :2] + np.float32(border)).prod(axis=-1) for b in (one, other)]
    with np.errstate(invalid="ignore"):
        return both / (areas[0] + areas[1] - both)


def fast_nms(probabilities: np.ndarray, boxes: np.ndarray, parameters: Parameters, size: int = 0) -> Pairs:
    """Suppress within each class what overlaps anything more probable, be that suppressed or not (section 5).

    The definition compares all candidates of all classes; few of them can be among the best `max_detections`, so
    candidates are looked at from the best down, a block at a time, until there are enough. Probabilities are float32
    `[classes, n]`, and boxes float32 `[n, 4]`; `size` is not used.
    """
    order = _best_of_each(probabilities, parameters.top_k)  # [classes, top_k]
    scores = np.take_along_axis(probabilities, order, axis=1).ravel()
    survivors: list[np.ndarray] = []
    total, ranking = 0, np.argsort(-scores, kind="stable")
    for start in range(0, len(ranking), BLOCK):
        candidates = ranking[start : start + BLOCK]
        classes, ranks = np.divmod(candidates, order.shape[1])
        better = np.arange(ranks.max()) < ranks[:, None]
        overlap = overlaps(boxes[order[classes, ranks], None], boxes[order[classes, : ranks.max()]])
        # Not-a-number, of boxes without area, suppresses too.
        survivors.append(candidates[~(better & ~(overlap <= parameters.nms_threshold)).any(axis=1)])
        total += len(survivors[-1])
        if total >= parameters.max_detections:
            break
    best = np.concatenate([*survivors, ranking[:0]])[: parameters.max_detections]
    return best // max(order.shape[1], 1), order.ravel()[best]


def cross_class_nms(probabilities: np.ndarray, boxes: np.ndarray, parameters: Parameters, size: int = 0) -> Pairs:
    """Fast NMS over all classes at once, each anchor with its best class only; arguments as for `fast_nms`."""
    _, anchors = fast_nms(probabilities.max(axis=0, keepdims=True), boxes, parameters)
    return probabilities[:, anchors].argmax(axis=0), anchors


def traditional_nms(probabilities: np.ndarray, boxes: np.ndarray, parameters: Parameters, size: int) -> Pairs:
    """Suppress within each class what overlaps anything more probable that is kept itself; arguments as for `fast_nms`.

    As the official implementation does, boxes are in pixels of the network's input, of side `size`, with both ends
    included, only probabilities above `score_threshold` count, and a box is suppressed at the threshold itself.
    """
    survivors, pixels = [], boxes * np.float32(size)
    for row in probabilities:
        candidates = np.flatnonzero(row > parameters.score_threshold)
        candidates = candidates[np.argsort(-row[candidates], kind="stable")]
        chosen = []
        while len(candidates):
            chosen.append(candidates[0])
            overlap = overlaps(pixels[candidates[0]], pixels[candidates[1:]], border=1)
            candidates = candidates[1:][~(overlap >= parameters.nms_threshold)]
        survivors.append(np.array(chosen, int))
    classes = np.repeat(np.arange(len(survivors)), [len(rows) for rows in survivors])
    anchors = np.concatenate([*survivors, np.zeros(0, int)]).astype(int)
    best = np.argsort(-probabilities[classes, anchors], kind="stable")[: parameters.max_detections]
    return classes[best], anchors[best]


NMS: dict[str, Callable[[np.ndarray, np.ndarray, Parameters, int], Pairs]] = {
    "fast": fast_nms,
    "cross_class": cross_class_nms,
    "traditional": traditional_nms,
}


def _best_of_each(probabilities: np.ndarray, count: int) -> np.ndarray:
    """Columns of the `count` largest values of each row, in descending order; of equal ones the first comes first."""
    if probabilities.shape[1] > 4 * count > 0:  # choosing before sorting takes less than sorting all
        columns = np.sort(np.argpartition(-probabilities, count - 1, axis=1)[:, :count], axis=1)
        order = np.argsort(-np.take_along_axis(probabilities, columns, axis=1), axis=1, kind="stable")
        return np.take_along_axis(columns, order, axis=1)
    return np.argsort(-probabilities, axis=1, kind="stable")[:, :count]
