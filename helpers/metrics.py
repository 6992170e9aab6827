"""How well masks agree with the truth: intersection over union, boundary IoU, average precision. No torch.

Boundary IoU: Cheng et al., "Boundary IoU: Improving Object-Centric Image Segmentation Evaluation", CVPR 2021. Average
precision is pycocotools' own; with a boundary ratio only the overlap that matches are made by is another.
"""

import contextlib
import io
import math
from typing import Any

import cv2
import numpy as np
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from helpers.errors import DataError

BOUNDARY_RATIO = 0.02  # of the image's diagonal; what the paper takes for COCO
NEIGHBOURS = np.ones((3, 3), np.uint8)


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
    """Intersection over union of what of two masks lies near their own contours (equation 4).

    Args:
        mask_a: `[height, width]`, bool or not zero inside.
        mask_b: likewise.
        dilation_ratio: the boundary's width as a share of the image's diagonal.

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
    core = cv2.erode(inside, NEIGHBOURS, iterations=width, borderType=cv2.BORDER_CONSTANT, borderValue=0)
    return inside > core


def average_precision(
    truth: dict[str, Any], predictions: list[dict[str, Any]], boundary_ratio: float | None = None
) -> dict[str, float]:
    """COCO's mask average precision, or boundary average precision, over a data set.

    Args:
        truth: in COCO's format (`images`, `annotations`, `categories`); it is not changed.
        predictions: COCO results: `image_id`, `category_id`, `score` and `segmentation`, a run-length encoding.
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
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
        expected = COCO()
        # pycocotools writes into annotations and predictions, so it gets copies.
        expected.dataset = {**truth, "annotations": [dict(annotation) for annotation in truth["annotations"]]}
        expected.createIndex()
        wanted = ("image_id", "category_id", "score", "segmentation")
        found = expected.loadRes([{key: prediction[key] for key in wanted} for prediction in predictions])
        evaluation = _BoundaryEvaluation(expected, found, boundary_ratio)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return dict(zip(("AP", "AP50", "AP75"), map(float, evaluation.stats), strict=False))


class _BoundaryEvaluation(COCOeval):
    """COCO's evaluation of masks; with a ratio, an overlap is at most that of the boundaries."""

    def __init__(self, truth: COCO, found: COCO, ratio: float | None):
        super().__init__(truth, found, "segm")
        self.ratio = ratio

    def computeIoU(self, imgId: int, catId: int) -> Any:  # noqa: N802, N803 (pycocotools' names)
        """Overlaps of one image's detections of a class, the best first, with its instances: `[detections, truth]`."""
        overlaps = super().computeIoU(imgId, catId)
        if self.ratio is None or len(overlaps) == 0:
            return overlaps
        detections = sorted(self._dts[imgId, catId], key=lambda d: -d["score"])[: self.params.maxDets[-1]]
        instances = self._gts[imgId, catId]
        # The smaller of two overlaps cannot reach a threshold that the mask's own does not.
        (near,) = np.nonzero((overlaps >= self.params.iouThrs[0]).any(axis=1))
        if not len(near):
            return overlaps
        at_boundary = coco_mask.iou(
            [_encoded_boundary(detections[i]["segmentation"], self.ratio) for i in near],
            [_encoded_boundary(instance["segmentation"], self.ratio) for instance in instances],
            [int(instance["iscrowd"]) for instance in instances],
        )
        overlaps[near] = np.minimum(overlaps[near], at_boundary)
        return overlaps


def _encoded_boundary(encoded: dict[str, Any], ratio: float) -> dict[str, Any]:
    """The boundary of a run-length encoded mask, encoded too; computed within its box only."""
    left, top, width, height = (int(value) for value in coco_mask.toBbox(encoded))
    if not width:
        return encoded
    mask = coco_mask.decode(encoded)
    window = np.s_[top : top + height, left : left + width]
    mask[window] = boundary(mask[window], boundary_width(encoded["size"][0], encoded["size"][1], ratio))
    return coco_mask.encode(np.asfortranarray(mask))
