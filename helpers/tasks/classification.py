"""The most probable classes of an image."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from helpers.bundle.manifest import Manifest
from helpers.errors import ConfigError
from helpers.tasks.interface import NO_ARRAYS, Arrays, Prediction, Shapes, Sizes, Task


def classification(
    outputs: Arrays, sizes: Sizes, manifest: Manifest, parameters: Mapping[str, Any], arrays: Arrays = NO_ARRAYS
) -> list[list[Prediction]]:
    """Return the `top_k` classes of each image with their softmax probabilities, the most probable first.

    Args:
        outputs: one float32 array `[B, classes]` of logits.
        sizes: not used; a class belongs to the whole image.
        manifest: for the labels.
        parameters: `top_k`.
        arrays: not used.
    """
    (logits,) = outputs.values()
    scores = np.exp(logits - logits.max(axis=1, keepdims=True))
    scores /= scores.sum(axis=1, keepdims=True)
    best = np.argsort(-scores, axis=1, kind="stable")[:, : parameters["top_k"]]
    return [
        [
            {
                "class_id": int(c),
                "label": manifest.labels[c],
                "score": float(row[c]),
                "box": None,
                "mask": None,
            }
            for c in classes
        ]
        for row, classes in zip(scores, best, strict=True)
    ]


def check_parameters(top_k: Any = None, **_: Any) -> None:
    """Raises ConfigError unless `top_k` is a whole number of 1 or more."""
    if isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 1:
        raise ConfigError("postprocess.top_k is not a whole number of 1 or more")


def expected_shapes(shapes: Shapes, labels: int) -> Shapes:
    """One output, with a number per label."""
    return dict.fromkeys(list(shapes)[:1], (labels,))


TASK = Task(classification, check_parameters, expected_shapes)
