"""Predictions against the truth: of data sets with annotations, or of one model's predictions taken for the truth.

The truth of a classification is a list of class indices, that of instance segmentation is a dictionary in COCO's
format. Both are per image, in the images' order. No torch.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from threadpoolctl import threadpool_limits

from helpers.images.pictures import DRAWN_SCORE
from helpers.metrics import average_precision, boundary_iou, mask_iou
from helpers.models.bundle import Manifest
from helpers.stages.postprocessing import POSTPROCESSORS, Arrays, Prediction
from helpers.yolact.masks import decode_mask

Engine = Callable[[np.ndarray], Arrays]  # uint8 [B, H, W, C] -> float32 [B, ...] by name
Truth = dict[str, Any] | Sequence[int]
RATIOS = tuple(ratio / 1000 for ratio in range(5, 51, 5))  # of boundary IoU: 0.005 to 0.05


def predict(engine: Engine, images: Iterable[np.ndarray], manifest: Manifest, arrays: Arrays) -> list[list[Prediction]]:
    """Predict images one at a time, as the pipeline does.

    Args:
        engine: returns the outputs of uint8 images `[B, H, W, C]` by name.
        images: uint8 `[H, W, C]` each, of the size of the model's input; boxes and masks are of that size too.
        manifest: says how outputs are post-processed.
        arrays: that post-processing needs.
    """
    process, size = POSTPROCESSORS[manifest.task], (manifest.input.width, manifest.input.height)
    # numpy's threads for an image's small matrices cost more than they save beside the engine's, and tasks have none.
    with threadpool_limits(1, user_api="blas"):
        return [process(engine(image[None]), [size], manifest, manifest.postprocess, arrays)[0] for image in images]


def to_truth(predictions: Sequence[list[Prediction]], manifest: Manifest) -> Truth:
    """Take a model's predictions, from `predict`, for the truth that another one is measured by.

    Of detections those count that are probable enough to be drawn.
    """
    if manifest.task == "classification":
        return [found[0]["class_id"] for found in predictions]
    annotations = [
        {"image_id": i, "category_id": p["class_id"], "segmentation": p["mask"], "iscrowd": 0, "area": 0, "bbox": []}
        for i, found in enumerate(predictions)
        for p in found
        if p["score"] >= DRAWN_SCORE
    ]
    size = {"width": manifest.input.width, "height": manifest.input.height}
    images = [{"id": i, **size} for i in range(len(predictions))]
    categories = [{"id": i, "name": name} for i, name in enumerate(manifest.labels)]
    numbered = [{**annotation, "id": i} for i, annotation in enumerate(annotations, 1)]
    return {"images": images, "annotations": numbered, "categories": categories}


def score(predictions: Mapping[int, list[Prediction]], truth: Truth) -> float:
    """How well images are predicted: accuracy of the best class, or mask AP; 1 where there is nothing to find.

    Args:
        predictions: by the image's place in the truth; the other images are left out.
        truth: of all images.
    """
    if not isinstance(truth, dict):
        return float(np.mean([found[0]["class_id"] == truth[i] for i, found in predictions.items()]))
    images = [truth["images"][i] for i in predictions]
    identities = {image["id"] for image in images}
    annotations = [a for a in truth["annotations"] if a["image_id"] in identities]
    if not annotations:
        return 1.0
    part = {**truth, "images": images, "annotations": annotations}
    return average_precision(part, to_results(predictions.values(), part))["AP"]


def to_results(predictions: Iterable[list[Prediction]], truth: dict[str, Any]) -> list[dict[str, Any]]:
    """COCO results of the truth's images, in order; classes are matched by their names."""
    categories = {category["name"]: category["id"] for category in truth["categories"]}
    return [
        {
            "image_id": image["id"],
            "category_id": categories[p["label"]],
            "score": p["score"],
            "segmentation": p["mask"],
        }
        for image, found in zip(truth["images"], predictions, strict=True)
        for p in found
    ]


def to_predictions(truth: dict[str, Any], place: int) -> list[Prediction]:
    """The instances of one of the truth's images as predictions without doubt, to be drawn."""
    identity, names = truth["images"][place]["id"], {c["id"]: c["name"] for c in truth["categories"]}
    labels = list(names.values())
    found = []
    for annotation in truth["annotations"]:
        if annotation["image_id"] == identity:
            left, top, width, height = annotation["bbox"]
            label = names[annotation["category_id"]]
            box = {"x1": left, "y1": top, "x2": left + width, "y2": top + height}
            mask = annotation["segmentation"]
            found.append({"class_id": labels.index(label), "label": label, "score": 1.0, "box": box, "mask": mask})
    return found


def precision_table(predictions: Mapping[str, Sequence[list[Prediction]]], truth: dict[str, Any]) -> pd.DataFrame:
    """Mask AP and boundary AP of each format, in points of 100: one row a format."""
    rows = {}
    for name, found in predictions.items():
        results = to_results(found, truth)
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
    """Agreement of what is drawn as foreground with the truth's, mean of all images.

    The foreground of an image is all of its masks together, whatever their classes, so a value tells of outlines only.

    Returns:
        One row a format, one column `mask IoU` and one for the boundary IoU at each dilation ratio.
    """
    expected = [
        foreground([a["segmentation"] for a in truth["annotations"] if a["image_id"] == image["id"]], image)
        for image in truth["images"]
    ]
    rows = {}
    for name, found in predictions.items():
        masks = [
            foreground([p["mask"] for p in instances if p["score"] >= DRAWN_SCORE], image)
            for instances, image in zip(found, truth["images"], strict=True)
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
        union |= decode_mask(mask)
    return union
