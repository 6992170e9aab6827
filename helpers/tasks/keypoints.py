"""People, faces and other objects with points of them: corners of eyes, joints."""

from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from helpers.tasks import centernet, detection, yolo
from helpers.tasks.boxes import LARGEST_RELATIVE, Detections, Order, in_order, to_keypoints
from helpers.tasks.classification import sigmoid
from helpers.tasks.interface import Arrays, DecoderParameters, OutputError, Outputs, Prediction
from helpers.tasks.roles import Role, are_shares, are_whole, make_decoder

FEWEST_NUMBERS = 3  # of an output; fewer are no points of an object


@dataclass(frozen=True)
class KeypointParameters(detection.EndToEndParameters):
    """What boxes and points of a network mean that has chosen them itself; points are relative where boxes are."""

    order: Order = "xy"  # of a point's coordinates


@dataclass(frozen=True)
class SingleParameters(DecoderParameters):
    """Whether there is the one object that a network expects."""

    score_threshold: float = 0.05  # the mean score of its points is above


@dataclass(frozen=True)
class PointParameters(SingleParameters):
    """What the numbers of a network mean that gives the points of one object."""

    order: Order = "yx"  # of a point's coordinates
    relative: bool = True  # they are relative to the network's input, 0 to 1, and not its pixels
    numbers: Literal[2, 3] = 2  # of a point, where the output is one row of them
    # What a third number is, its `score` or something else, such as its depth.
    third: Literal["score", "other"] = "score"
    activation: Literal["none", "sigmoid"] = "none"  # from an output of scores to them


def _find_end_to_end(outputs: Outputs, parameters: KeypointParameters) -> Detections:
    detections = detection.find_end_to_end(outputs, parameters)
    values = outputs.values["keypoints"][detections.rows]
    points = in_order(values[..., :2], parameters.order)
    if "keypoint_scores" in outputs.values:
        scores = outputs.values["keypoint_scores"][detections.rows]
    else:
        scores = values[..., 2] if values.shape[-1] == 3 else np.ones(values.shape[:2], np.float32)
    return _with_points(outputs, detections, points, scores, parameters.relative)


