"""What the post-processing of every task takes and returns. Executors import this module."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from helpers.errors import BundleError, check_parameters
from helpers.images.geometry import Placement

Prediction = dict[str, Any]  # as the results' schema has it
Sizes = Sequence[tuple[int, int]]  # width, height of each original image, in pixels
Arrays = Mapping[str, np.ndarray]
Shapes = Mapping[str, tuple[int, ...]]  # of one image's outputs, by role; -1 for an open side

NO_ARRAYS: Arrays = {}


class OutputError(ValueError):
    """A network's outputs are not those of a decoder; the message says what they should be."""


class AmbiguityError(OutputError):
    """Several outputs fit a role equally well; `names` are theirs."""

    def __init__(self, message: str, names: Sequence[str]):
        super().__init__(message)
        self.names = names


@dataclass(frozen=True)
class DecoderParameters:
    """What can be set of a decoder; a value of the wrong type or out of range raises ConfigError."""

    def __post_init__(self) -> None:
        check_parameters(self)


@dataclass(frozen=True)
class Outputs:
    """A network's outputs for one image, and what it takes to read them."""

    values: Arrays  # float32 by role, without the batch's dimension
    placement: Placement  # of the image in the network's input
    labels: Sequence[str]  # of the classes
    arrays: Arrays  # that the bundle has beside its graph, by file name
    name: str  # of the model, for errors

    def priors(self, role: str) -> np.ndarray:
        """The anchors that the bundle has in `priors.npy`, one per row of an output; raises BundleError otherwise."""
        if "priors.npy" not in self.arrays:
            raise BundleError(f"{self.name} has no priors.npy, the anchors of its boxes; export the bundle again")
        priors = self.arrays["priors.npy"]
        if priors.shape != self.values[role][:, :4].shape:
            raise BundleError(f"{self.name}: priors.npy is {priors.shape}, and not as its {role}; export it again")
        return priors


def make_prediction(
    labels: Sequence[str], class_id: int, score: float, box: Any = None, mask: Any = None, keypoints: Any = None
) -> Prediction:
    """A prediction as the results' schema has it."""
    label = labels[class_id]
    return {"class_id": class_id, "label": label, "score": score, "box": box, "mask": mask, "keypoints": keypoints}
