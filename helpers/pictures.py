"""Pictures of results: a sample of a run's images with what was found in them drawn on."""

import hashlib
import math
import re
from typing import Any

import cv2
import numpy as np

from helpers.config import Config
from helpers.images import Image, decode
from helpers.results import read_table
from helpers.storage import Storage

PICTURES = "pictures"
SMALLEST_SIDE = 224  # smaller images are enlarged, so that a caption is readable
FONT = cv2.FONT_HERSHEY_SIMPLEX


def draw_sample(output: Storage, files: list[str], source: Storage, config: Config) -> list[str]:
    """Write a sample of a run's images, annotated, to `OUTPUT/pictures`; return their paths.

    Args:
        output: the run's output.
        files: the run's result files; the sample comes from all of them.
        source: where the images lie.
        config: `pictures` says how many.
    """
    paths: list[str] = []
    for file in files:
        if len(paths) >= config.pictures:
            break
        table = read_table(output, file)
        table = table.filter(table["error"].is_null()).slice(0, math.ceil(config.pictures / len(files)))
        for row in table.slice(0, config.pictures - len(paths)).to_pylist():
            image = draw(decode(source.read(row["path"]), config.ingest.max_pixels), row["predictions"])
            paths.append(output.join(PICTURES, picture_name(row["path"])))
            output.write(paths[-1], cv2.imencode(".png", image)[1].tobytes())
    return paths


def draw(image: Image, predictions: list[dict[str, Any]]) -> Image:
    """Return a copy of a BGR image with its predictions: for a classification, a caption with the best class."""
    scale = max(1, math.ceil(SMALLEST_SIDE / min(image.shape[:2])))
    canvas = np.repeat(np.repeat(image, scale, axis=0), scale, axis=1)
    if predictions:
        _caption(canvas, f"{predictions[0]['label']} {predictions[0]['score']:.2f}")
    return canvas


def picture_name(path: str) -> str:
    """A file name that no two paths share and that cannot lead out of the folder, whatever the path is called."""
    stem = re.sub(r"[^A-Za-z0-9-]+", "_", path.rpartition("/")[2])[:80]
    return f"{stem}-{hashlib.sha256(path.encode()).hexdigest()[:16]}.png"


def _caption(canvas: Image, text: str) -> None:
    (width, height), baseline = cv2.getTextSize(text, FONT, 0.5, 1)
    cv2.rectangle(canvas, (0, 0), (width + 6, height + baseline + 4), (0, 0, 0), cv2.FILLED)
    cv2.putText(canvas, text, (3, height + 3), FONT, 0.5, (255, 255, 255), 1, cv2.LINE_AA)
