"""The most probable classes of an image, or all that are probable enough where it may have several."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from helpers.bundle.manifest import Manifest
from helpers.tasks.interface import Arrays, DecoderParameters, Prediction, Shapes, Sizes, make_prediction
from helpers.tasks.roles import Decoder, Role, are_shares

SHAPES = ("C", "C 1 1", "1 1 C")


@dataclass(frozen=True)
class Parameters(DecoderParameters):
    """How many classes an image has."""

    top_k: int = 3  # at most so many


@dataclass(frozen=True)
class SeveralParameters(Parameters):
    """How many classes an image has, and how probable each is."""

    threshold: float = 0.5  # of the probability, which is at least so much


def softmax(logits: np.ndarray, axis: int = 1) -> np.ndarray:
    """Probabilities of classes of which one is true, along an axis."""
    scores = np.exp(logits - logits.max(axis=axis, keepdims=True))
    scores /= scores.sum(axis=axis, keepdims=True)
    return scores


def sigmoid(logits: np.ndarray) -> np.ndarray:
    """Probabilities of classes of which any number is true."""
    with np.errstate(over="ignore"):  # far below 0 the exponential is infinite, and the probability 0
        return 1 / (1 + np.exp(-logits))


def are_probabilities(values: np.ndarray) -> bool:
    """Whether all numbers of each image, `[B, ...]`, are from 0 to 1 and come to 1."""
    return are_shares(values) and np.allclose(values.reshape(len(values), -1).sum(axis=1), 1, atol=1e-2)


class _Classifier(Decoder):
    """Its one output may have any name, as it had in the first bundles, and sides of 1 that do not count."""

    def check_shapes(self, shapes: Shapes, labels: int) -> None:
        if len(shapes) == 1:
            shapes = dict(zip([self.alternatives[0][0].name], shapes.values(), strict=True))
        super().check_shapes(shapes, labels)


def _decoder(
    role: Role, activate: Callable[[np.ndarray], np.ndarray], parameters: type[Parameters] = Parameters
) -> Decoder:
    """The decoder of an output that becomes probabilities, both float32 `[B, C]`; the best `top_k` come first."""

    def classify(
        outputs: Arrays, sizes: Sizes, manifest: Manifest, settings: Mapping[str, Any], arrays: Arrays
    ) -> list[list[Prediction]]:
        chosen = parameters(**settings)
        (values,) = outputs.values()
        scores = activate(values.reshape(len(values), -1))
        best = np.argsort(-scores, axis=1, kind="stable")[:, : chosen.top_k]
        lowest = getattr(chosen, "threshold", -np.inf)
        return [
            [make_prediction(manifest.labels, c, float(row[c])) for c in classes if row[c] >= lowest]
            for row, classes in zip(scores, best.tolist(), strict=True)
        ]

    return _Classifier(classify, parameters, [[role]])


LOGITS = Role("logits", SHAPES, lambda values: not are_probabilities(values), values="not probabilities")
PROBABILITIES = Role("probabilities", SHAPES, are_shares, values="from 0 to 1")

DECODERS = {
    "softmax": _decoder(LOGITS, softmax),
    "probabilities": _decoder(PROBABILITIES, lambda scores: scores),
    "sigmoid": _decoder(Role("logits", SHAPES), sigmoid, SeveralParameters),
    "multi_label": _decoder(PROBABILITIES, lambda scores: scores, SeveralParameters),
}
