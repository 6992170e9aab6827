"""The most probable classes of an image, or all that are probable enough where it may have several."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from helpers.bundle.manifest import Manifest
from helpers.errors import check_parameters
from helpers.tasks.interface import Arrays, Decoder, Prediction, Sizes
from helpers.tasks.roles import Role, are_shares, assign_roles, check_shapes

SHAPES = ("C", "C 1 1", "1 1 C")


@dataclass(frozen=True)
class Parameters:
    """How many classes an image has.

    Attributes:
        top_k: at most so many.

    Raises:
        ConfigError: a value is of the wrong type or out of range.
    """

    top_k: int = 3

    def __post_init__(self) -> None:
        check_parameters(self)


@dataclass(frozen=True)
class SeveralParameters(Parameters):
    """How many classes an image has, and how probable each is.

    Attributes:
        threshold: of the probability, which is at least so much.
    """

    threshold: float = 0.5


def softmax(logits: np.ndarray, axis: int = 1) -> np.ndarray:
    """Probabilities of classes of which one is true, along an axis."""
    scores = np.exp(logits - logits.max(axis=axis, keepdims=True))
    scores /= scores.sum(axis=axis, keepdims=True)
    return scores


def sigmoid(logits: np.ndarray) -> np.ndarray:
    """Probabilities of classes of which any number is true."""
    with np.errstate(over="ignore"):  # far below 0 the exponential is infinite, and the probability 0
        return 1 / (1 + np.exp(-logits))


def classify(
    activation: Callable[[np.ndarray], np.ndarray],
    parameters: type[Parameters],
    outputs: Arrays,
    sizes: Sizes,
    manifest: Manifest,
    settings: Mapping[str, Any],
    arrays: Arrays,
) -> list[list[Prediction]]:
    """Return the `top_k` classes of each image, the most probable first.

    Args:
        activation: from the output to probabilities, both float32 `[B, C]`.
        parameters: which ones there are.
        outputs: one output `[B, C]`; sides of 1 do not count.
        sizes: not used; a class belongs to the whole image.
        manifest: for the labels.
        settings: values of the parameters.
        arrays: not used.
    """
    chosen = parameters(**settings)
    (values,) = outputs.values()
    scores = activation(values.reshape(len(values), -1))
    best = np.argsort(-scores, axis=1, kind="stable")[:, : chosen.top_k]
    lowest = getattr(chosen, "threshold", -np.inf)
    return [
        [
            {
                "class_id": int(c),
                "label": manifest.labels[c],
                "score": float(row[c]),
                "box": None,
                "mask": None,
                "keypoints": None,
            }
            for c in classes
            if row[c] >= lowest
        ]
        for row, classes in zip(scores, best, strict=True)
    ]


def are_probabilities(values: np.ndarray) -> bool:
    """Whether all numbers of each image, `[B, ...]`, are from 0 to 1 and come to 1."""
    return are_shares(values) and np.allclose(values.reshape(len(values), -1).sum(axis=1), 1, atol=1e-2)


def _decoder(
    role: Role, activation: Callable[[np.ndarray], np.ndarray], parameters: type[Parameters] = Parameters
) -> Decoder:
    def check_any(shapes: Mapping[str, tuple[int, ...]], labels: int) -> None:
        # The one output may have any name, as it had in the first bundles.
        check_shapes(
            [[role]], dict(zip([role.name], shapes.values(), strict=True)) if len(shapes) == 1 else shapes, labels
        )

    return Decoder(partial(classify, activation, parameters), parameters, partial(assign_roles, [[role]]), check_any)


DECODERS = {
    "softmax": _decoder(
        Role("logits", SHAPES, lambda values: not are_probabilities(values), values="not probabilities"), softmax
    ),
    "probabilities": _decoder(Role("probabilities", SHAPES, are_shares, values="from 0 to 1"), lambda scores: scores),
    "sigmoid": _decoder(Role("logits", SHAPES), sigmoid, SeveralParameters),
    "multi_label": _decoder(
        Role("probabilities", SHAPES, are_shares, values="from 0 to 1"), lambda scores: scores, SeveralParameters
    ),
}
