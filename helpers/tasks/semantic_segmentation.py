"""The class of each pixel: one prediction per class that an image has, with a mask at the image's size."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from helpers.errors import check_parameters
from helpers.images import rle
from helpers.images.enlargement import Window, enlarge, nearest, visible_window
from helpers.images.geometry import Placement
from helpers.tasks.boxes import SIDES, check_classes
from helpers.tasks.classification import sigmoid
from helpers.tasks.interface import Arrays, DecoderParameters, Outputs, Prediction, make_prediction
from helpers.tasks.roles import Role, are_shares, are_whole, make_decoder

STRIP_VALUES = 2**20  # of all classes, that are enlarged at a time; as many as a processor has at hand
IGNORED = 255  # what class maps have where there is no class


@dataclass(frozen=True)
class MapParameters(DecoderParameters):
    """Which classes are told."""

    # The class, among the network's, that is not told; -1 for none. If the network has a class more than there are
    # labels, that is its background, and the first class unless this says which.
    background: int = -1
    min_pixels: int = 1  # a class with fewer is not told; 1 or more

    def __post_init__(self) -> None:
        check_parameters(self, {"background": -1})


@dataclass(frozen=True)
class ScoreParameters(MapParameters):
    """Which classes are told, and how scores become probabilities."""

    # `softmax`; `sigmoid`, where a pixel is of no class unless one is more probable than not, which a single class
    # means always; `none` where scores are probabilities; or `independent` where they are those that `sigmoid` gives.
    activation: Literal["softmax", "sigmoid", "none", "independent"] = "softmax"


def _decode_scores(outputs: Outputs, parameters: ScoreParameters) -> list[Prediction]:
    labels, placement, scores = len(outputs.labels), outputs.placement, outputs.values["scores"]
    if scores.shape[0] not in (labels, labels + 1):
        scores = np.moveaxis(scores, -1, 0)
    count = len(scores)
    classes, sums = _no_classes(placement, count), np.zeros(count + 1)
    for strip in _strips(visible_window(placement), count):
        left, top, right, bottom = strip
        winners, probabilities = _winners(enlarge(scores, placement, strip), parameters.activation)
        classes[top:bottom, left:right] = winners
        sums += np.bincount(winners.ravel(), probabilities.ravel(), count + 1)
    background = max(parameters.background, 0) if count > labels else parameters.background
    return _tell(classes, sums, background, outputs.labels, parameters.min_pixels)


def _suggest_scores(samples: Arrays, labels: int) -> dict[str, Any]:
    scores = samples["scores"]
    if not are_shares(scores):
        return {}
    axis = 1 if scores.shape[1] in (labels, labels + 1) else 3
    come_to_one = scores.shape[axis] == 1 or np.allclose(scores.sum(axis=axis), 1, atol=1e-2)
    return {"activation": "none" if come_to_one else "independent"}


def _decode_map(outputs: Outputs, parameters: MapParameters) -> list[Prediction]:
    grid, placement = outputs.values["classes"], outputs.placement
    if grid.ndim == 3:
        grid = grid[0] if grid.shape[0] == 1 else grid[..., 0]
    count = len(outputs.labels) + (parameters.background >= 0)
    check_classes(grid[(grid >= count) & (grid != IGNORED) | (grid < 0)], outputs.labels, "background")
    left, top, right, bottom = window = visible_window(placement)
    classes = _no_classes(placement, count)
    classes[top:bottom, left:right] = np.minimum(nearest(grid, placement, window), count)
    sums = np.bincount(classes.ravel(), minlength=count + 1).astype(float)
    return _tell(classes, sums, parameters.background, outputs.labels, parameters.min_pixels)


def _no_classes(placement: Placement, count: int) -> np.ndarray:
    """The image's pixels, all of no class, which is number `count`: of the smallest type, `[height, width]`."""
    return np.full(placement.image[::-1], count, np.uint8 if count < 2**8 else np.uint16)


def _strips(window: Window, classes: int) -> Iterator[Window]:
    """The rows of a window, so many at a time that memory stays bounded."""
    left, top, right, bottom = window
    step = max(1, STRIP_VALUES // (classes * max(1, right - left)))
    for start in range(top, bottom, step):
        yield left, start, right, min(bottom, start + step)


def _winners(scores: np.ndarray, activation: str) -> tuple[np.ndarray, np.ndarray]:
    """The best class of each pixel `[rows, columns]`, or the number of classes where none is, and its probability.

    The scores `[classes, rows, columns]` are used up.
    """
    count, best = len(scores), scores[0].copy()
    winners = np.zeros(best.shape, np.uint16)
    for number in range(1, count):  # numpy's argmax takes several times as long along this axis
        np.copyto(winners, number, where=scores[number] > best)
        np.maximum(best, scores[number], out=best)
    if activation == "softmax" and count > 1:
        scores -= best
        return winners, 1 / np.exp(scores, out=scores).sum(axis=0)
    probabilities = sigmoid(best) if activation in ("softmax", "sigmoid") else best
    if activation in ("sigmoid", "independent") or count == 1:
        winners[probabilities <= 0.5] = count
    return winners, probabilities


def _tell(
    classes: np.ndarray, sums: np.ndarray, background: int, labels: Sequence[str], min_pixels: int
) -> list[Prediction]:
    """One prediction per class, the one with most pixels first.

    Args:
        classes: int `[height, width]`, of the image; the number of the network's classes where there is none.
        sums: float, of the probabilities of each class's pixels, and of those that are of none.
        background: the class that is not told, or -1.
        labels: of the classes, without a background that the network has beyond them.
        min_pixels: a class with fewer is not told; 1 or more.
    """
    count = len(sums) - 1
    pixels = np.bincount(classes.ravel(), minlength=count + 1)[:count]
    predictions = []
    for number in np.argsort(-pixels, kind="stable").tolist():
        if number == background or pixels[number] < min_pixels:
            continue
        class_id = number - (0 <= background < number and count > len(labels))
        score = float(sums[number] / pixels[number])
        predictions.append(make_prediction(labels, class_id, score, *_outline(classes == number)))
    return predictions


def _outline(inside: np.ndarray) -> tuple[dict[str, float], rle.Mask]:
    """The bounds of a mask `[height, width]`, and the mask encoded."""
    rows, columns = np.flatnonzero(inside.any(axis=1)), np.flatnonzero(inside.any(axis=0))
    left, top, right, bottom = (int(side) for side in (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1))
    mask = rle.encode_part(inside[top:bottom, left:right], (left, top), inside.shape[1], inside.shape[0])
    return dict(zip(SIDES, map(float, (left, top, right, bottom)), strict=True)), mask


MAPS = ("C H W", "1+C H W", "H W C", "H W 1+C")
SCORES = [Role("scores", MAPS, lambda values: not are_whole(values), values="not only whole numbers")]
CLASSES = [Role("classes", ("H W", "1 H W", "H W 1"), are_whole, values="whole numbers")]

DECODERS = {
    "logits": make_decoder(_decode_scores, ScoreParameters, SCORES, suggest=_suggest_scores),
    "class_map": make_decoder(_decode_map, MapParameters, CLASSES),
}
