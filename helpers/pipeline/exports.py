"""Results in the formats of other tools, read from the table file by file: memory is that of one file.

    csv        one row per prediction, and one for each image without any
    coco       FOLDER/instances.json, a data set with scores, and FOLDER/detections.json, for pycocotools' loadRes
    yolo       FOLDER/data.yaml and FOLDER/labels/IMAGE.txt: class, center and size, or a mask's longest outline
    labelme    FOLDER/IMAGE.json: rectangles, polygons and points over the image where it lies
    fiftyone   FOLDER/metadata.json and FOLDER/samples.json, for fiftyone's LegacyFiftyOneDataset

Names of files follow those of the images below the source. Whatever an image is called, none leads out of the folder.
"""

import csv
import hashlib
import io
import json
import logging
import posixpath
import re
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import IO, Any, BinaryIO

import cv2
import numpy as np
import yaml

from helpers.config import Config
from helpers.errors import ConfigError, RunError
from helpers.images import rle
from helpers.images.drawing import DRAWN_SCORE
from helpers.pipeline.records import runs_of
from helpers.pipeline.results import ResultStore
from helpers.storage import Storage, open_storage
from helpers.storage.parquet import read_table
from helpers.storage.prefetch import map_each
from helpers.tasks.boxes import SIDES

COLUMNS = ["path", "width", "height", "error", "predictions", "model"]
CSV_COLUMNS = ["path", "width", "height", "model", "error", "class_id", "label", "score", *SIDES]
LABELME = "5.5.0"  # the version of its files
UNSAFE = re.compile(r'^\.\.|[\x00-\x1f\x7f\\:*?"<>|]')  # in a part of a path, on one system or another
LONGEST_NAME = 200  # bytes of a part of a path; file systems take 255

Row = dict[str, Any]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Selection:
    """Which predictions are exported."""

    classes: tuple[str, ...] = ()  # their labels, or numbers; empty for all
    min_score: float = 0.0  # the least
    model: str | None = None  # whose results, or how its name begins; None where there is one only, or for csv

    def predictions(self, row: Row) -> list[Row]:
        """Those of a row of results."""
        return [
            prediction
            for prediction in row["predictions"] or []
            if prediction["score"] >= np.float32(self.min_score)
            and (not self.classes or {prediction["label"], str(prediction["class_id"])} & set(self.classes))
        ]


def export_results(store: ResultStore, kind: str, target: str, selection: Selection, config: Config) -> dict[str, Any]:
    """Write results in a format, and return what was written: images, predictions, and where.

    Images with an error have no predictions; of the formats but csv, they are left out. Raises ConfigError if the
    selection is impossible, StorageError if a location cannot be used, and RunError if there are no results of that
    model, or their predictions have no boxes, which the format needs.
    """
    if kind not in ("csv", *WRITERS):
        raise ConfigError(f"there is no format {kind}; take csv, {', '.join(WRITERS)}")
    if not 0 <= selection.min_score <= 1:
        raise ConfigError("--min-score is not a number from 0 to 1")
    counts = {"images": 0, "predictions": 0}
    labels: set[str] = set()
    with store.as_files() as (files, _):
        rows = _rows(store, files, selection, kind == "csv", labels, counts)
        if kind == "csv":
            folder, _, name = target.rpartition("/")
            with open_storage(folder or ".", config).create(name) as file:
                _write_csv(rows, file)
        else:
            good = (row for row in rows if row["error"] is None)
            # Where the images of the recorded runs lie, the innermost first.
            roots = sorted(runs_of(store.storage, config)["source"].unique(), key=len, reverse=True)
            WRITERS[kind](good, open_storage(target, config), roots)
    if selection.classes and not counts["predictions"]:
        wanted, known = ", ".join(selection.classes), ", ".join(sorted(labels))
        log.warning("no prediction is of %s; the classes are %s", wanted, known)
    return {**counts, "format": kind, "to": target}


