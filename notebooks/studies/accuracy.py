"""Tables of notebook 03: each format's detections against the truth and against one another, without torch."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

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
