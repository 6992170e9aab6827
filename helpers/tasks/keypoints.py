"""People, faces and other objects with points of them: corners of eyes, joints."""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from helpers.bundle.manifest import Manifest
from helpers.errors import check_parameters
from helpers.images.geometry import Placement, place
from helpers.tasks import yolo
from helpers.tasks.boxes import LARGEST_RELATIVE, Detections, clip, locate, suppress, to_predictions
from helpers.tasks.classification import sigmoid
from helpers.tasks.detection import (
    BOXES,
    SCORES,
    EndToEndParameters,
    SsdParameters,
    find_anchored,
    find_end_to_end,
    suggest_end_to_end,
    suggest_ssd,
)
from helpers.tasks.interface import Arrays, OutputError, Prediction
from helpers.tasks.roles import Role, are_shares, are_whole, make_decoder

Order = Literal["xy", "yx"]
FEWEST_NUMBERS = 3  # of an output; fewer are no points of an object


@dataclass(frozen=True)
class KeypointParameters(EndToEndParameters):
    """What boxes and points of a network mean that has chosen them itself; points are relative where boxes are.

    Attributes:
        order: of a point's coordinates.

    Raises:
        ConfigError: a value is of the wrong type or out of range.
    """

    order: Order = "xy"


@dataclass(frozen=True)
class SingleParameters:
    """Whether there is the one object that a network expects.

    Attributes:
        score_threshold: the mean score of its points is above.

    Raises:
        ConfigError: a value is of the wrong type or out of range.
    """

    score_threshold: float = 0.05

    def __post_init__(self) -> None:
        check_parameters(self)


@dataclass(frozen=True)
class PointParameters(SingleParameters):
    """What the numbers of a network mean that gives the points of one object.

    Attributes:
        order: of a point's coordinates.
        relative: they are relative to the network's input, 0 to 1, and not its pixels.
        numbers: of a point, where the output is one row of them.
        third: what a third number is, its `score` or something else, such as its depth.
        activation: from an output of scores to them.

    Raises:
        ConfigError: a value is of the wrong type or out of range.
    """

    order: Order = "yx"
    relative: bool = True
    numbers: Literal[2, 3] = 2
    third: Literal["score", "other"] = "score"
    activation: Literal["none", "sigmoid"] = "none"


@dataclass(frozen=True)
class CenterParameters:
    """How centers on a map become objects; the defaults are those of CenterFace (Xu et al., 2019).

    Attributes:
        score_threshold: a center's probability is above.
        nms_threshold: intersection over union above which a box is suppressed, within a class.
        max_detections: of an image.
        order: of sizes, offsets and landmarks.
        sizes: `log` if they are logarithms, of a unit of 4 pixels of the input; `cells` if they are cells of the map.
        center: where in its cell a center is that has no offset.
        landmarks: `box` if they are relative to the box, from its left upper corner; `center` if they are cells of the
            map, from the center's own.

    Raises:
        ConfigError: a value is of the wrong type or out of range.
    """

    score_threshold: float = 0.3
    nms_threshold: float = 0.3
    max_detections: int = 300
    order: Order = "yx"
    sizes: Literal["log", "cells"] = "log"
    center: float = 0.5
    landmarks: Literal["box", "center"] = "box"

    def __post_init__(self) -> None:
        check_parameters(self)


def _decode_end_to_end(
    outputs: Arrays, size: tuple[int, int], manifest: Manifest, parameters: KeypointParameters, arrays: Arrays
) -> list[Prediction]:
    detections = find_end_to_end(outputs, size, manifest, parameters)
    values = outputs["keypoints"][detections.rows]
    points = _ordered(values[..., :2], parameters.order)
    points = points * np.array(detections.placement.input, np.float32) if parameters.relative else points
    if "keypoint_scores" in outputs:
        scores = outputs["keypoint_scores"][detections.rows]
    else:
        scores = values[..., 2] if values.shape[-1] == 3 else np.ones(values.shape[:2], np.float32)
    keypoints = _to_image(points, scores, detections.placement)
    return to_predictions(detections, manifest.labels, keypoints=keypoints)


