"""What the post-processing of every task takes and returns. Executors import this module."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from helpers.bundle.manifest import Manifest

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
class Decoder:
    """One way to read the outputs of networks for a task.

    Attributes:
        predict: takes the outputs of a batch by role, the images' sizes, the manifest, the parameters and the bundle's
            arrays; returns a list of predictions per image, or for an embedding a list of numbers per image.
        parameters: a frozen dataclass, each with a default; raises ConfigError for an impossible value.
        assign_roles: takes outputs of real images by name, float32 `[B, ...]`, and the number of labels (0 if nobody
            has said); returns the name of each role's output. Shapes and ranges decide, not names. Raises OutputError.
        check_shapes: takes the shapes of the outputs by role, and the number of labels; raises OutputError.
        suggest_parameters: takes outputs of real images by role, float32 `[B, ...]`, and the number of labels; returns
            the parameters that these tell and that are not as by default.
    """

    predict: Callable[[Arrays, Sizes, Manifest, Mapping[str, Any], Arrays], list[Any]]
    parameters: type
    assign_roles: Callable[[Arrays, int], dict[str, str]]
    check_shapes: Callable[[Shapes, int], None]
    suggest_parameters: Callable[[Arrays, int], dict[str, Any]] = lambda samples, labels: {}
