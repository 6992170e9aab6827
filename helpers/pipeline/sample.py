"""Pictures of a sample of a run's images, beside its results."""

import contextlib
import logging
import math
from collections.abc import Iterator
from typing import Any

import cv2
import pyarrow as pa
import pyarrow.compute as pc

from helpers.config import Config
from helpers.errors import StorageError, only_warn
from helpers.images.archive import split_member
from helpers.images.boundary import UnreadableImageError
from helpers.images.decoding import decode
from helpers.images.drawing import draw, picture_name
from helpers.images.video import split_path
from helpers.pipeline.folders import PICTURES
from helpers.pipeline.rows import is_in
from helpers.pipeline.stages import read_images
from helpers.storage import Storage
from helpers.storage.interface import Files
from helpers.storage.parquet import read_table

log = logging.getLogger(__name__)

BYTES_PER_PIXEL = 32  # of a picture while it is drawn: decoded, enlarged, masked and encoded
SHOWN = 100  # pictures on a dashboard, at most


def draw_sample(output: Storage, files: list[str], source: Files, config: Config) -> list[str]:
    """Annotate a sample of a run's images and write the PNG files; return their names.

    An image that has changed since it was worked on, or cannot be drawn, costs its picture and a warning.

    Args:
        output: the run's output.
        files: the run's result files; the sample comes from all of them.
        source: where the images lie.
        config: `pictures` says how many; one takes at most about `inference.memory_megabytes`.
    """
    names: list[str] = []
    max_pixels = config.inference.memory_megabytes * 2**20 // BYTES_PER_PIXEL
    for file in files:
        if len(names) >= config.pictures:
            break
        with only_warn(f"no pictures of the images in {file}"):
            table = read_table(output, file)
            count = min(math.ceil(config.pictures / len(files)), config.pictures - len(names))
            rows = {
                path: row for path, row in _first_rows(table, count).items() if _can_be_drawn(row, source, max_pixels)
            }
            batches = pa.Table.from_pylist(list(rows.values()), table.schema).to_batches()
            limits = config.max_image_bytes, config.ingest.max_pixels
            for batch in read_images(batches, source, 1, 1, *limits):
                (image,) = batch.to_pylist()
                with only_warn(f"no picture of {image['path']}"):
                    png = _draw(image, rows[image["path"]])
                    output.write(f"{PICTURES}/{picture_name(image['path'])}", png)
                    names.append(picture_name(image["path"]))
    return names


def read_pictures(output: Storage, names: list[str]) -> Iterator[tuple[str, bytes]]:
    """The first pictures for a dashboard, one at a time: name and PNG file."""
    for name in names[:SHOWN]:
        yield name, output.read(f"{PICTURES}/{name}")


def _first_rows(table: pa.Table, count: int) -> dict[str, dict[str, Any]]:
    """By path, one row of each of the first images, with the predictions of all models."""
    table = table.filter(pc.is_null(table["error"]))
    rows: dict[str, dict[str, Any]] = {}
    for row in table.filter(is_in(table["path"], table["path"].unique().slice(0, count))).to_pylist():
        first = rows.setdefault(row["path"], row)
        if first is not row:
            first["predictions"] += row["predictions"]
    return rows


def _can_be_drawn(row: dict[str, Any], source: Files, max_pixels: int) -> bool:
    """Whether an image is small enough and its file still is the one that was worked on; the log says why not."""
    file, member = split_member(split_path(row["path"])[0])
    why = "its file has changed meanwhile, is gone or cannot be read"
    if row["width"] * row["height"] > max_pixels:
        why = f"it has {row['width']} x {row['height']} pixels, more than inference.memory_megabytes is enough for"
    else:
        with contextlib.suppress(StorageError, OSError):
            entry = source.stat(file)
            length = row["length"] if member is None else entry.length
            if (entry.length, entry.modified) == (length, row["modified"]):
                return True
    log.warning("no picture of %s: %s", row["path"], why)
    return False


def _draw(image: dict[str, Any], row: dict[str, Any]) -> bytes:
    """A PNG file of an image (`IMAGE_SCHEMA`) with its row's predictions."""
    width, height = row["width"], row["height"]
    if image["error"] is not None:
        raise UnreadableImageError(image["error"])
    pixels = decode(image["content"], max_pixels=width * height)
    if pixels.shape[:2] != (height, width):
        raise UnreadableImageError(f"it does not have the {width} x {height} pixels of its row any more")
    return cv2.imencode(".png", draw(pixels, row["predictions"]))[1].tobytes()
