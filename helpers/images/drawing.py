"""Images with their predictions drawn on."""

import hashlib
import math
import re
from typing import Any

import cv2
import numpy as np

from helpers.images import rle
from helpers.images.decoding import Image

SMALLEST_SIDE = 224  # pixels; smaller images are enlarged, so that a caption is readable ...
LARGEST_SIDE = 1024  # ... but a thin one only so far
FONT = cv2.FONT_HERSHEY_SIMPLEX
DRAWN_SCORE = 0.3  # results hold detections that are too improbable to look at
OPACITY = 0.45  # of a mask
DOT = 3  # radius of a keypoint, in pixels
HUES = 180  # of OpenCV's color circle
GOLDEN_ANGLE = 0.381966 * HUES  # steps of it keep any number of hues apart, and never come back to one


def draw(image: Image, predictions: list[dict[str, Any]], threshold: float = DRAWN_SCORE) -> Image:
    """Return a copy of a BGR image, uint8 `[height, width, 3]`, with its predictions drawn on.

    For a classification, the best class becomes a caption; detections with a score below the threshold are left out.
    """
    scale = max(1, min(math.ceil(SMALLEST_SIDE / min(image.shape[:2])), LARGEST_SIDE // max(image.shape[:2])))
    canvas = _enlarge(image, scale)
    boxed = [p for p in predictions if p["box"] and p["score"] >= threshold]
    for prediction in sorted(boxed, key=lambda p: p["score"]):  # the most probable on top
        _draw_detection(canvas, prediction, scale)
    if predictions and not predictions[0]["box"]:
        _caption(canvas, _title(predictions[0]))
    return canvas


def color_of(class_id: int) -> tuple[int, int, int]:
    """Return the BGR color of a class, the same in every picture."""
    pixel = np.array([[[class_id * GOLDEN_ANGLE % HUES, 200, 255]]], np.uint8)
    blue, green, red = cv2.cvtColor(pixel, cv2.COLOR_HSV2BGR)[0, 0].tolist()
    return blue, green, red


def picture_name(path: str) -> str:
    """A file name that no two paths share and that cannot lead out of the folder, whatever the path is called."""
    stem = re.sub(r"[^A-Za-z0-9-]+", "_", path.rpartition("/")[2])[:80]
    return f"{stem}-{hashlib.sha256(path.encode()).hexdigest()[:16]}.png"


def _draw_detection(canvas: Image, prediction: dict[str, Any], scale: int) -> None:
    color = color_of(prediction["class_id"])
    if prediction["mask"]:
        inside = _enlarge(rle.decode(prediction["mask"]), scale)
        for channel, shade in enumerate(color):  # by a table, because numbers of other types take many times the memory
            blended = (np.arange(256) * (1 - OPACITY) + shade * OPACITY).astype(np.uint8)
            canvas[inside, channel] = blended[canvas[inside, channel]]
    x1, y1, x2, y2 = (round(prediction["box"][side] * scale) for side in ("x1", "y1", "x2", "y2"))
    cv2.rectangle(canvas, (x1, y1), (x2 - 1, y2 - 1), color, 2)
    for point in prediction.get("keypoints") or []:
        if point["score"] >= DRAWN_SCORE:
            cv2.circle(canvas, (round(point["x"] * scale), round(point["y"] * scale)), DOT, color, cv2.FILLED)
    _caption(canvas, _title(prediction), (x1, y1), color, (0, 0, 0))


def _title(prediction: dict[str, Any]) -> str:
    return f"{prediction['label']} {prediction['score']:.2f}"


def _enlarge(pixels: np.ndarray, scale: int) -> np.ndarray:
    return np.repeat(np.repeat(pixels, scale, axis=0), scale, axis=1)


def _caption(
    canvas: Image,
    text: str,
    corner: tuple[int, int] = (0, 0),
    background: tuple[int, int, int] = (0, 0, 0),
    color: tuple[int, int, int] = (255, 255, 255),
) -> None:
    (width, height), baseline = cv2.getTextSize(text, FONT, 0.5, 1)
    # Moved so far that all of it can be read, where the picture is large enough.
    x = max(0, min(corner[0], canvas.shape[1] - width - 7))
    y = max(0, min(corner[1], canvas.shape[0] - height - baseline - 5))
    cv2.rectangle(canvas, (x, y), (x + width + 6, y + height + baseline + 4), background, cv2.FILLED)
    cv2.putText(canvas, text, (x + 3, y + height + 3), FONT, 0.5, color, 1, cv2.LINE_AA)
