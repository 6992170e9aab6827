"""Objects with boxes, from networks that give them, or candidates, or offsets from anchors."""

from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from helpers.errors import ConfigError
from helpers.tasks import centernet, yolo
from helpers.tasks.boxes import (
    LARGEST_RELATIVE,
    BoxFormat,
    Detections,
    Order,
    clip,
    locate,
    make_cells,
    suggest_format,
    suppress,
    to_corners,
    to_input,
)
from helpers.tasks.classification import sigmoid, softmax
from helpers.tasks.interface import Arrays, DecoderParameters, OutputError, Outputs
from helpers.tasks.roles import Decoder, Role, are_shares, are_whole, make_decoder

Columns = Literal[
    "", "box score class", "class score box", "image box class score", "image box score class", "image class score box"
]
LARGEST_GROWTH = np.float32(np.log(1000 / 16))  # of an anchor's side; a network's exponent may be beyond all numbers


@dataclass(frozen=True)
class EndToEndParameters(DecoderParameters):
    """What the boxes of a network mean that has chosen them itself."""

    score_threshold: float = 0.05  # scores are above
    max_detections: int = 300  # of an image
    box_format: BoxFormat = "xyxy"  # order of a box's numbers
    relative: bool = False  # the numbers are relative to the network's input, 0 to 1, and not its pixels
    first_class: Literal[0, 1] = 0  # the number that the network gives the first label
    # Of one table of detections, a box as four; empty for `box score class`, and of seven columns for `image class
    # score box` with a relative box.
    columns: Columns = ""


@dataclass(frozen=True)
class ChoiceParameters(DecoderParameters):
    """How detections are chosen from candidates that are many."""

    score_threshold: float = 0.05  # a class's score at a candidate is above
    nms_threshold: float = 0.5  # intersection over union above which a box is suppressed, within a class
    top_k: int = 400  # candidates per class
    max_detections: int = 200  # of an image
    # Where the scores of no object stand among the classes', if anywhere.
    background: Literal["first", "last", "none"] = "first"
    activation: Literal["softmax", "sigmoid", "none"] = "none"  # from the output to scores

    def activate(self, outputs: np.ndarray) -> np.ndarray:
        """The scores of outputs `[A, C]`."""
        return outputs if self.activation == "none" else ACTIVATIONS[self.activation](outputs)


@dataclass(frozen=True)
class CandidateParameters(ChoiceParameters):
    """What candidates' boxes mean, and which are chosen."""

    box_format: BoxFormat = "xyxy"  # order of a box's numbers
    relative: bool = False  # the numbers are relative to the network's input, 0 to 1, and not its pixels


