"""Which predictions a run keeps, whatever the task and the network. Executors import this module."""

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from pycocotools import mask as coco

from helpers.errors import ConfigError, check_parameters
from helpers.tasks.boxes import SIDES
from helpers.tasks.interface import Prediction


@dataclass(frozen=True)
class Filters:
    """What each prediction must be; the defaults ask for nothing, and an impossible value raises ConfigError."""

    classes: tuple[str | int, ...] = ()  # labels, or their numbers from 0; empty for all
    min_score: float = 0.0  # the score is at least so much
    min_area: float = 0.0  # in square pixels of the image, of the mask or else of the box
    # Left, top, right and bottom, in pixels of the image, or in shares of its sides if all are up to 1; the box's
    # center lies within.
    region: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.classes, str | int):  # one, as --set postprocess.classes=cat gives it
            object.__setattr__(self, "classes", (self.classes,))
        check_parameters(self, {"min_area": 0})
        left, top, right, bottom = self.region if len(self.region) == 4 else (0, 0, 0, 0)
        if self.region and not (0 <= left < right and 0 <= top < bottom):
            raise ConfigError("postprocess.region is not left, top, right, bottom, of 0 or more and in this order")

    def numbers(self, labels: Sequence[str]) -> set[int]:
        """The classes as numbers; raises ConfigError if there is no such label or number."""
        return {_number(item, labels) for item in self.classes}

    def apply(self, predictions: list[Prediction], size: tuple[int, int], labels: Sequence[str]) -> list[Prediction]:
        """The predictions of one image, of a width and height, that are as they must be."""
        tests: list[Callable[[Prediction], bool]] = []
        if self.classes:
            numbers = self.numbers(labels)
            tests.append(lambda p: p["class_id"] in numbers)
        if self.min_score:
            least = float(np.float32(self.min_score))  # as scores are
            tests.append(lambda p: p["score"] >= least)
        if self.min_area:
            tests.append(lambda p: _area(p) >= self.min_area)
        if self.region:
            scale = size if max(self.region) <= 1 else (1, 1)
            left, top, right, bottom = (side * scale[i % 2] for i, side in enumerate(self.region))
            tests.append(lambda p: left <= _center(p, "x") <= right and top <= _center(p, "y") <= bottom)
        return [p for p in predictions if all(test(p) for test in tests)] if tests else predictions


def _number(item: str | int, labels: Sequence[str]) -> int:
    if item in labels:
        return list(labels).index(str(item))
    if isinstance(item, int):
        if 0 <= item < len(labels):
            return item
        raise ConfigError(f"postprocess.classes: there is no class {item}; the last one is {len(labels) - 1}")
    nearest = difflib.get_close_matches(item.lower(), [label.lower() for label in labels], 1, 0)
    label = next((label for label in labels if [label.lower()] == nearest), "")
    raise ConfigError(f"postprocess.classes: the model has no label {item!r}; the nearest is {label!r}")


def _area(prediction: Prediction) -> float:
    if prediction["mask"]:
        return float(coco.area(prediction["mask"]))
    x1, y1, x2, y2 = (prediction["box"][side] for side in SIDES)
    return (x2 - x1) * (y2 - y1)


def _center(prediction: Prediction, axis: str) -> float:
    return (prediction["box"][f"{axis}1"] + prediction["box"][f"{axis}2"]) / 2
