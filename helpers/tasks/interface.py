"""What the post-processing of every task takes and returns. Executors import this module."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from helpers.bundle.manifest import Manifest

Prediction = dict[str, Any]  # as the results' schema has it
Sizes = Sequence[tuple[int, int]]  # width, height of each original image, in pixels
Arrays = Mapping[str, np.ndarray]
Shapes = Mapping[str, tuple[int, ...]]  # of one image's outputs, by name

NO_ARRAYS: Arrays = {}


@dataclass(frozen=True)
class Task:
    """One task's post-processing.

    `predict` takes the outputs of a batch, the images' sizes, the manifest, the parameters and the bundle's arrays, and
    returns a list of predictions per image. `check_parameters` raises ConfigError for an impossible value and TypeError
    for an unknown or a missing one. `expected_shapes` says which outputs the task needs, given those there are.
    """

    predict: Callable[[Arrays, Sizes, Manifest, Mapping[str, Any], Arrays], list[list[Prediction]]]
    check_parameters: Callable[..., Any]
    expected_shapes: Callable[[Shapes, int], Shapes]
