"""Instances with box and mask, from the raw outputs of YOLACT's heads."""

from collections.abc import Mapping
from typing import Any

from helpers.bundle.manifest import Manifest
from helpers.errors import BundleError
from helpers.tasks.interface import NO_ARRAYS, Arrays, Prediction, Shapes, Sizes, Task
from helpers.yolact.detection import Parameters, find_instances

HEADS = ("loc", "conf", "mask", "proto")


def instance_segmentation(
    outputs: Arrays, sizes: Sizes, manifest: Manifest, parameters: Mapping[str, Any], arrays: Arrays = NO_ARRAYS
) -> list[list[Prediction]]:
    """Return the detections of each image with box and mask, the most probable first.

    Args:
        outputs: YOLACT's raw heads: `loc [B, A, 4]`, `conf [B, A, classes]`, `mask [B, A, P]`, `proto [B, H, W, P]`.
        sizes: of the images; boxes are in their pixels and masks of their size.
        manifest: for the labels and the input's size.
        parameters: as `helpers.yolact.detection.Parameters` has them.
        arrays: `priors.npy`, float32 `[A, 4]`.

    Raises:
        BundleError: the bundle has no anchors.
    """
    if "priors.npy" not in arrays:
        raise BundleError(f"{manifest.name} has no priors.npy, the anchors of its boxes; export the bundle again")
    priors, settings = arrays["priors.npy"], Parameters(**parameters)
    if priors.shape != outputs["loc"].shape[1:]:
        raise BundleError(f"{manifest.name}: priors.npy is {priors.shape}, and not as its output loc; export it again")
    return [
        find_instances(heads, priors, settings, manifest.input.width, size, manifest.labels)
        for *heads, size in zip(*(outputs[name] for name in HEADS), sizes, strict=True)
    ]


def expected_shapes(shapes: Shapes, labels: int) -> Shapes:
    """Four outputs, whose anchors and prototypes are as many in each."""
    anchors, prototypes = shapes.get("mask", (0, 0))[:1], shapes.get("mask", (0, 0))[1:]
    return {
        "loc": (*anchors, 4),
        "conf": (*anchors, labels + 1),
        "mask": (*anchors, *prototypes),
        "proto": (*shapes.get("proto", (0, 0))[:2], *prototypes),
    }


TASK = Task(instance_segmentation, Parameters, expected_shapes)
