"""Images that are larger than a network's input, in overlapping tiles, and the tiles' predictions merged.

A window is left, top, right, bottom, in whole pixels of the image. Executors import this module.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
from pycocotools import mask as coco

from helpers.images import rle
from helpers.images.enlargement import Window
from helpers.tasks.boxes import SIDES
from helpers.tasks.interface import Prediction

Tiles = Sequence[tuple[Window, list[Prediction]]]

EDGE = 2  # pixels from a tile's edge, at which a box may be cut


def tiles(size: tuple[int, int], tile: tuple[int, int], overlap: float) -> list[Window]:
    """Windows of one size that cover an image evenly, row by row; smaller ones where the image is smaller.

    Sizes are width and height, in pixels; `overlap` is the share of a window's side that neighbors have in common, at
    least, and below 1.
    """
    columns, rows = (_spans(side, length, overlap) for side, length in zip(size, tile, strict=True))
    return [(left, top, right, bottom) for top, bottom in rows for left, right in columns]


def shift(predictions: Sequence[Prediction], window: Window, size: tuple[int, int]) -> list[Prediction]:
    """The predictions of a window, in the window's pixels, as those of the whole image of a width and height."""
    left, top, *_ = window
    return [
        {
            **prediction,
            "box": prediction["box"] and _move(prediction["box"], left, top),
            "mask": prediction["mask"] and rle.encode_part(rle.decode(prediction["mask"]), (left, top), *size),
            "keypoints": prediction["keypoints"] and [_move(point, left, top) for point in prediction["keypoints"]],
        }
        for prediction in predictions
    ]


def merge(task: str, predictions: Sequence[tuple[Window, Any]], size: tuple[int, int], threshold: float) -> Any:
    """The predictions of an image from those of its tiles.

    A classification has the mean score of each class over the tiles, an embedding the mean of its numbers. Of a
    semantic segmentation each tile tells the pixels that are nearest to it, so that a pixel has one class. Of all
    else, what is a duplicate is left out by non-maximum suppression within each class over the whole image, and what
    an edge has cut is joined: two boxes are of one object above a threshold of intersection over union, within what
    both tiles show.

    There are for each tile its window and what `predict` returns for it, in its own pixels; the size of the image is
    its width and height, in pixels.
    """
    if task == "embedding":
        return np.mean([vector for _, vector in predictions], axis=0)
    if task == "classification":
        return _mean(predictions)
    if task == "semantic_segmentation":
        return _join_maps(predictions, size)
    shifted = [(window, one) for window, own in predictions for one in shift(own, window, size)]
    groups: dict[int, list[tuple[Prediction, Window, bool]]] = defaultdict(list)
    for window, one in shifted:
        groups[one["class_id"]].append((one, window, _is_cut(one["box"], window, size)))
    merged = [one for group in groups.values() for one in _suppress(group, threshold)]
    return sorted(merged, key=lambda one: -one["score"])


def _spans(side: int, length: int, overlap: float) -> list[tuple[int, int]]:
    if side <= length:
        return [(0, side)]
    count = math.ceil((side - overlap * length) / (length * (1 - overlap)))
    starts = np.rint(np.linspace(0, side - length, max(2, count))).astype(int).tolist()
    return [(start, start + length) for start in starts]


def _move(place: dict[str, float], left: int, top: int) -> dict[str, float]:
    """Coordinates x, x1, x2 and y, y1, y2 moved, other entries as they are."""
    steps = {"x": left, "y": top}
    return {name: value + steps.get(name[0], 0) for name, value in place.items()}


def _mean(predictions: Tiles) -> list[Prediction]:
    """Classes of all tiles with the mean of their scores; one that a tile does not tell has a score of 0 there."""
    classes: dict[int, Prediction] = {}
    for _, own in predictions:
        for one in own:
            score = classes.get(one["class_id"], {"score": 0.0})["score"] + one["score"] / len(predictions)
            classes[one["class_id"]] = {**one, "score": score}
    most = max((len(own) for _, own in predictions), default=0)
    return sorted(classes.values(), key=lambda one: -one["score"])[:most]