def _rows(
    store: ResultStore,
    files: list[str],
    selection: Selection,
    takes_all: bool,
    labels: set[str],
    counts: dict[str, int],
) -> Iterator[Row]:
    """The rows of the model, with the predictions selected; notes the labels of all, and counts."""
    model = None
    for table in map_each(partial(read_table, store.storage, columns=COLUMNS), files, store.storage.concurrent_reads):
        for batch in table.to_batches(max_chunksize=256):  # as Python's objects, rows are large
            for row in batch.to_pylist():
                if selection.model and not row["model"].startswith(selection.model):
                    continue
                model = model or row["model"]
                if row["model"] != model and not takes_all:
                    raise RunError(f"the results are of {model} and of {row['model']}; name one with --model")
                labels.update(map(_label, row["predictions"] or []))
                predictions = selection.predictions(row)
                counts["images"] += 1
                counts["predictions"] += len(predictions)
                yield {**row, "predictions": predictions}
    if model is None:
        which = f" of a model {selection.model}" if selection.model else ""
        raise RunError(f"there are no results{which} in {store.location}; name the --output of a run")


# ------------------------------------------------------------ formats


def _write_csv(rows: Iterator[Row], file: BinaryIO) -> None:
    text = io.TextIOWrapper(file, encoding="utf-8", newline="", write_through=True)
    writer = csv.writer(text)
    writer.writerow(CSV_COLUMNS)
    for row in rows:
        about = [row[name] for name in ("path", "width", "height", "model", "error")]
        for prediction in row["predictions"] or [{}]:
            values = [prediction.get(name) for name in ("class_id", "label", "score")]
            box = prediction.get("box") or {}
            writer.writerow([*about, *values, *(box.get(side) for side in SIDES)])
    text.detach()


def _write_coco(rows: Iterator[Row], storage: Storage, roots: list[str]) -> None:
    """Both files in one pass; images are numbered from 1, and a category's id is the class's number."""
    labels: dict[int, str] = {}
    with (
        storage.create("instances.json") as instances,
        storage.create("detections.json") as detections,
        tempfile.TemporaryFile() as kept,  # the annotations, until all images are written
    ):
        images = _List(instances, b'{"images":[')
        annotations, found = _List(kept, b'],"annotations":['), _List(detections, b"[")
        number = 0
        for identity, row in enumerate(rows, 1):
            size = {"width": row["width"], "height": row["height"]}
            images.add({"id": identity, "file_name": _relative(row["path"], roots), **size})
            for prediction in _boxed(row):
                number += 1
                labels[prediction["class_id"]] = _label(prediction)
                shape = {"image_id": identity, "category_id": prediction["class_id"], **_coco_shape(prediction)}
                found.add({**shape, "score": prediction["score"]})
                annotations.add({"id": number, "iscrowd": 0, **shape, "score": prediction["score"]})
        detections.write(b"]")
        kept.seek(0)
        shutil.copyfileobj(kept, instances)
        categories = [{"id": identity, "name": label} for identity, label in sorted(labels.items())]
        instances.write(b'],"categories":' + json.dumps(categories).encode() + b"}")