def _decode_yolo(
    outputs: Arrays, size: tuple[int, int], manifest: Manifest, parameters: yolo.Parameters, arrays: Arrays
) -> list[Prediction]:
    predictions = outputs["predictions"]
    rests = (side - 4 - len(manifest.labels) for side in sorted(predictions.shape))
    others = next(rest - rest % 3 for rest in rests if rest >= 3 and rest % 3 < 2)  # one more is objectness
    detections, numbers = yolo.find_objects(predictions, size, manifest, parameters, others)
    points = numbers.reshape(len(numbers), others // 3, 3)
    places = points[..., :2]
    places = places * np.array(detections.placement.input, np.float32) if parameters.relative else places
    keypoints = _to_image(places, points[..., 2], detections.placement)
    return to_predictions(detections, manifest.labels, keypoints=keypoints)


def _decode_ssd(
    outputs: Arrays, size: tuple[int, int], manifest: Manifest, parameters: SsdParameters, arrays: Arrays
) -> list[Prediction]:
    detections = find_anchored(outputs, size, manifest, parameters, arrays)
    landmarks = outputs["landmarks"] if "landmarks" in outputs else outputs["offsets"][:, 4:]
    own = landmarks[detections.rows].reshape(len(detections.rows), landmarks.shape[1] // 2, 2)
    anchors = arrays["priors.npy"][detections.rows, None]
    with np.errstate(over="ignore", invalid="ignore"):
        points = anchors[..., :2] + _ordered(own, parameters.order) * parameters.scale[:2] * anchors[..., 2:]
        points = points * np.array(detections.placement.input, np.float32)
    scores = np.broadcast_to(detections.scores[:, None], points.shape[:2])
    return to_predictions(detections, manifest.labels, keypoints=_to_image(points, scores, detections.placement))


def _decode_points(
    outputs: Arrays, size: tuple[int, int], manifest: Manifest, parameters: PointParameters, arrays: Arrays
) -> list[Prediction]:
    values = _rows(outputs["points"], parameters.numbers)
    placement = place(manifest.input, size)
    points = _ordered(values[:, :2], parameters.order)
    points = points * np.array(placement.input, np.float32) if parameters.relative else points
    scores = np.ones(len(points), np.float32)
    if "scores" in outputs:  # of each point, or of all
        given = outputs["scores"].reshape(-1)
        scores = scores * (sigmoid(given) if parameters.activation == "sigmoid" else given)
    elif values.shape[1] == 3 and parameters.third == "score":
        scores = values[:, 2]
    return _tell_single(points, scores, placement, manifest, parameters)


def _rows(points: np.ndarray, numbers: int) -> np.ndarray:
    """Points `[..., K, 2 or 3]`, or all in one row, as `[K, 2 or 3]`."""
    return points.reshape(-1, points.shape[-1] if points.shape[-1] in (2, 3) else numbers)


def _suggest_points(samples: Arrays, labels: int) -> dict[str, Any]:
    points, parameters = samples["points"], dict[str, Any]()
    if points.shape[-1] not in (2, 3):
        row = points.reshape(len(points), -1)
        # Points that follow each other are near each other.
        steps = {n: np.abs(row[:, n:] - row[:, :-n]).mean() for n in (2, 3) if row.shape[1] % n == 0}
        parameters["numbers"] = min(steps, key=lambda n: steps[n])
    values = np.stack([_rows(one, parameters.get("numbers", 2)) for one in points])
    has_scores = values.shape[-1] == 3 and are_shares(values[..., 2])
    if values.shape[-1] == 3 and not has_scores:
        parameters["third"] = "other"
    if values[..., :2].max() > LARGEST_RELATIVE:
        parameters["relative"] = False
    if not has_scores or "relative" in parameters:  # scores behind relative y, x are MoveNet's
        parameters["order"] = "xy"
    if "scores" in samples and not are_shares(samples["scores"]):
        parameters["activation"] = "sigmoid"
    return parameters


def _decode_heatmap(
    outputs: Arrays, size: tuple[int, int], manifest: Manifest, parameters: SingleParameters, arrays: Arrays
) -> list[Prediction]:
    maps, placement = outputs["heatmap"], place(manifest.input, size)
    count, rows, columns = maps.shape
    flat = maps.reshape(count, -1)
    best = flat.argmax(axis=1)
    y, x = np.divmod(best, columns)
    padded = np.pad(maps, ((0, 0), (1, 1), (1, 1)), mode="edge")
    each = np.arange(count)
    # A quarter of a cell towards the larger neighbor, as Newell et al., Stacked Hourglass Networks, section 3.3.
    across = np.sign(padded[each, y + 1, x + 2] - padded[each, y + 1, x])
    down = np.sign(padded[each, y + 2, x + 1] - padded[each, y, x + 1])
    cells = np.stack([x + 0.5 + across / 4, y + 0.5 + down / 4], axis=1)
    points = (cells * np.divide(placement.input, (columns, rows))).astype(np.float32)
    return _tell_single(points, flat[each, best], placement, manifest, parameters)


def _decode_simcc(
    outputs: Arrays, size: tuple[int, int], manifest: Manifest, parameters: SingleParameters, arrays: Arrays
) -> list[Prediction]:
    placement = place(manifest.input, size)
    places = []
    for role, side in zip(("simcc_x", "simcc_y"), placement.input, strict=True):
        bins = outputs[role].shape[1]
        if bins % side:
            raise OutputError(f"{role} has {bins} bins, and the input {side} pixels: mend the outputs or that")
        places.append(outputs[role].argmax(axis=1) * side / bins)
    scores = np.minimum(outputs["simcc_x"].max(axis=1), outputs["simcc_y"].max(axis=1))
    return _tell_single(np.stack(places, axis=1).astype(np.float32), scores, placement, manifest, parameters)


def _decode_centernet(
    outputs: Arrays, size: tuple[int, int], manifest: Manifest, parameters: CenterParameters, arrays: Arrays
) -> list[Prediction]:
    heatmap, placement = outputs["heatmap"], place(manifest.input, size)
    stride = np.divide(placement.input, heatmap.shape[:0:-1]).astype(np.float32)
    classes, rows, columns = np.nonzero(heatmap > parameters.score_threshold)
    scores, cells = heatmap[classes, rows, columns], np.stack([columns, rows], axis=1).astype(np.float32)
    roles = [role for role in outputs if role != "heatmap"]
    values = {role: _ordered_rows(outputs[role], rows, columns, parameters.order) for role in roles}
    with np.errstate(over="ignore", invalid="ignore"):
        centers = (cells + values["offsets"] + np.float32(parameters.center)) * stride
        sizes = np.exp(values["sizes"]) * 4 if parameters.sizes == "log" else values["sizes"] * stride
        boxes = np.concatenate([centers - sizes / 2, centers + sizes / 2], axis=1)
    usable = np.isfinite(boxes).all(axis=1)
    kept = np.flatnonzero(usable)[suppress(boxes[usable], scores[usable], parameters.nms_threshold, classes[usable])]
    detections = locate(boxes[kept], classes[kept], scores[kept], manifest, size, parameters.max_detections)
    kept = kept[detections.rows]
    keypoints = None
    if "landmarks" in outputs:
        landmarks = values["landmarks"][kept].reshape(len(kept), len(outputs["landmarks"]) // 2, 2)
        if parameters.landmarks == "box":
            points = boxes[kept, None, :2] + landmarks * sizes[kept, None]
        else:
            points = (cells[kept, None] + landmarks) * stride
        keypoints = _to_image(points, np.broadcast_to(scores[kept, None], points.shape[:2]), placement)
    return to_predictions(detections, manifest.labels, keypoints=keypoints)


def _ordered(points: np.ndarray, order: Order) -> np.ndarray:
    """Points `[..., 2]` as x, y."""
    return points[..., ::-1] if order == "yx" else points


def _ordered_rows(values: np.ndarray, rows: np.ndarray, columns: np.ndarray, order: Order) -> np.ndarray:
    """The numbers of some cells of maps `[2 * n, h, w]`, as pairs x, y: `[cells, 2 * n]`."""
    numbers = values[:, rows, columns].T
    return _ordered(numbers.reshape(len(numbers), len(values) // 2, 2), order).reshape(numbers.shape)


def _to_image(points: np.ndarray, scores: np.ndarray, placement: Placement) -> np.ndarray:
    """Points `[n, K, 2]` in the input's pixels and their scores `[n, K]`, as `[n, K, 3]` in the image's."""
    located = clip(placement.to_image(np.ascontiguousarray(points)), placement.image)
    return np.concatenate([located, scores[..., None]], axis=-1)


def _tell_single(
    points: np.ndarray, scores: np.ndarray, placement: Placement, manifest: Manifest, parameters: SingleParameters
) -> list[Prediction]:
    """The one object, whose box is the bounds of its points `[K, 2]`, in the input's pixels."""
    keypoints = _to_image(points[None], scores[None], placement)
    score = scores.mean()
    if not (score > parameters.score_threshold and np.isfinite(keypoints).all()):
        return []
    places = keypoints[0, :, :2]
    box = np.concatenate([places.min(axis=0), places.max(axis=0)])[None]
    first = np.zeros(1, int)
    return to_predictions(Detections(box, first, score[None], first, placement), manifest.labels, keypoints=keypoints)


def _are_points(values: np.ndarray) -> bool:
    """Several points, and not one number or two."""
    return values[0].size > FEWEST_NUMBERS


KEYPOINTS = [
    *(role for role in BOXES if role.name != "classes"),
    Role("classes", ("N",), are_whole, optional=True, values="whole numbers"),
    Role("keypoints", ("N K 2", "N K 3")),
    Role("keypoint_scores", ("N K",), optional=True),
]
POINTS = [
    Role("points", ("K 3", "1 K 3", "K 2", "1 K 2", "2K", "3K", "1 1 2K", "1 1 3K"), _are_points),
    Role("scores", ("K", "K 1", "1", "1 1 1"), optional=True),
]
YOLO = [Role("predictions", ("4+C+3K A", "A 4+C+3K", "A 5+C+3K"))]
CENTERNET = [
    Role("heatmap", ("C H W",), are_shares, values="from 0 to 1"),
    Role("sizes", ("2 H W",)),
    Role("offsets", ("2 H W",), lambda values: bool(abs(values).max(initial=0) <= 1), values="from -1 to 1"),
    Role("landmarks", ("2K H W",), optional=True),
]

DECODERS = {
    "end_to_end": make_decoder(_decode_end_to_end, KeypointParameters, KEYPOINTS, suggest=suggest_end_to_end),
    "points": make_decoder(_decode_points, PointParameters, POINTS, suggest=_suggest_points),
    "ssd": make_decoder(
        _decode_ssd,
        SsdParameters,
        [Role("offsets", ("A 4",)), SCORES, Role("landmarks", ("A 2K",))],
        [Role("offsets", ("A 4+2K",)), SCORES],
        suggest=suggest_ssd,
    ),
    "simcc": make_decoder(_decode_simcc, SingleParameters, [Role("simcc_x", ("K X",)), Role("simcc_y", ("K Y",))]),
    "yolo": make_decoder(_decode_yolo, yolo.Parameters, YOLO, suggest=yolo.suggest_parameters),
    "centernet": make_decoder(_decode_centernet, CenterParameters, CENTERNET),
    "heatmap": make_decoder(_decode_heatmap, SingleParameters, [Role("heatmap", ("K H W",))]),
}
