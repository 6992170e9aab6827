"""The detections of a network in PyTorch, as the reference for converted models."""

from collections.abc import Mapping, Sequence
from typing import Any

import cv2
import numpy as np
import pandas as pd
import torch
from threadpoolctl import threadpool_limits

from helpers.metrics import average_precision
from helpers.yolact.detection import Parameters, find_instances
from helpers.yolact.network import Yolact

BATCH = 32


def normalize(network: Yolact, images: torch.Tensor) -> torch.Tensor:
    """Turn uint8 `[B, S, S, 3]`, red, green, blue, into the network's float32 input `[B, 3, S, S]`."""
    configuration = network.configuration
    mean, std = images.new_tensor([configuration.mean, configuration.std], dtype=torch.float32)
    return ((images.float() - mean) / std).permute(0, 3, 1, 2)


def segment(network: Yolact, images: Sequence[np.ndarray]) -> list[list[dict[str, Any]]]:
    """Find the instances in images, as the pipeline's stages do with a bundle's own parameters.

    Args:
        network: in evaluation mode.
        images: uint8 `[height, width, 3]`, red, green, blue; stretched to the network's input size.

    Returns:
        The predictions of each image, as the pipeline's results hold them; masks have the image's size.
    """
    parameters, size, labels = Parameters(), network.configuration.size, network.configuration.labels
    results: list[list[dict[str, Any]]] = []
    for start in range(0, len(images), BATCH):
        batch = images[start : start + BATCH]
        inputs = torch.from_numpy(np.stack([cv2.resize(image, (size, size)) for image in batch]))
        with torch.inference_mode():
            outputs = network(normalize(network, inputs.to(network.priors.device)))
        loc, conf, mask, priors, proto = (output.float().cpu().numpy() for output in outputs)
        # For an image's small matrices, numpy's threads cost more than they save. The pipeline's tasks have none.
        with threadpool_limits(1, user_api="blas"):
            results += [
                find_instances(heads, priors, parameters, size, image.shape[1::-1], labels)
                for *heads, image in zip(loc, conf, mask, proto, batch, strict=True)
            ]
    return results


def to_coco_results(predictions: Mapping[int, Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Predictions by image id as COCO's list of results; category ids are those of `scenes.to_coco`."""
    return [
        {
            "image_id": image_id,
            "category_id": prediction["class_id"],
            "score": prediction["score"],
            "segmentation": prediction["mask"],
        }
        for image_id, of_image in predictions.items()
        for prediction in of_image
    ]


def by_class(truth: dict[str, Any], results: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Mask average precision of each class and how many instances it has; arguments as for `average_precision`."""
    rows = {}
    for category in truth["categories"]:
        annotations = [a for a in truth["annotations"] if a["category_id"] == category["id"]]
        class_results = [dict(r) for r in results if r["category_id"] == category["id"]]
        alone = {**truth, "annotations": annotations, "categories": [category]}
        rows[category["name"]] = {"instances": len(annotations), **average_precision(alone, class_results)}
    return pd.DataFrame(rows).T.astype({"instances": int})
