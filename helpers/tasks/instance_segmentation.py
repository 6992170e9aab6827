"""Instances with box and mask."""

from dataclasses import dataclass, replace

import cv2
import numpy as np

from helpers.images import rle
from helpers.images.enlargement import enlarge
from helpers.tasks import yolo
from helpers.tasks.boxes import Detections
from helpers.tasks.detection import BOXES, SCORED_BOXES, EndToEndParameters, find_end_to_end, suggest_end_to_end
from helpers.tasks.interface import Outputs, Prediction
from helpers.tasks.roles import Role, are_shares, make_decoder
from helpers.yolact.detection import Parameters, find_instances


@dataclass(frozen=True)
class MaskParameters(EndToEndParameters):
    """What boxes and masks of a network mean that has chosen them itself."""

    mask_threshold: float = 0.5  # a pixel belongs to a mask if its probability is above


def _decode_yolact(outputs: Outputs, parameters: Parameters) -> list[Prediction]:
    priors, placement = outputs.priors("loc"), outputs.placement
    heads = [outputs.values[role.name] for role in YOLACT]
    return find_instances(heads, priors, parameters, placement.input[0], placement.image, outputs.labels)


def _find_mask_rcnn(outputs: Outputs, parameters: MaskParameters) -> Detections:
    detections, maps = find_end_to_end(outputs, parameters), outputs.values["masks"]
    maps = maps.reshape(-1, *maps.shape[-2:])[detections.rows]
    size, threshold = outputs.placement.image, parameters.mask_threshold
    pairs = zip(maps, detections.boxes, strict=True)
    return replace(detections, masks=[paste(own, box, size, threshold) for own, box in pairs])


def paste(probabilities: np.ndarray, box: np.ndarray, size: tuple[int, int], threshold: float) -> rle.Mask:
    """Enlarge a mask that is relative to its box to the box's pixels, as He et al., Mask R-CNN, section 3.1.

    A cell of 0 goes around the mask, float32 `[rows, columns]`, and the box grows by as much, because half a cell at
    the edge would be lost; that, and the rounding of the box, is torchvision's. A pixel belongs to the mask if its
    probability is above the threshold.
    """
    padded = np.pad(probabilities, 1)
    center, half = (box[:2] + box[2:]) / 2, (box[2:] - box[:2]) / 2
    half *= np.array(padded.shape[::-1], np.float32) / probabilities.shape[::-1]
    left, top, right, bottom = (int(side) for side in (*(center - half), *(center + half)))
    enlarged = cv2.resize(padded, (right - left + 1, bottom - top + 1), interpolation=cv2.INTER_LINEAR)
    x, y = max(left, 0), max(top, 0)
    inside = enlarged[y - top : size[1] - top, x - left : size[0] - left] > threshold
    return rle.encode_part(inside, (x, y), *size)


def _find_yolo(outputs: Outputs, parameters: yolo.Parameters) -> Detections:
    prototypes, placement = outputs.values["prototypes"], outputs.placement
    depth = len(prototypes)
    detections, coefficients = yolo.find_with_others(outputs, parameters, depth)
    logits = (coefficients @ prototypes.reshape(depth, -1)).reshape(-1, *prototypes.shape[1:])
    masks = []
    for own, (left, top, right, bottom) in zip(logits, np.rint(detections.boxes).astype(int).tolist(), strict=True):
        inside = enlarge(own, placement, (left, top, right, bottom)) > 0  # a probability above one half
        masks.append(rle.encode_part(inside, (left, top), *placement.image))
    return replace(detections, masks=masks)


MASKS = Role("masks", ("N H W", "N 1 H W"), are_shares, values="from 0 to 1")
YOLACT = [
    Role("loc", ("A 4",)),
    Role("conf", ("A 1+C",), are_shares, values="from 0 to 1"),
    Role("mask", ("A P",)),
    Role("proto", ("H W P",)),
]
YOLO = [Role("prototypes", ("P H W",)), Role("predictions", ("4+C+P A", "A 4+C+P", "A 5+C+P"))]

DECODERS = {
    "yolact": make_decoder(_decode_yolact, Parameters, YOLACT),
    "mask_rcnn": make_decoder(
        _find_mask_rcnn, MaskParameters, [*BOXES, MASKS], [*SCORED_BOXES, MASKS], suggest=suggest_end_to_end
    ),
    "yolo": make_decoder(_find_yolo, yolo.Parameters, YOLO, suggest=yolo.suggest_parameters),
}