def _find_yolo(outputs: Outputs, parameters: yolo.Parameters) -> Detections:
    rests = (side - 4 - len(outputs.labels) for side in sorted(outputs.values["predictions"].shape))
    others = next(rest - rest % 3 for rest in rests if rest >= 3 and rest % 3 < 2)  # one more is objectness
    detections, numbers = yolo.find_with_others(outputs, parameters, others)
    points = numbers.reshape(len(numbers), others // 3, 3)
    return _with_points(outputs, detections, points[..., :2], points[..., 2], parameters.relative)


def _find_anchored(outputs: Outputs, parameters: detection.SsdParameters) -> Detections:
    detections, values = detection.find_anchored(outputs, parameters), outputs.values
    landmarks = values["landmarks"] if "landmarks" in values else values["offsets"][:, 4:]
    own = landmarks[detections.rows].reshape(len(detections.rows), landmarks.shape[1] // 2, 2)
    anchors = outputs.arrays["priors.npy"][detections.rows, None]
    with np.errstate(over="ignore", invalid="ignore"):
        points = anchors[..., :2] + in_order(own, parameters.order) * parameters.scale[:2] * anchors[..., 2:]
        return _with_points(outputs, detections, points, detections.scores, relative=True)


def _decode_points(outputs: Outputs, parameters: PointParameters) -> list[Prediction]:
    values = _rows(outputs.values["points"], parameters.numbers)
    points = in_order(values[:, :2], parameters.order)
    points = points * np.array(outputs.placement.input, np.float32) if parameters.relative else points
    scores = np.ones(len(points), np.float32)
    if "scores" in outputs.values:  # of each point, or of all
        given = outputs.values["scores"].reshape(-1)
        scores = scores * (sigmoid(given) if parameters.activation == "sigmoid" else given)
    elif values.shape[1] == 3 and parameters.third == "score":
        scores = values[:, 2]
    return _tell_single(outputs, points, scores, parameters)


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


def _decode_heatmap(outputs: Outputs, parameters: SingleParameters) -> list[Prediction]:
    maps = outputs.values["heatmap"]
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
    points = (cells * np.divide(outputs.placement.input, (columns, rows))).astype(np.float32)
    return _tell_single(outputs, points, flat[each, best], parameters)


def _decode_simcc(outputs: Outputs, parameters: SingleParameters) -> list[Prediction]:
    maps = outputs.values["simcc_x"], outputs.values["simcc_y"]
    places = []
    for own, axis, side in zip(maps, "xy", outputs.placement.input, strict=True):
        bins = own.shape[1]
        if bins % side:
            raise OutputError(f"simcc_{axis} has {bins} bins, and the input {side} pixels: mend the outputs or that")
        places.append(own.argmax(axis=1) * side / bins)
    scores = np.minimum(*(own.max(axis=1) for own in maps))
    return _tell_single(outputs, np.stack(places, axis=1).astype(np.float32), scores, parameters)


def _find_around_cells(outputs: Outputs, parameters: detection.AnchorFreeParameters) -> Detections:
    detections, landmarks = detection.find_around_cells(outputs, parameters), outputs.values["landmarks"]
    points, units = parameters.locate(len(landmarks), outputs.placement.input)
    own = landmarks[detections.rows].reshape(len(detections.rows), landmarks.shape[1] // 2, 2)
    with np.errstate(over="ignore", invalid="ignore"):
        own = points[detections.rows, None] + own * units[detections.rows, None]
    return _with_points(outputs, detections, own, detections.scores)


def _with_points(
    outputs: Outputs, detections: Detections, points: np.ndarray, scores: np.ndarray, relative: bool = False
) -> Detections:
    """Detections with points `[n, K, 2]`, in the input's pixels or relative to it; `scores` as in `to_keypoints`."""
    points = points * np.array(outputs.placement.input, np.float32) if relative else points
    return replace(detections, keypoints=to_keypoints(points, scores, outputs.placement))


def _tell_single(
    outputs: Outputs, points: np.ndarray, scores: np.ndarray, parameters: SingleParameters
) -> list[Prediction]:
    """The one object, whose box is the bounds of its points `[K, 2]`, in the input's pixels."""
    keypoints = to_keypoints(points[None], scores[None], outputs.placement)
    score = scores.mean()
    if not (score > parameters.score_threshold and np.isfinite(keypoints).all()):
        return []
    places = keypoints[0, :, :2]
    box = np.concatenate([places.min(axis=0), places.max(axis=0)])[None]
    first = np.zeros(1, int)
    return Detections(box, first, score[None], first, keypoints=keypoints).to_predictions(outputs.labels)


KEYPOINTS = [
    *(role for role in detection.BOXES if role.name != "classes"),
    Role("classes", ("N",), are_whole, optional=True, values="whole numbers"),
    Role("keypoints", ("N K 2", "N K 3")),
    Role("keypoint_scores", ("N K",), optional=True),
]
POINT_SHAPES = ("K 3", "1 K 3", "K 2", "1 K 2", "2K", "3K", "1 1 2K", "1 1 3K")
POINTS = [
    Role("points", POINT_SHAPES, lambda values: values[0].size > FEWEST_NUMBERS),
    Role("scores", ("K", "K 1", "1", "1 1 1"), optional=True),
]
YOLO = [Role("predictions", ("4+C+3K A", "A 4+C+3K", "A 5+C+3K"))]
DECODERS = {
    "end_to_end": make_decoder(_find_end_to_end, KeypointParameters, KEYPOINTS, suggest=detection.suggest_end_to_end),
    "points": make_decoder(_decode_points, PointParameters, POINTS, suggest=_suggest_points),
    "ssd": make_decoder(
        _find_anchored,
        detection.SsdParameters,
        [Role("offsets", ("A 4",)), detection.SCORES, Role("landmarks", ("A 2K",))],
        [Role("offsets", ("A 4+2K",)), detection.SCORES],
        suggest=detection.suggest_ssd,
    ),
    "anchor_free": make_decoder(
        _find_around_cells,
        detection.AnchorFreeParameters,
        [*detection.DISTANCES, Role("landmarks", ("A 2K",)), detection.OBJECTNESS],
        suggest=detection.suggest_anchor_free,
    ),
    "simcc": make_decoder(_decode_simcc, SingleParameters, [Role("simcc_x", ("K X",)), Role("simcc_y", ("K Y",))]),
    "yolo": make_decoder(_find_yolo, yolo.Parameters, YOLO, suggest=yolo.suggest_parameters),
    "centernet": make_decoder(
        centernet.find_objects,
        centernet.Parameters,
        [*centernet.ROLES, centernet.LANDMARKS],
        suggest=centernet.suggest_parameters,
    ),
    "heatmap": make_decoder(_decode_heatmap, SingleParameters, [Role("heatmap", ("K H W",))]),
}
