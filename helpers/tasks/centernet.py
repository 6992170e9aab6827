"""What the decoders of centers on a map share: CenterNet (Zhou et al., Objects as Points) and CenterFace."""

from dataclasses import dataclass, replace
from typing import Any, Literal

import cv2
import numpy as np

from helpers.tasks.boxes import Detections, Order, in_order, locate, suppress, to_keypoints
from helpers.tasks.classification import sigmoid
from helpers.tasks.interface import Arrays, DecoderParameters, Outputs
from helpers.tasks.roles import Role, are_shares


@dataclass(frozen=True)
class Parameters(DecoderParameters):
    """How centers on a map become objects; the defaults are those of CenterFace (Xu et al., 2019)."""

    score_threshold: float = 0.3  # a center's probability is above
    # Intersection over union above which a box is suppressed, within a class; 1 suppresses none.
    nms_threshold: float = 0.3
    max_detections: int = 300  # of an image
    activation: Literal["none", "sigmoid"] = "none"  # from the heat map to probabilities
    peaks: bool = False  # centers are only the cells that no neighbor exceeds, as CenterNet has them
    order: Order = "yx"  # of sizes, offsets and landmarks
    # `log` if they are logarithms, of a unit of 4 pixels of the input; `cells` if they are cells of the map.
    sizes: Literal["log", "cells"] = "log"
    center: float = 0.5  # where in its cell a center is that has no offset
    # `box` if they are relative to the box, from its left upper corner; `center` if they are cells of the map, from the
    # center's own.
    landmarks: Literal["box", "center"] = "box"


def suggest_parameters(samples: Arrays, labels: int) -> dict[str, Any]:
    """The activation that the heat map tells; see `Decoder`."""
    return {} if are_shares(samples["heatmap"]) else {"activation": "sigmoid"}


def find_objects(outputs: Outputs, parameters: Parameters) -> Detections:
    """The detections of `heatmap [C, H, W]`, `sizes [2, H, W]` and `offsets [2, H, W]`.

    Where there are `landmarks [2 * K, H, W]`, they are the detections' keypoints.
    """
    heatmap, placement = outputs.values["heatmap"], outputs.placement
    heatmap = sigmoid(heatmap) if parameters.activation == "sigmoid" else heatmap
    stride = np.divide(placement.input, heatmap.shape[:0:-1]).astype(np.float32)
    is_center = heatmap > parameters.score_threshold
    if parameters.peaks:
        is_center &= heatmap == np.stack([cv2.dilate(one, np.ones((3, 3), np.uint8)) for one in heatmap])
    classes, rows, columns = np.nonzero(is_center)
    scores, cells = heatmap[classes, rows, columns], np.stack([columns, rows], axis=1).astype(np.float32)
    values = {
        role: in_order(maps[:, rows, columns].T.reshape(len(rows), len(maps) // 2, 2), parameters.order)
        for role, maps in outputs.values.items()
        if role != "heatmap"
    }
    with np.errstate(over="ignore", invalid="ignore"):
        centers = (cells + values["offsets"][:, 0] + np.float32(parameters.center)) * stride
        sizes = values["sizes"][:, 0]
        sizes = np.exp(sizes) * 4 if parameters.sizes == "log" else sizes * stride
        boxes = np.concatenate([centers - sizes / 2, centers + sizes / 2], axis=1)
    best = np.flatnonzero(np.isfinite(boxes).all(axis=1))
    best = best[suppress(boxes[best], scores[best], parameters.nms_threshold, classes[best])]
    detections = locate(outputs, boxes[best], classes[best], scores[best], best, parameters.max_detections)
    if "landmarks" not in values:
        return detections
    own = detections.rows
    with np.errstate(over="ignore", invalid="ignore"):
        if parameters.landmarks == "box":
            points = boxes[own, None, :2] + values["landmarks"][own] * sizes[own, None]
        else:
            points = (cells[own, None] + values["landmarks"][own]) * stride
    return replace(detections, keypoints=to_keypoints(points, detections.scores, placement))


ROLES = [
    Role("heatmap", ("C H W",)),
    Role("sizes", ("2 H W",)),
    Role("offsets", ("2 H W",), lambda values: bool(abs(values).max(initial=0) <= 1), values="from -1 to 1"),
]
LANDMARKS = Role("landmarks", ("2K H W",), optional=True)
