"""Each format's detections against the truth and against one another, without torch: for notebooks 00, 03 and 10."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from pycocotools import mask as coco
from scipy.optimize import linear_sum_assignment

from helpers.export.evaluation import to_results
from helpers.images import rle
from helpers.images.drawing import DRAWN_SCORE
from helpers.metrics import average_precision, boundary_iou, mask_iou
from helpers.tasks import Prediction

RATIOS = tuple(ratio / 1000 for ratio in range(5, 51, 5))  # of boundary IoU: 0.005 to 0.05


def to_predictions(truth: dict[str, Any], place: int) -> list[Prediction]:
    """The true instances of one image as predictions with score 1, for a drawing."""
    identity, names = truth["images"][place]["id"], {c["id"]: c["name"] for c in truth["categories"]}
    labels = list(names.values())
    instances = []
    for annotation in truth["annotations"]:
        if annotation["image_id"] == identity:
            left, top, width, height = annotation["bbox"]
            label = names[annotation["category_id"]]
            box = {"x1": left, "y1": top, "x2": left + width, "y2": top + height}
            mask = annotation["segmentation"]
            instances.append({"class_id": labels.index(label), "label": label, "score": 1.0, "box": box, "mask": mask})
    return instances


def precision_table(predictions: Mapping[str, Sequence[list[Prediction]]], truth: dict[str, Any]) -> pd.DataFrame:
    """Mask AP and boundary AP of each format, in points of 100: one row per format."""
    rows = {}
    for name, images in predictions.items():
        results = to_results(images, truth)
        mask, boundary = average_precision(truth, results), average_precision(truth, results, boundary_ratio=0.02)
        rows[name] = {
            "mask AP": mask["AP"],
            "mask AP50": mask["AP50"],
            "mask AP75": mask["AP75"],
            "boundary AP": boundary["AP"],
        }
    return 100 * pd.DataFrame.from_dict(rows, orient="index").rename_axis("format")


def overlap_table(
    predictions: Mapping[str, Sequence[list[Prediction]]], truth: dict[str, Any], ratios: Sequence[float] = RATIOS
) -> pd.DataFrame:
    """Agreement of the drawn foreground with the truth's, mean of all images.

    The foreground of an image is all of its masks together, whatever their classes, so a value tells of outlines only.

    Returns:
        One row per format, one column `mask IoU` and one for the boundary IoU at each dilation ratio.
    """
    expected = [
        foreground([a["segmentation"] for a in truth["annotations"] if a["image_id"] == image["id"]], image)
        for image in truth["images"]
    ]
    rows = {}
    for name, images in predictions.items():
        masks = [
            foreground([p["mask"] for p in instances if p["score"] >= DRAWN_SCORE], image)
            for instances, image in zip(images, truth["images"], strict=True)
        ]
        pairs = list(zip(masks, expected, strict=True))
        rows[name] = {"mask IoU": np.mean([mask_iou(*pair) for pair in pairs])} | {
            ratio: np.mean([boundary_iou(*pair, ratio) for pair in pairs]) for ratio in ratios
        }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("format")


def foreground(masks: Iterable[dict[str, Any]], image: Mapping[str, int]) -> np.ndarray:
    """The union of run-length encoded masks of an image: bool `[height, width]`."""
    union = np.zeros((image["height"], image["width"]), bool)
    for mask in masks:
        union |= rle.decode(mask)
    return union


def agreement(
    first: Iterable[list[Prediction]], second: Iterable[list[Prediction]], score: float = 0.5, tolerance: float = 0.1
) -> float:
    """The share of detections that two formats of a network have in common.

    A detection counts from a score on, in either format. The other format has it too if it has one with the same label,
    an intersection over union of at least 0.5, and a score no more than the tolerance below. One is paired with one.

    Args:
        first: detections of each image, in one format.
        second: those of the same images, in another.
        score: from which on detections count.
        tolerance: so that a detection at the edge of what counts is not lost.
    """
    common = counted = 0
    for pair in zip(first, second, strict=True):
        for ones, others in (pair, pair[::-1]):
            chosen = [p for p in ones if p["score"] >= score]
            counted += len(chosen)
            partners = [p for p in others if p["score"] >= score - tolerance]
            if chosen and partners:
                same = coco.iou(_corner_and_size(chosen), _corner_and_size(partners), [0] * len(partners)) >= 0.5
                same &= np.array([[one["label"] == other["label"] for other in partners] for one in chosen])
                common += int(same[linear_sum_assignment(same, maximize=True)].sum())
    return common / max(1, counted)


def _corner_and_size(predictions: Iterable[Prediction]) -> np.ndarray:
    boxes = [p["box"] for p in predictions]
    return np.array([[b["x1"], b["y1"], b["x2"] - b["x1"], b["y2"] - b["y1"]] for b in boxes], np.float64)
