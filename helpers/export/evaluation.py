"""Predictions against the truth: of data sets with annotations, or of one model's predictions taken for the truth.

The truth of a classification is a list of class indices, that of instance segmentation is a dictionary in COCO's
format. Both are per image, in the images' order. No torch.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from threadpoolctl import threadpool_limits

from helpers import tasks
from helpers.bundle.manifest import Manifest
from helpers.images.drawing import DRAWN_SCORE
from helpers.metrics import average_precision
from helpers.tasks import Arrays, Prediction

if TYPE_CHECKING:
    import openvino as ov

Engine = Callable[[np.ndarray], Arrays]  # uint8 [B, H, W, C] -> float32 [B, ...] by name
Truth = dict[str, Any] | Sequence[int]


def compiled_engine(compiled: "ov.CompiledModel") -> Engine:
    """A model that OpenVINO has compiled."""

    def infer(images: np.ndarray) -> dict[str, np.ndarray]:
        outputs = compiled(images, share_inputs=True)
        return {output.get_any_name(): outputs[output] for output in compiled.outputs}

    return infer


def predict(engine: Engine, images: Iterable[np.ndarray], manifest: Manifest, arrays: Arrays) -> list[list[Prediction]]:
    """Predict images one at a time, as the pipeline does.

    Args:
        engine: returns the outputs of uint8 images `[B, H, W, C]` by name.
        images: uint8 `[H, W, C]` each, of the size of the model's input; boxes and masks are of that size too.
        manifest: says how outputs are post-processed.
        arrays: that post-processing needs.
    """
    sizes, settings = [(manifest.input.width, manifest.input.height)], manifest.postprocess
    # numpy's threads for an image's small matrices cost more than they save beside the engine's, and tasks have none.
    with threadpool_limits(1, user_api="blas"):
        return [tasks.predict(engine(image[None]), sizes, manifest, settings, arrays)[0] for image in images]


def to_truth(predictions: Sequence[list[Prediction]], manifest: Manifest) -> Truth:
    """Take a model's predictions, from `predict`, for the truth that another one is measured by.

    Of detections those count that are probable enough to be drawn.
    """
    if manifest.task == "classification":
        return [instances[0]["class_id"] for instances in predictions]
    annotations = [
        {"image_id": i, "category_id": p["class_id"], "segmentation": p["mask"], "iscrowd": 0, "area": 0, "bbox": []}
        for i, instances in enumerate(predictions)
        for p in instances
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
        return float(np.mean([classes[0]["class_id"] == truth[i] for i, classes in predictions.items()]))
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
        for image, instances in zip(truth["images"], predictions, strict=True)
        for p in instances
    ]
