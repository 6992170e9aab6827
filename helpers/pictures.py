"""Pictures of results: a sample of a run's images with what was found in them drawn on."""

import hashlib
import logging
import math
import re
from typing import Any

import cv2
import numpy as np
import pyarrow.compute as pc

from helpers.config import Config
from helpers.images import Image, UnreadableImageError, decode
from helpers.results import read_table
from helpers.storage import Storage

log = logging.getLogger(__name__)

SMALLEST_SIDE = 224  # pixels; smaller images are enlarged, so that a caption is readable ...
LARGEST_SIDE = 1024  # ... but a thin one only so far
FONT = cv2.FONT_HERSHEY_SIMPLEX


def draw_sample(output: Storage, files: list[str], source: Storage, config: Config) -> dict[str, bytes]:
    """Annotate a sample of a run's images; return the PNG files by name.

    Args:
        output: the run's output.
        files: the run's result files; the sample comes from all of them.
        source: where the images lie.
        config: `pictures` says how many.
    """
    pictures: dict[str, bytes] = {}
    for file in files:
        if len(pictures) >= config.pictures:
            break
        table = read_table(output, file)
        table = table.filter(pc.is_null(table["error"])).slice(0, math.ceil(config.pictures / len(files)))
        for row in table.slice(0, config.pictures - len(pictures)).to_pylist():
            try:
                image = decode(source.read(row["path"]), config.ingest.max_pixels)
            except (OSError, UnreadableImageError) as error:
                log.warning("no picture of %s: %s", row["path"], error)  # it was there when the task read it
                continue
            png = cv2.imencode(".png", draw(image, row["predictions"]))[1]
            pictures[picture_name(row["path"])] = png.tobytes()
    return pictures


def draw(image: Image, predictions: list[dict[str, Any]]) -> Image:
    """Return a copy of a BGR image with its predictions: for a classification, a caption with the best class."""
    scale = max(1, min(math.ceil(SMALLEST_SIDE / min(image.shape[:2])), LARGEST_SIDE // max(image.shape[:2])))
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
