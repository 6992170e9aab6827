"""How well masks agree with the truth: intersection over union, boundary IoU, average precision. No torch.

Boundary IoU: Cheng et al., "Boundary IoU: Improving Object-Centric Image Segmentation Evaluation", CVPR 2021. Average
precision is faster-coco-eval's, which gives what pycocotools and the paper's own code give.
"""

import math
from typing import Any

import cv2
import numpy as np
from faster_coco_eval import COCO, COCOeval_faster

from helpers.errors import DataError

BOUNDARY_RATIO = 0.02  # of the image's diagonal; what the paper takes for COCO
NEIGHBORS = np.ones((3, 3), np.uint8)


def mask_iou(mask_a: np.ndarray, mask_b: np.ndarray) -> float:
    """Intersection over union of two masks `[height, width]`, bool or not zero inside; of two empty ones it is 1.

    Raises:
        ValueError: they are of different shapes.
    """
    a, b = np.asarray(mask_a) != 0, np.asarray(mask_b) != 0
    if a.shape != b.shape or a.ndim != 2:
        raise ValueError(f"masks of shapes {a.shape} and {b.shape} cannot be compared; both must be [height, width]")
    union = np.count_nonzero(a | b)
    return np.count_nonzero(a & b) / union if union else 1.0


def boundary_iou(mask_a: np.ndarray, mask_b: np.ndarray, dilation_ratio: float = BOUNDARY_RATIO) -> float:
    """Intersection over union of what of two masks, as of `mask_iou`, lies near their own contours (equation 4).

    The boundary's width is a share of the image's diagonal.

    Raises:
        ValueError: they are of different shapes.
    """
    a, b = np.asarray(mask_a), np.asarray(mask_b)
    if a.shape != b.shape or a.ndim != 2:
        return mask_iou(a, b)  # raises
    width = boundary_width(a.shape[0], a.shape[1], dilation_ratio)
    return mask_iou(boundary(a, width), boundary(b, width))


def boundary_width(height: int, width: int, dilation_ratio: float) -> int:
    """Pixels from the contour inwards that count as boundary in an image of this size; at least 1."""
    return max(1, round(dilation_ratio * math.hypot(height, width)))


def boundary(mask: np.ndarray, width: int) -> np.ndarray:
    """The pixels of a mask within `width` of its contour, diagonals counted as 1: bool `[height, width]`.

    Beyond the image there is no mask, so an instance that the image cuts off has a contour at the cut.
    """
    inside = (np.asarray(mask) != 0).astype(np.uint8)
    core = cv2.erode(inside, NEIGHBORS, iterations=width, borderType=cv2.BORDER_CONSTANT, borderValue=0)
    return inside > core


def average_precision(
    truth: dict[str, Any], predictions: list[dict[str, Any]], boundary_ratio: float | None = None
) -> dict[str, float]:
    """COCO's mask average precision, or boundary average precision, or of predictions without masks box AP.

    Args:
        truth: in COCO's format (`images`, `annotations`, `categories`); it is not changed.
        predictions: COCO results: `image_id`, `category_id`, `score` and `segmentation`, a run-length encoding, or
            `bbox`.
        boundary_ratio: None for mask AP. For boundary AP the width of the boundary, see `boundary_iou`; the overlap is
            then the smaller of mask IoU and boundary IoU (section 5.2), so that a mask of boundary only is not a match.

    Returns:
        `AP`, the mean over the thresholds 0.50 to 0.95, `AP50` and `AP75`, each from 0 to 1.

    Raises:
        DataError: the truth has no annotations, or a prediction is of an image that the truth has not.
    """
    if not truth["annotations"]:
        raise DataError("average precision needs annotated images, and there are none")
    if not predictions:
        return {"AP": 0.0, "AP50": 0.0, "AP75": 0.0}
    unknown = {p["image_id"] for p in predictions} - {image["id"] for image in truth["images"]}
    if unknown:
        raise DataError(f"there are predictions of images that the truth has not: {sorted(unknown)[:3]}")
    # The library writes into annotations and predictions, so it gets copies.
    expected = COCO({**truth, "annotations": [dict(annotation) for annotation in truth["annotations"]]})
    shape, kind = ("segmentation", "segm") if predictions[0].get("segmentation") else ("bbox", "bbox")
    keys = ("image_id", "category_id", "score", shape)
    results = expected.loadRes([{key: prediction[key] for key in keys} for prediction in predictions])
    evaluation = COCOeval_faster(
        expected,
        results,
        kind if boundary_ratio is None else "boundary",
        print_function=lambda *_: None,
        boundary_dilation_ratio=boundary_ratio or BOUNDARY_RATIO,
        boundary_cpu_count=1,
    )
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return dict(zip(("AP", "AP50", "AP75"), map(float, evaluation.stats), strict=False))