def _join_maps(predictions: Tiles, size: tuple[int, int]) -> list[Prediction]:
    columns, rows = (_cores({(one[i], one[i + 2]) for one, _ in predictions}, size[i]) for i in (0, 1))
    groups: dict[int, list[tuple[Prediction, rle.Mask]]] = defaultdict(list)
    for window, own in predictions:
        (left, right), (top, bottom) = columns[window[0], window[2]], rows[window[1], window[3]]
        for one in own:
            part = rle.decode(one["mask"])[top - window[1] : bottom - window[1], left - window[0] : right - window[0]]
            groups[one["class_id"]].append((one, rle.encode_part(part, (left, top), *size)))
    merged = []
    for parts in groups.values():
        areas = [int(coco.area(mask)) for _, mask in parts]
        if not any(areas):
            continue
        mask = rle.join([mask for _, mask in parts])
        score = np.average([one["score"] for one, _ in parts], weights=areas)
        x, y, width, height = coco.toBbox(mask).tolist()
        box = dict(zip(SIDES, (x, y, x + width, y + height), strict=True))
        merged.append((sum(areas), {**parts[0][0], "score": float(score), "box": box, "mask": mask}))
    return [one for _, one in sorted(merged, key=lambda pair: -pair[0])]


def _cores(spans: set[tuple[int, int]], side: int) -> dict[tuple[int, int], tuple[int, int]]:
    """The part of each span that is nearest to it: neighbors share what they both cover."""
    ordered = sorted(spans)
    bounds = [0, *((one[1] + other[0]) // 2 for one, other in zip(ordered, ordered[1:], strict=False)), side]
    return dict(zip(ordered, zip(bounds, bounds[1:], strict=False), strict=True))


def _is_cut(box: dict[str, float], window: Window, size: tuple[int, int]) -> bool:
    """Whether a box ends at an edge of its tile that is not the image's."""
    left, top, right, bottom = window
    low = (left > 0 and box["x1"] <= left + EDGE) or (top > 0 and box["y1"] <= top + EDGE)
    return low or (right < size[0] and box["x2"] >= right - EDGE) or (bottom < size[1] and box["y2"] >= bottom - EDGE)


def _suppress(group: list[tuple[Prediction, Window, bool]], threshold: float) -> list[Prediction]:
    """The objects of one class: whole ones first, then what edges have cut, each the best first."""
    group = sorted(group, key=lambda entry: (entry[2], -entry[0]["score"]))
    boxes = np.array([[one["box"][side] for side in SIDES] for one, *_ in group])
    windows = np.array([window for _, window, _ in group])
    left, merged = np.arange(len(group)), []
    while len(left):
        members, left = [left[0]], left[1:]
        is_cut = group[members[0]][2]
        for member in members:  # an object may be cut several times, so that its pieces are a chain
            same = _overlaps(boxes[member], windows[member], boxes[left], windows[left]) > threshold
            members += left[same].tolist()
            left = left[~same]
            if not is_cut:
                break
        merged.append(_join([group[member][0] for member in members], is_cut))
    return merged


def _overlaps(box: np.ndarray, window: np.ndarray, boxes: np.ndarray, windows: np.ndarray) -> np.ndarray:
    """Intersection over union with others, within what both tiles show."""
    low, high = np.maximum(window[:2], windows[:, :2]), np.minimum(window[2:], windows[:, 2:])
    low_one, high_one = np.maximum(box[:2], low), np.minimum(box[2:], high)
    low_other, high_other = np.maximum(boxes[:, :2], low), np.minimum(boxes[:, 2:], high)
    both = _areas(np.maximum(low_one, low_other), np.minimum(high_one, high_other))
    either = _areas(low_one, high_one) + _areas(low_other, high_other) - both
    return np.divide(both, either, out=np.zeros(len(boxes)), where=either > 0)


def _areas(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    return np.maximum(high - low, 0).prod(axis=1)


def _join(duplicates: list[Prediction], is_cut: bool) -> Prediction:
    """The first of several predictions of one object, which has the best score of all and, if cut, all their parts."""
    best = {**duplicates[0], "score": max(one["score"] for one in duplicates)}
    if is_cut and len(duplicates) > 1:
        ends = {side: [one["box"][side] for one in duplicates] for side in SIDES}
        best["box"] = {side: min(values) if side in SIDES[:2] else max(values) for side, values in ends.items()}
        best["mask"] = best["mask"] and rle.join([one["mask"] for one in duplicates])
    return best
