"""Instances as COCO describes them: FOLDER/annotations.json and FOLDER/images.

A table holds one row per image, and Spark takes it too. It stays small, where Python's objects would take ten times the
file. Each mask is made when its image is read.
"""

import json
from array import array
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pycocotools import mask as coco_mask

from helpers.errors import DataError
from helpers.images import rle
from helpers.storage import open_storage

ANNOTATIONS = "annotations.json"
CORNERS = 3  # of a polygon, at least; pycocotools takes two for a box
FARTHEST = 2  # times the image's longer side: a polygon may reach beyond the image, a little


class Annotations(NamedTuple):
    """The content of a file of annotations.

    Attributes:
        table: `file` string, relative to the folder of images; `width` and `height` int32, pixels; `annotations`, a
            list of `label` int32, an index into `labels`, and `segmentation` string, COCO's own in JSON.
        labels: names of the categories in the order of their ids, which need not be without gaps.
    """

    table: pa.Table
    labels: tuple[str, ...]


def read_annotations(place: str, config: Any = None, empty: bool = False) -> Annotations:
    """Read FOLDER/annotations.json, and no image.

    Crowds (`iscrowd`) are left out, because one mask around many objects is the mask of none.

    Args:
        place: the folder, in a storage of any kind.
        config: how object storage is reached.
        empty: also give images without annotations; training learns little from them.

    Raises:
        DataError: the file is missing or is not COCO's, an annotation is of an image or a category that it lacks, or
            no image is annotated.
    """
    storage = open_storage(place, config)
    file, collector = storage.join(ANNOTATIONS), _Collector()
    try:
        content = storage.read(ANNOTATIONS)
    except OSError:
        raise DataError(
            f"{place} holds no scenes: it has neither {ANNOTATIONS}, COCO's instances, beside the folder images, nor "
            "shards, which write_shards makes"
        ) from None
    try:
        categories = sorted((c["id"], c["name"]) for c in json.loads(content, object_hook=collector.take)["categories"])
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise DataError(f"{file} is not a file of COCO's instances: {type(error).__name__}: {error}") from None
    labels = _positions(collector.categories, array("q", [number for number, _ in categories]), "category", file)
    table = collector.to_table(_positions(collector.owners, collector.images, "image", file), labels)
    annotated = pc.greater(pc.list_value_length(table["annotations"]), 0)
    if not pc.any(annotated).as_py():
        raise DataError(f"{file} has no annotated image: there is nothing to learn from it")
    return Annotations(table if empty else table.filter(annotated), tuple(name for _, name in categories))


def to_mask(segmentation: Any, height: int, width: int) -> np.ndarray:
    """Rasterize a segmentation as pycocotools does.

    Args:
        segmentation: polygons `[[x1, y1, x2, y2, ...], ...]`, or a run-length encoding with `size` and `counts`, a
            list or compressed.
        height: of the image.
        width: likewise.

    Returns:
        Bool `[height, width]`.

    Raises:
        ValueError: it is none of these, or of an image of another size; where it is of other types, TypeError.
    """
    if isinstance(segmentation, dict):
        if segmentation.get("size") != [height, width] or not isinstance(segmentation.get("counts"), str | list):
            raise ValueError(f"it is no run-length encoding of {height} rows and {width} columns")
        return rle.decode(segmentation)
    polygons = [np.array(polygon, float) for polygon in segmentation if len(polygon) >= 2 * CORNERS]
    # Pycocotools crashes on points far from the image.
    if not all((np.abs(polygon) <= FARTHEST * max(height, width)).all() for polygon in polygons):
        raise ValueError("a polygon has corners that are no numbers or far from the image")
    if not polygons:
        return np.zeros((height, width), bool)
    parts = coco_mask.frPyObjects([polygon.tolist() for polygon in polygons], height, width)
    return coco_mask.decode(coco_mask.merge(parts)).astype(bool)


class _Texts:
    """Texts one after the other in memory, as in Arrow."""

    def __init__(self) -> None:
        self.content, self.ends = bytearray(), array("q", [0])

    def append(self, text: str) -> None:
        self.content += text.encode()
        self.ends.append(len(self.content))

    def to_arrow(self) -> pa.Array:
        buffers = [None, pa.py_buffer(self.ends), pa.py_buffer(self.content)]
        return pa.Array.from_buffers(pa.large_string(), len(self.ends) - 1, buffers)


class _Collector:
    """Takes images and annotations from the parser one by one, so that few are in memory at a time."""

    def __init__(self) -> None:
        self.images, self.widths, self.heights, self.files = array("q"), array("i"), array("i"), _Texts()
        self.owners, self.categories, self.segmentations = array("q"), array("q"), _Texts()

    def take(self, parsed: dict[str, Any]) -> dict[str, Any] | None:
        if "image_id" in parsed:
            if not parsed.get("iscrowd"):
                self.owners.append(parsed["image_id"])
                self.categories.append(parsed["category_id"])
                self.segmentations.append(json.dumps(parsed["segmentation"], separators=(",", ":")))
            return None
        if "file_name" in parsed:
            self.images.append(parsed["id"])
            self.widths.append(parsed["width"])
            self.heights.append(parsed["height"])
            self.files.append(parsed["file_name"])
            return None
        return parsed

    def to_table(self, owners: np.ndarray, labels: np.ndarray) -> pa.Table:
        order = np.argsort(owners, kind="stable")  # an image's annotations together, in the order of the file
        ends = np.cumsum(np.bincount(owners, minlength=len(self.images)))
        annotations = [pa.array(labels[order].astype(np.int32)), self.segmentations.to_arrow().take(pa.array(order))]
        grouped = pa.ListArray.from_arrays(
            pa.array(np.concatenate([[0], ends]).astype(np.int32)),
            pa.StructArray.from_arrays(annotations, names=["label", "segmentation"]),
        )
        sides = [pa.array(np.array(side, np.int32)) for side in (self.widths, self.heights)]
        return pa.table([self.files.to_arrow(), *sides, grouped], names=["file", "width", "height", "annotations"])


def _positions(ids: array, known: array, what: str, file: str) -> np.ndarray:
    """The index of each number in `known`, int64."""
    numbers = np.array(ids, np.int64)
    positions = pc.index_in(pa.array(numbers), pa.array(np.array(known, np.int64)))
    if positions.null_count:
        missing = numbers[np.flatnonzero(positions.is_null())[0]]
        raise DataError(
            f"{file}: an annotation is of {what} {missing}, which the file does not describe; add it, or leave the "
            "annotation out"
        )
    return positions.to_numpy().astype(np.int64)