@dataclass(frozen=True)
class SsdParameters(ChoiceParameters):
    """How offsets from anchors become boxes (Liu et al., SSD, section 2.2), and which are chosen."""

    activation: Literal["softmax", "sigmoid", "none"] = "softmax"
    # The scale of offsets of centers and of sizes, two numbers or one per number of a box.
    variances: tuple[float, ...] = (0.1, 0.1, 0.2, 0.2)
    order: Order = "xy"  # of the offsets: `xy`, or `yx` as TensorFlow has them
    # `log` if offsets of sizes are logarithms of growth; `linear` if they are growth itself.
    sizes: Literal["log", "linear"] = "log"

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.variances) not in (2, 4):
            raise ConfigError("postprocess.variances is not a list of 2 or 4 numbers")

    @property
    def scale(self) -> np.ndarray:
        """Of each number of a box, float32 `[4]`."""
        return np.repeat(self.variances, 4 // len(self.variances)).astype(np.float32)


@dataclass(frozen=True)
class AnchorFreeParameters(ChoiceParameters):
    """How the cells of grids become boxes (Tian et al., FCOS, section 3.1), and which are chosen."""

    background: Literal["first", "last", "none"] = "none"
    center: float = 0.5  # where in its cell a candidate's point is: 0.5 for the middle, 0 for the left upper corner
    # `distances` from the point to the left, top, right and bottom; or `offsets` of the center from the point and
    # logarithms of width and height.
    boxes: Literal["distances", "offsets"] = "distances"
    # Of distances, offsets and landmarks: the cell's `stride`, or a `pixel` of the input.
    unit: Literal["stride", "pixel"] = "stride"
    # How scores are combined with it: `root` of the product, or `product`.
    objectness: Literal["root", "product"] = "root"
    first: Literal["boxes", "scores"] = "boxes"  # of one table of `predictions`: the columns of `boxes` or of `scores`

    def locate(self, rows: int, input_size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        """The candidates' points, in pixels of the input, and their units, float32 `[rows, 2]` and `[rows, 1]`."""
        cells = make_cells(rows, input_size)
        strides = cells[:, 2:]
        units = strides if self.unit == "stride" else np.ones_like(strides)
        return (cells[:, :2] + np.float32(self.center)) * strides, units


@dataclass(frozen=True)
class DetrParameters(DecoderParameters):
    """Which queries are detections (Carion et al., DETR)."""

    score_threshold: float = 0.05  # scores are above
    # `softmax`, where the last class is no object, or `sigmoid`, where a query may have several classes.
    activation: Literal["softmax", "sigmoid"] = "softmax"
    max_detections: int = 300  # of an image


def find_end_to_end(outputs: Outputs, parameters: EndToEndParameters) -> Detections:
    """The detections of a network that has chosen them.

    The outputs are `boxes [N, 4]`, `scores [N]`, `classes [N]`, and perhaps `count`, of the rows that are meant; or
    `boxes [N, 5]` with the score in the end; or one output `detections`, `[N, 6]` or `[N, 7]`, see `columns`.
    """
    boxes, scores, classes, relative = _split(outputs.values, parameters)
    count = int(outputs.values["count"].reshape(-1)[0]) if "count" in outputs.values else len(scores)
    rows = np.flatnonzero(scores[: max(count, 0)] > parameters.score_threshold)
    corners = to_corners(boxes[rows], parameters.box_format)
    with np.errstate(over="ignore"):
        corners = to_input(corners, outputs.placement) if relative else corners
    classes = classes[rows] - parameters.first_class
    return locate(outputs, corners, classes, scores[rows], rows, parameters.max_detections)


def _split(outputs: Arrays, parameters: EndToEndParameters) -> tuple[np.ndarray, np.ndarray, np.ndarray, bool]:
    """Boxes, scores, classes, and whether boxes are relative to the input."""
    if "detections" in outputs:
        table = outputs["detections"].reshape(-1, outputs["detections"].shape[-1])
        is_default = table.shape[1] == 7 and not parameters.columns  # OpenVINO's DetectionOutput
        columns = _columns(table, parameters.columns)
        images = columns.get("image", np.zeros((len(table), 1)))[:, 0]
        stop = int(np.argmax(np.append(images, -1) < 0))  # an image's number below 0 ends the list
        scores, classes = columns["score"][:stop, 0], columns["class"][:stop, 0]
        return columns["box"][:stop], scores, classes, parameters.relative or is_default
    boxes = outputs["boxes"]
    scores = outputs["scores"] if "scores" in outputs else boxes[:, 4]
    classes = outputs.get("classes", np.full(len(boxes), parameters.first_class, np.float32))
    return boxes[:, :4], scores, classes, parameters.relative


def _columns(table: np.ndarray, names: str = "") -> dict[str, np.ndarray]:
    """The columns of a table `[..., 6 or 7]` by their names, a box as four."""
    names = names or ("box score class" if table.shape[-1] == 6 else "image class score box")
    widths = [4 if name == "box" else 1 for name in names.split()]
    if sum(widths) != table.shape[-1]:
        raise OutputError(f"detections have {table.shape[-1]} columns, and not {names!r}: mend postprocess.columns")
    return dict(zip(names.split(), np.split(table, np.cumsum(widths)[:-1], axis=-1), strict=True))


def _find_candidates(outputs: Outputs, parameters: CandidateParameters) -> Detections:
    boxes = to_corners(outputs.values["boxes"].reshape(-1, 4), parameters.box_format)
    boxes = to_input(boxes, outputs.placement) if parameters.relative else boxes
    scores = outputs.values["scores"]
    scores = parameters.activate(scores if len(scores) == len(boxes) else scores.T)
    return _choose(outputs, boxes, scores, np.arange(len(boxes)), parameters)


def find_anchored(outputs: Outputs, parameters: SsdParameters) -> Detections:
    """The detections of a network that gives offsets from anchors, which the bundle has in `priors.npy`.

    The outputs are `offsets [A, 4]`, of which there may be more, and `scores [A, C]` or `[A, 1 + C]`. Raises
    BundleError if the bundle has no anchors, or another number of them.
    """
    priors, offsets = outputs.priors("offsets"), outputs.values["offsets"][:, :4]
    offsets = offsets[:, [1, 0, 3, 2]] if parameters.order == "yx" else offsets
    with np.errstate(over="ignore", invalid="ignore"):
        steps = offsets * parameters.scale
        centers = priors[:, :2] + steps[:, :2] * priors[:, 2:]
        growth = np.exp(np.minimum(steps[:, 2:], LARGEST_GROWTH)) if parameters.sizes == "log" else steps[:, 2:]
        boxes = to_corners(np.concatenate([centers, priors[:, 2:] * growth], axis=1), "cxcywh")
    scores = parameters.activate(outputs.values["scores"])
    return _choose(outputs, to_input(boxes, outputs.placement), scores, np.arange(len(boxes)), parameters)


def find_around_cells(outputs: Outputs, parameters: AnchorFreeParameters) -> Detections:
    """The detections of a network that gives boxes around the cells of grids.

    The outputs are `scores [A, C]`, and `distances [A, 4]` or their distributions `[A, 4 * bins]` (Li et al.,
    Generalized Focal Loss); or `predictions` with both side by side; perhaps `objectness [A]` or `[A, 1]`. Raises
    OutputError if no grids have so many cells.
    """
    values = outputs.values
    if "predictions" in values:
        values = {**values, **_divide(values["predictions"], len(outputs.labels), parameters.first)}
    scores = parameters.activate(values["scores"])
    if "objectness" in values:
        scores = scores * parameters.activate(values["objectness"].reshape(-1, 1))
        scores = np.sqrt(np.maximum(scores, 0)) if parameters.objectness == "root" else scores
    points, units = parameters.locate(len(scores), outputs.placement.input)
    rows = np.flatnonzero(scores.max(axis=1) > parameters.score_threshold)
    with np.errstate(over="ignore", invalid="ignore"):
        numbers = values["distances"][rows].reshape(len(rows), 4, values["distances"].shape[1] // 4)
        bins = numbers.shape[2]
        sides = softmax(numbers, axis=2) @ np.arange(bins, dtype=np.float32) if bins > 1 else numbers[:, :, 0]
        if parameters.boxes == "offsets":
            centers, half = points[rows] + sides[:, :2] * units[rows], np.exp(sides[:, 2:]) * units[rows] / 2
            boxes = np.concatenate([centers - half, centers + half], axis=1)
        else:
            low, high = sides[:, :2] * units[rows], sides[:, 2:] * units[rows]
            boxes = np.concatenate([points[rows] - low, points[rows] + high], axis=1)
    return _choose(outputs, boxes, scores[rows], rows, parameters)


def _divide(table: np.ndarray, labels: int, first: str) -> dict[str, np.ndarray]:
    """The scores and distances of a table `[..., labels + 4 * bins]`."""
    columns = np.split(table, [labels if first == "scores" else table.shape[-1] - labels], axis=-1)
    return dict(zip(("scores", "distances") if first == "scores" else ("distances", "scores"), columns, strict=True))


def _choose(
    outputs: Outputs, boxes: np.ndarray, scores: np.ndarray, rows: np.ndarray, parameters: ChoiceParameters
) -> Detections:
    """Non-maximum suppression within each class; a box may be of several.

    Boxes are float32 `[A, 4]` in pixels of the input, scores float32 `[A, C]`, or one column more for the background,
    and rows int `[A]`, the place of each among all candidates.
    """
    if scores.shape[1] > len(outputs.labels):
        scores = scores[:, :-1] if parameters.background == "last" else scores[:, 1:]
    inside = clip(boxes, outputs.placement.input)
    candidates, classes = np.nonzero((scores > parameters.score_threshold) & np.isfinite(inside).all(axis=1)[:, None])
    best = scores[candidates, classes]
    order = np.argsort(-best, kind="stable")
    order = order[_ranks(classes[order]) < parameters.top_k]
    candidates, classes, best = candidates[order], classes[order], best[order]
    chosen = suppress(inside[candidates], best, parameters.nms_threshold, classes)[: parameters.max_detections]
    candidates, classes, best = candidates[chosen], classes[chosen], best[chosen]
    return locate(outputs, inside[candidates], classes, best, rows[candidates], parameters.max_detections)


def _ranks(classes: np.ndarray) -> np.ndarray:
    """How many of the same class stand before each."""
    order = np.argsort(classes, kind="stable")
    ordered = classes[order]
    ranks = np.empty(len(classes), int)
    ranks[order] = np.arange(len(classes)) - np.searchsorted(ordered, ordered)
    return ranks


def _find_queries(outputs: Outputs, parameters: DetrParameters) -> Detections:
    scores = ACTIVATIONS[parameters.activation](outputs.values["logits"])
    if parameters.activation == "softmax":  # a query is of its best class, or no object
        scores = scores[:, :-1]
        scores = np.where(scores == scores.max(axis=1, keepdims=True), scores, 0)
    queries, classes = np.nonzero(scores > parameters.score_threshold)
    boxes = to_input(to_corners(outputs.values["boxes"][queries], "cxcywh"), outputs.placement)
    return locate(outputs, boxes, classes, scores[queries, classes], queries, parameters.max_detections)


def suggest_end_to_end(samples: Arrays, labels: int) -> dict[str, Any]:
    """What boxes and classes tell of their parameters; see `Decoder`."""
    table = samples.get("detections")
    parameters: dict[str, Any] = {}
    if table is None:
        boxes, classes = samples["boxes"][..., :4], samples.get("classes", np.zeros(0))
    else:
        names = next(iter(_orders(table)), "")
        columns = _columns(table, names)
        boxes, classes = columns["box"], columns["class"]
        parameters = {"columns": names} if names else {}
    if table is None or table.shape[-1] == 6 or parameters:
        parameters |= suggest_format(boxes)
    return parameters | ({"first_class": 1} if labels and classes.max(initial=0) == labels else {})


def suggest_ssd(samples: Arrays, labels: int) -> dict[str, Any]:
    """The activation that scores tell; see `Decoder`."""
    if are_shares(samples["scores"]):
        return {"activation": "none"}
    return {"activation": "sigmoid"} if samples["scores"].shape[-1] == labels else {}


def suggest_anchor_free(samples: Arrays, labels: int) -> dict[str, Any]:
    """The order of a table's columns and the activation, which scores tell; see `Decoder`."""
    parameters = {}
    if "predictions" in samples:
        tables = {first: _divide(samples["predictions"], labels, first) for first in ("boxes", "scores")}
        if are_shares(tables["scores"]["scores"]):
            parameters["first"] = "scores"
        samples = tables[parameters.get("first", "boxes")]
    return parameters if are_shares(samples["scores"]) else {**parameters, "activation": "sigmoid"}


def _orders(table: np.ndarray) -> list[str]:
    """The orders of columns that a table's values may be in, as `columns` has them; the usual one first."""
    orders = []
    for names in get_args(Columns):
        if names and len(names.split()) + 3 != table.shape[-1]:
            continue
        columns = _columns(table, names)
        numbers = [columns[name] for name in ("image", "class") if name in columns]
        if are_shares(columns["score"]) and all(map(are_whole, numbers)):
            orders.append(names)
    if table.shape[-1] == 7 and "" in orders and _columns(table)["box"].max(initial=0) > LARGEST_RELATIVE:
        orders.remove("")  # whose boxes are relative
    return orders


def _are_corners(values: np.ndarray) -> bool:
    """Boxes and not offsets: sides are of some length, whatever the format."""
    return bool(values.size == 0 or (values > -0.1 * max(abs(float(values.max())), 1)).mean() > 0.99)


ACTIVATIONS = {"softmax": softmax, "sigmoid": sigmoid}

CLASSES = Role("classes", ("N",), are_whole, values="whole numbers")
COUNT = Role("count", ("", "1"), are_whole, optional=True, values="a whole number")
IN_SHARES = Role("scores", ("N",), are_shares, values="from 0 to 1")
BOXES = [Role("boxes", ("N 4",), _are_corners), IN_SHARES, CLASSES, COUNT]
SCORED_BOXES = [Role("boxes", ("N 5",)), CLASSES]
TABLES = ("N 6", "N 7", "1 N 6", "1 N 7")
TABLE = [Role("detections", TABLES, lambda values: bool(_orders(values)), values="boxes, scores, classes"), COUNT]
CANDIDATES = [
    Role("boxes", ("A 4", "A 1 4"), _are_corners),
    Role("scores", ("A C", "A 1+C", "C A"), are_shares, values="from 0 to 1"),
]
SCORES = Role("scores", ("A C", "A 1+C"))
SSD = [Role("offsets", ("A 4",)), SCORES]
OBJECTNESS = Role("objectness", ("A 1", "A"), optional=True, word="obj")
# Distances from 0 on, or their distributions over 8, 16 or 17 bins.
DISTANCES = [Role("scores", ("A C",)), Role("distances", ("A 4", "A 32", "A 64", "A 68"))]
DISTANCE_TABLE = Role("predictions", ("A 4+C", "A 32+C", "A 64+C", "A 68+C"))
# Networks with objectness give a row per anchor: a column more of the others is a class that lacks a label.
YOLO = [Role("predictions", ("4+C A", "A 4+C", "A 5+C"))]
DETR = [
    Role("logits", ("Q C", "Q 1+C"), lambda values: not are_shares(values), values="not from 0 to 1"),
    Role("boxes", ("Q 4",), are_shares, values="from 0 to 1"),
]

DECODERS: dict[str, Decoder] = {
    "end_to_end": make_decoder(
        find_end_to_end, EndToEndParameters, BOXES, SCORED_BOXES, TABLE, suggest=suggest_end_to_end
    ),
    "detr": make_decoder(
        _find_queries,
        DetrParameters,
        DETR,
        suggest=lambda samples, labels: {"activation": "sigmoid"} if samples["logits"].shape[-1] == labels else {},
    ),
    "candidates": make_decoder(
        _find_candidates,
        CandidateParameters,
        CANDIDATES,
        suggest=lambda samples, labels: suggest_format(samples["boxes"]),
    ),
    "ssd": make_decoder(find_anchored, SsdParameters, SSD, suggest=suggest_ssd),
    "yolo": make_decoder(yolo.find_objects, yolo.Parameters, YOLO, suggest=yolo.suggest_parameters),
    "anchor_free": make_decoder(
        find_around_cells,
        AnchorFreeParameters,
        [*DISTANCES, OBJECTNESS],
        [DISTANCE_TABLE, OBJECTNESS],
        suggest=suggest_anchor_free,
    ),
    "centernet": make_decoder(
        centernet.find_objects, centernet.Parameters, centernet.ROLES, suggest=centernet.suggest_parameters
    ),
}
