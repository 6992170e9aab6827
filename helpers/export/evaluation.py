"""Predictions against the truth: of data sets with annotations, or of one model's predictions taken for the truth.

The truth of a classification is a list of class indices, that of embeddings a list of vectors, that of semantic
segmentation a list of predictions; that of boxes and of instances' masks is a dictionary in COCO's format. All are per
image, in the images' order. No torch.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from threadpoolctl import threadpool_limits

from helpers import tasks
from helpers.bundle.manifest import Manifest
from helpers.images import rle
from helpers.images.drawing import DRAWN_SCORE
from helpers.metrics import average_precision, mask_iou
from helpers.tasks import Arrays, Prediction

if TYPE_CHECKING:
    import openvino as ov

Engine = Callable[[np.ndarray], Arrays]  # uint8 [B, H, W, C] -> float32 [B, ...] by name
Truth = dict[str, Any] | Sequence[Any]

NO_CLASS = -1  # of an image in which a network sees none
# Boxes at an overlap of 0.5: two models' differ by pixels, which count for little where nobody has drawn them.
BOX_MEASURE = "box AP50"
MEASURES = {
    "classification": "accuracy",
    "embedding": "cosine similarity",
    "detection": BOX_MEASURE,
    "keypoints": BOX_MEASURE,
    "instance_segmentation": "mask AP",
    "semantic_segmentation": "mean IoU",
}


def compiled_engine(compiled: "ov.CompiledModel") -> Engine:
    """A model that OpenVINO has compiled."""
    names = [output.get_any_name() for output in compiled.outputs]

    def infer(images: np.ndarray) -> dict[str, np.ndarray]:
        outputs = compiled(images, share_inputs=True)
        return {name: outputs[position] for position, name in enumerate(names)}

    return infer


def predict(engine: Engine, images: Iterable[np.ndarray], manifest: Manifest, arrays: Arrays) -> list[list[Prediction]]:
    """Predict images one at a time, as the pipeline does.

    Images are uint8 `[H, W, C]` each, of the size of the model's input; boxes and masks are of that size too. The
    arrays are those that post-processing needs, as the manifest says.
    """
    # Images are prepared already, whatever the rule was.
    manifest = replace(manifest, input=replace(manifest.input, resize="none"))
    # numpy's threads for an image's small matrices cost more than they save beside the engine's, and tasks have none.
    with threadpool_limits(1, user_api="blas"):
        return [
            tasks.predict(engine(image[None]), [image.shape[1::-1]], manifest, manifest.postprocess, arrays)[0]
            for image in images
        ]


def to_truth(predictions: Sequence[list[Prediction]], manifest: Manifest) -> Truth:
    """Take a model's predictions, from `predict`, for the truth that another one is measured by.

    Of detections those count that are probable enough to be drawn.
    """
    if manifest.task == "classification":
        return [instances[0]["class_id"] if instances else NO_CLASS for instances in predictions]
    if manifest.task in ("embedding", "semantic_segmentation"):
        return list(predictions)
    drawn = ((i, p) for i, instances in enumerate(predictions) for p in instances if p["score"] >= DRAWN_SCORE)
    annotations = [
        {"id": number, "image_id": i, "category_id": p["class_id"], "iscrowd": 0, **_shape(p)}
        for number, (i, p) in enumerate(drawn, 1)
    ]
    size = {"width": manifest.input.width, "height": manifest.input.height}
    images = [{"id": i, **size} for i in range(len(predictions))]
    categories = [{"id": i, "name": name} for i, name in enumerate(manifest.labels)]
    return {"images": images, "annotations": annotations, "categories": categories}


def score(predictions: Mapping[int, list[Prediction]], truth: Truth) -> float:
    """How well images are predicted, by the measure of the task (`MEASURES`); 1 where there is nothing to find.

    Predictions are by the image's place in the truth, which is of all images; the other images are left out.
    """
    if not isinstance(truth, dict):
        return float(np.mean([_agreement(own, truth[i]) for i, own in predictions.items()]))
    images = [truth["images"][i] for i in predictions]
    identities = {image["id"] for image in images}
    annotations = [a for a in truth["annotations"] if a["image_id"] in identities]
    if not annotations:
        return 1.0
    part = {**truth, "images": images, "annotations": annotations}
    precision = average_precision(part, to_results(predictions.values(), part))
    return precision["AP" if "segmentation" in annotations[0] else "AP50"]


def to_results(predictions: Iterable[list[Prediction]], truth: dict[str, Any]) -> list[dict[str, Any]]:
    """COCO results of the truth's images, in order; classes are matched by their names."""
    categories = {category["name"]: category["id"] for category in truth["categories"]}
    return [
        {"image_id": image["id"], "category_id": categories[p["label"]], "score": p["score"], **_shape(p)}
        for image, instances in zip(truth["images"], predictions, strict=True)
        for p in instances
    ]


def _shape(prediction: Prediction) -> dict[str, Any]:
    """Mask or box of a prediction in COCO's format."""
    x1, y1, x2, y2 = prediction["box"].values()
    area = {"bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1)}
    return {**area, "segmentation": prediction["mask"]} if prediction["mask"] else area


def _agreement(predicted: Any, expected: Any) -> float:
    """Of one image: whether the class is the same; the mean overlap of classes' masks; the cosine of two embeddings."""
    if isinstance(expected, int | np.integer):
        return float((predicted[0]["class_id"] if predicted else NO_CLASS) == expected)
    if isinstance(expected, np.ndarray):
        lengths = float(np.linalg.norm(predicted) * np.linalg.norm(expected))
        return float(np.dot(predicted, expected)) / lengths if lengths else float(np.array_equal(predicted, expected))
    ours, theirs = ({p["class_id"]: rle.decode(p["mask"]) for p in masks} for masks in (predicted, expected))
    both = ours.keys() | theirs.keys()
    overlaps = [mask_iou(ours[c], theirs[c]) if c in ours and c in theirs else 0.0 for c in both]
    return float(np.mean(overlaps)) if overlaps else 1.0
