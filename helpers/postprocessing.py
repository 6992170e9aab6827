"""From a model's outputs to predictions: one function a task, registered in `POSTPROCESSORS`.

A function takes the outputs of a batch, the images' sizes, the manifest and the parameters, and returns for each
image a list of predictions as the results' schema has them. A new task is one more such function. Executors import
this module; it needs numpy only.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from helpers.bundle import Manifest
from helpers.errors import ConfigError

Prediction = dict[str, Any]
Sizes = Sequence[tuple[int, int]]  # width, height of each original image, in pixels
Postprocessor = Callable[[Mapping[str, np.ndarray], Sizes, Manifest, Mapping[str, Any]], list[list[Prediction]]]


def classification(
    outputs: Mapping[str, np.ndarray], sizes: Sizes, manifest: Manifest, parameters: Mapping[str, Any]
) -> list[list[Prediction]]:
    """Return the `top_k` classes of each image with their softmax probabilities, the most probable first.

    Args:
        outputs: one float32 array `[B, classes]` of logits.
        sizes: not used; a class belongs to the whole image.
        manifest: for the labels.
        parameters: `top_k`.
    """
    (logits,) = outputs.values()
    scores = np.exp(logits - logits.max(axis=1, keepdims=True))
    scores /= scores.sum(axis=1, keepdims=True)
    best = np.argsort(-scores, axis=1, kind="stable")[:, : int(parameters["top_k"])]
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


POSTPROCESSORS: dict[str, Postprocessor] = {"classification": classification}


def parameters_for(manifest: Manifest, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The bundle's post-processing parameters with a run's own on top.

    Raises:
        ConfigError: the task has no post-processing here, or it has no parameter of that name.
    """
    if manifest.task not in POSTPROCESSORS:
        raise ConfigError(
            f"{manifest.name} has task {manifest.task!r}; post-processing exists for {', '.join(POSTPROCESSORS)}"
        )
    unknown = sorted(set(overrides) - set(manifest.postprocess))
    if unknown:
        known = ", ".join(sorted(manifest.postprocess))
        raise ConfigError(f"postprocess.{unknown[0]}: {manifest.name} has no such parameter; it has {known}")
    return {**manifest.postprocess, **overrides}