def _coco_shape(prediction: Row) -> Row:
    x1, y1, x2, y2 = (prediction["box"][side] for side in SIDES)
    shape: Row = {"bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1)}
    if prediction["mask"]:
        shape |= {"segmentation": prediction["mask"], "area": rle.area(prediction["mask"])}
    if prediction["keypoints"]:
        points = [(p["x"], p["y"], 2 if p["score"] >= DRAWN_SCORE else 0) for p in prediction["keypoints"]]
        visible = sum(point[2] > 0 for point in points)
        shape |= {"keypoints": [value for point in points for value in point], "num_keypoints": visible}
    return shape


def _write_yolo(rows: Iterator[Row], storage: Storage, roots: list[str]) -> None:
    """Without scores, because programs that train take a sixth column for an error."""
    labels: dict[int, str] = {}

    def files() -> Iterator[tuple[str, bytes]]:
        names = _Names(roots, ".txt")
        for row in rows:
            labels.update({p["class_id"]: _label(p) for p in row["predictions"]})
            lines = (_yolo_line(prediction, row["width"], row["height"]) for prediction in _boxed(row))
            yield f"labels/{names.of(row['path'])}", "".join(lines).encode()

    _write_all(storage, files())
    names = [labels.get(number, f"class {number}") for number in range(max(labels, default=-1) + 1)]
    content = {"path": ".", "train": "images", "val": "images", "names": names}
    storage.write("data.yaml", yaml.safe_dump(content, allow_unicode=True, sort_keys=False).encode())


def _yolo_line(prediction: Row, width: int, height: int) -> str:
    outlines = _outlines(prediction["mask"]) if prediction["mask"] else []
    if outlines:
        values = (outlines[0] / (width, height)).ravel().tolist()
    else:
        x1, y1, x2, y2 = (prediction["box"][side] for side in SIDES)
        values = [(x1 + x2) / 2 / width, (y1 + y2) / 2 / height, (x2 - x1) / width, (y2 - y1) / height]
    return f"{prediction['class_id']} {' '.join(f'{value:.6f}' for value in values)}\n"


def _write_labelme(rows: Iterator[Row], storage: Storage, roots: list[str]) -> None:
    names = _Names(roots, ".json")

    def content(row: Row) -> bytes:
        values = {
            "version": LABELME,
            "flags": {_label(p): True for p in row["predictions"][:1] if p["box"] is None},
            "shapes": [s for number, p in enumerate(row["predictions"]) for s in _labelme_shapes(p, number)],
            "imagePath": row["path"] if row["path"].startswith("/") else _relative(row["path"], roots),
            "imageData": None,
            "imageHeight": row["height"],
            "imageWidth": row["width"],
        }
        return json.dumps(values).encode()

    _write_all(storage, ((names.of(row["path"]), content(row)) for row in rows))


def _labelme_shapes(prediction: Row, number: int) -> Iterator[Row]:
    """A prediction's outlines, or else its box, and its keypoints; what is one object has one group."""
    if prediction["box"] is None:
        return
    about = {"label": _label(prediction), "description": f"{prediction['score']:.4f}", "group_id": number, "flags": {}}
    outlines = _outlines(prediction["mask"]) if prediction["mask"] else []
    for outline in outlines:
        yield {**about, "points": outline.tolist(), "shape_type": "polygon"}
    if not outlines:
        x1, y1, x2, y2 = (prediction["box"][side] for side in SIDES)
        yield {**about, "points": [[x1, y1], [x2, y2]], "shape_type": "rectangle"}
    for point in prediction["keypoints"] or []:
        yield {**about, "points": [[point["x"], point["y"]]], "shape_type": "point"}


def _write_fiftyone(rows: Iterator[Row], storage: Storage, roots: list[str]) -> None:
    """Detections with boxes in shares of the sides, outlines of their masks, keypoints, or one classification."""
    storage.write("metadata.json", json.dumps({"media_type": "image", "info": {}}).encode())
    with storage.create("samples.json") as file:
        samples = _List(file, b'{"samples":[')
        for row in rows:
            samples.add({"filepath": row["path"], "tags": [], **_fiftyone_fields(row)})
        file.write(b"]}")


def _fiftyone_fields(row: Row) -> Row:
    predictions, size = row["predictions"], np.array([row["width"], row["height"]], float)
    if predictions and predictions[0]["box"] is None:
        return {"prediction": {"_cls": "Classification", **_fiftyone_label(predictions[0])}}
    fields: dict[str, list[Row]] = {"detections": [], "polylines": [], "keypoints": []}
    for prediction in predictions:
        label = _fiftyone_label(prediction)
        x1, y1, x2, y2 = (prediction["box"][side] for side in SIDES)
        box = (np.array([[x1, y1], [x2 - x1, y2 - y1]]) / size).ravel().tolist()
        fields["detections"].append({"_cls": "Detection", **label, "bounding_box": box})
        if prediction["mask"]:
            outlines = [(outline / size).tolist() for outline in _outlines(prediction["mask"])]
            line = {"_cls": "Polyline", **label, "points": outlines, "closed": True, "filled": True}
            fields["polylines"].append(line)
        if points := prediction["keypoints"]:
            places = (np.array([[point["x"], point["y"]] for point in points]) / size).tolist()
            about = {"_cls": "Keypoint", "points": places, "confidence": [point["score"] for point in points]}
            fields["keypoints"].append({**about, "label": label["label"]})
    is_there = {name: items for name, items in fields.items() if items or name == "detections"}
    return {name: {"_cls": name.capitalize(), name: items} for name, items in is_there.items()}


def _fiftyone_label(prediction: Row) -> Row:
    return {"label": _label(prediction), "confidence": prediction["score"]}


WRITERS = {"coco": _write_coco, "yolo": _write_yolo, "labelme": _write_labelme, "fiftyone": _write_fiftyone}

# ------------------------------------------------------------ parts of them


class _List:
    """A list of JSON objects that is written one by one."""

    def __init__(self, file: IO[bytes], start: bytes):
        self._file, self._separator = file, b""
        file.write(start)

    def add(self, item: Row) -> None:
        self._file.write(self._separator + json.dumps(item, separators=(",", ":")).encode())
        self._separator = b",\n"


class _Names:
    """Names of files that follow the images' and that no two images share."""

    def __init__(self, roots: list[str], suffix: str):
        self._roots, self._suffix = roots, suffix
        self._taken: set[int] = set()  # hashes, which are small

    def of(self, path: str) -> str:
        """A name that cannot lead out of a folder, whatever the image is called.

        An image's own suffix goes, as the tools want it, but not what marks a video's frame or an archive's member.
        """
        relative = _relative(path, self._roots)
        if "#" not in relative:
            relative = posixpath.splitext(relative)[0]
        parts = [UNSAFE.sub("_", part) for part in relative.split("/") if part not in ("", ".")] or ["_"]
        name = "/".join(part.encode()[:LONGEST_NAME].decode(errors="ignore") for part in parts)
        if hash(name) in self._taken:  # x.jpg beside x.png
            name += f"-{hashlib.sha256(path.encode()).hexdigest()[:16]}"
        self._taken.add(hash(name))
        return name + self._suffix


def _write_all(storage: Storage, files: Iterator[tuple[str, bytes]]) -> None:
    """Write files of some names and contents, several at once where that means waiting."""
    for _ in map_each(lambda file: storage.write(*file), files, storage.concurrent_reads):
        pass


def _label(prediction: Row) -> str:
    return prediction["label"] or f"class {prediction['class_id']}"


def _relative(path: str, roots: list[str]) -> str:
    """An image's path below its source, as the data sets of other tools have it."""
    root = next((root.rstrip("/") for root in roots if path.startswith(f"{root.rstrip('/')}/")), None)
    return (path.rpartition("://")[2] if root is None else path[len(root) :]).lstrip("/")


def _boxed(row: Row) -> list[Row]:
    """A row's predictions, each of which has a box."""
    if any(prediction["box"] is None for prediction in row["predictions"]):
        raise RunError(f"{row['model']} predicts no boxes, which this format needs; take csv or fiftyone")
    return row["predictions"]


def _outlines(mask: rle.Mask) -> list[np.ndarray]:
    """The outer outlines of a mask, float `[N, 2]` each, in pixels of the image; the longest first."""
    pixels = rle.decode(mask).astype(np.uint8)
    outlines, _ = cv2.findContours(pixels, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    # A pixel's middle is half a pixel from its corner, from which boxes count.
    return [outline[:, 0] + 0.5 for outline in sorted(outlines, key=cv2.contourArea, reverse=True) if len(outline) > 2]
