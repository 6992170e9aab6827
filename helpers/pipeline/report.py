"""What people look at: the page of results, `OUTPUT/report/index.html`, and pictures, `OUTPUT/pictures`.

The page shows what runs did, and a sample of the images with their predictions. All rows, or the newest ones, are
counted (`helpers.pipeline.survey`). Only those of the sample are read whole, and only its images at all.
"""

import base64
import contextlib
import json
import logging
import math
import os
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from functools import partial
from typing import Any

import cv2
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from helpers.config import Config
from helpers.errors import RunError, StorageError, first_line, only_warn
from helpers.images import rle
from helpers.images.archive import split_member
from helpers.images.boundary import UnreadableImageError, attempt
from helpers.images.decoding import Image, decode_reduced
from helpers.images.drawing import DRAWN_SCORE, draw, picture_name
from helpers.images.spec import InputSpec
from helpers.images.video import split_path
from helpers.pipeline.folders import PICTURES, REPORT
from helpers.pipeline.reading import read_images
from helpers.pipeline.records import PHASES, runs_of, tasks_of
from helpers.pipeline.results import ResultStore
from helpers.pipeline.rows import is_in
from helpers.pipeline.schemas import KEY_NAMES
from helpers.pipeline.survey import BANDS, Outputs, Survey
from helpers.pipeline.task import STAGES
from helpers.redaction import redact
from helpers.storage import Storage, open_storage
from helpers.storage.interface import Files
from helpers.storage.parquet import read_table
from helpers.tracking.page import render

log = logging.getLogger(__name__)

BYTES_PER_PICTURE_PIXEL = 32  # of a picture while it is drawn: decoded, enlarged, masked and encoded
PICTURES_SHOWN = 100  # on a dashboard, at most

PAGE = f"{REPORT}/index.html"
COLUMNS = [*KEY_NAMES, "width", "height", "error", "predictions", "model"]
ERRORS_SHOWN = RUNS_SHOWN = 30
TASKS_SHOWN = 2000
PREDICTIONS_SHOWN = 100  # of an image, the most probable

THUMBNAIL_BYTES = 5_500_000  # of all JPEG files; in the page a third more
PREDICTION_BYTES = 1_500_000  # of all predictions in the page, about
PREDICTION_LENGTH, NUMBER_LENGTH = 48, 7  # bytes of one without mask and keypoints, and of a keypoint's number
READING_SECONDS = 60  # for all thumbnails: a distant storage must not hold up the end of a run
LONGEST_MASK = 20_000  # bytes of an encoded one; it takes a microsecond to read two or three
BYTES_PER_PIXEL = 0.2  # of a JPEG file, about
LONGEST = 224, 960  # pixels of a thumbnail's longer side, at least and at most
# Share of a thumbnail's sides, and quality of JPEG: the first whose file is short enough; noise makes long ones.
ATTEMPTS = (1, 82), (1, 60), (1, 40), (0.5, 60), (0.25, 60)

NUMBERS = ("images", "failed", "images per second", "seconds", "slots", "retries")
RUN_COLUMNS = [["started", ""], *([name, "number"] for name in NUMBERS), ["source", ""], ["model", ""]]

Row = dict[str, Any]
Thumbnail = tuple[str | None, str | None]  # a `data:` URI, or why there is none


def make_report(
    store: ResultStore,
    config: Config,
    against: ResultStore | None = None,
    sources: Iterable[Storage] = (),
    most_rows: int | None = None,
) -> str:
    """Write the page of an output, and return its location.

    `against` are the results of another output, shown beside these where both have an image. Images lie in the
    `sources`, and in places that the records of runs name. The newest rows are counted, so many at most; by default
    all. Raises RunError if there are no results, and StorageError if a location cannot be used.
    """
    stores = [store] if against is None else [store, against]
    runs = [runs_of(one.storage, config) for one in stores]
    with contextlib.ExitStack() as stack:
        parts = [stack.enter_context(one.as_files(most_rows)) for one in stores]
        outputs = [(one.storage, files) for one, (files, _) in zip(stores, parts, strict=True)]
        survey = Survey(outputs)
        for number, one in enumerate(stores):
            if not any(side.store == number for side in survey.sides):
                raise RunError(f"no run has results in {one.output}; name the --output of one")
        sample = _sample(survey, outputs, config, [*sources, *_sources(pd.concat(runs), config)])
    is_whole = all(are_all for _, are_all in parts)
    page = render(_data(survey, stores, is_whole, runs[0], sample))
    store.storage.write(PAGE, page)
    return store.storage.join(PAGE)


# ------------------------------------------------------------ the sample


def _sample(survey: Survey, outputs: Outputs, config: Config, sources: list[Storage]) -> list[Row]:
    """The images of the sample: path, thumbnail or why there is none, and of each side a row or None."""
    chosen = survey.choose(config.report)
    stores = [side.store for side in survey.sides]
    rows: dict[str, dict[int, Row]] = {}
    for (side, file), part in chosen.groupby(["side", "file"]):
        storage, files = outputs[stores[side]]
        table = read_table(storage, files[file], COLUMNS)
        for row in table.take(np.sort(part["row"].to_numpy())).to_pylist():
            rows.setdefault(row["path"], {})[side] = row
    share = max(1, len(rows))
    good = [next((row for row in of_sides.values() if row["error"] is None), None) for of_sides in rows.values()]
    thumbnails = _thumbnails([row for row in good if row], config, sources, THUMBNAIL_BYTES // share)
    items = []
    for path, of_sides in rows.items():
        thumbnail, missing = thumbnails.get(path, (None, None))
        limit = PREDICTION_BYTES // share // len(of_sides)
        shown = {side: _shown(row, survey.classes, limit) for side, row in of_sides.items()}
        sides = [shown.get(side) for side in range(len(survey.sides))]
        items.append({"path": redact(path), "thumbnail": thumbnail, "missing": missing, "rows": sides})
    return items


def _thumbnails(rows: list[Row], config: Config, sources: list[Storage], limit: int) -> dict[str, Thumbnail]:
    """The thumbnail of each image by its path; files are read as many at once as there are processors."""
    side = round(min(max(math.sqrt(limit / BYTES_PER_PIXEL * 4 / 3), LONGEST[0]), LONGEST[1]))
    files: dict[str, list[Row]] = {}
    for row in rows:
        files.setdefault(split_member(split_path(row["path"])[0])[0], []).append(row)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        end = time.monotonic() + READING_SECONDS
        make = partial(_thumbnails_of_file, config=config, sources=sources, side=side, limit=limit, end=end)
        parts = pool.map(make, files, files.values())
        return {path: thumbnail for part in parts for path, thumbnail in part.items()}


def _thumbnails_of_file(
    file: str, rows: list[Row], config: Config, sources: list[Storage], side: int, limit: int, end: float
) -> dict[str, Thumbnail]:
    """Thumbnails of one image, or of those in one video or archive."""
    roots = {source.root.rstrip("/"): source for source in sources}
    source = next((roots[root] for root in roots if file == root or file.startswith(f"{root}/")), None)
    if source is None:
        return {row["path"]: (None, "no recorded run says where this image lies") for row in rows}
    by_path, thumbnails = {row["path"]: row for row in rows}, dict[str, Thumbnail]()
    keys = pa.Table.from_pylist([{name: row[name] for name in KEY_NAMES} for row in rows]).to_batches()
    limits = config.max_image_bytes, config.ingest.max_pixels
    missing = "reading the images took too long"
    try:
        for batch in read_images(keys, source, 1, 1, *limits) if time.monotonic() < end else ():
            (image,) = batch.to_pylist()
            thumbnails[image["path"]] = attempt(_thumbnail, image, by_path[image["path"]], side, limit)
            if time.monotonic() >= end:
                break
    except Exception as error:  # such as a refused credential: the page is worth having without pictures
        missing = first_line(error)
    return dict.fromkeys(by_path, (None, missing)) | thumbnails


def _thumbnail(image: Row, row: Row, side: int, limit: int) -> str:
    """A JPEG file of an image (`IMAGE_SCHEMA`) as a `data:` URI."""
    size = row["width"], row["height"]
    shorter = min(_fitted(size, side))
    pixels = _decode(image, row, InputSpec(shorter, shorter, "bgr", (), (), scaled_decoding=1.0))
    for share, quality in ATTEMPTS:
        fitted = _fitted(size, round(share * side))
        # Linear takes a fifth of the time, and up to a half of the size it passes no pixel over.
        interpolation = cv2.INTER_LINEAR if pixels.shape[1] <= 2 * fitted[0] else cv2.INTER_AREA
        small = cv2.resize(pixels, fitted, interpolation=interpolation)
        encoded = cv2.imencode(".jpg", small, [cv2.IMWRITE_JPEG_QUALITY, quality])[1].tobytes()
        if len(encoded) <= limit:
            return f"data:image/jpeg;base64,{base64.b64encode(encoded).decode()}"
    raise UnreadableImageError("its thumbnail would be too long for this page")


def _fitted(size: tuple[int, int], longest: int) -> tuple[int, int]:
    """Width and height, made so small that the longer one is no more than that."""
    scale = min(1.0, longest / max(size))
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def _shown(row: Row, classes: dict[str, int], limit: int) -> Row:
    """A row as the page shows it, in no more bytes than the limit, about; what is most probable comes first."""
    found = sorted(row["predictions"] or [], key=lambda prediction: -_finite(prediction["score"]))
    shown: list[list[Any]] = []
    masks_left_out = 0
    for prediction in found[:PREDICTIONS_SHOWN]:
        box = prediction["box"] and [_finite(prediction["box"][name], 1) for name in ("x1", "y1", "x2", "y2")]
        points = [_finite(point[name], 2) for point in prediction["keypoints"] or [] for name in ("x", "y", "score")]
        number = classes[prediction["label"] or f"class {prediction['class_id']}"]
        limit -= PREDICTION_LENGTH + NUMBER_LENGTH * len(points)
        if limit < 0 and shown:
            break
        mask = _fitting(prediction["mask"], limit)
        limit -= len(mask["counts"]) if mask else 0
        masks_left_out += mask is None and prediction["mask"] is not None
        shown.append([number, _finite(prediction["score"], 4), box, mask, points or None])
    return {
        "width": row["width"],
        "height": row["height"],
        "error": row["error"] and redact(row["error"]),
        "left_out": len(found) - len(shown) + masks_left_out,
        "predictions": shown,
    }


def _finite(value: float | None, digits: int = 6) -> float:
    return round(value, digits) if value is not None and math.isfinite(value) else 0.0


def _fitting(mask: rle.Mask | None, limit: int) -> rle.Mask | None:
    """A mask in no more bytes than the limit, at the size of a thumbnail if need be, or None."""
    if mask is None or len(mask["counts"]) > LONGEST_MASK:
        return None
    if len(mask["counts"]) > limit:
        mask = attempt(rle.reduce, mask, LONGEST[0])[0]
    return mask if mask and len(mask["counts"]) <= limit else None


# ------------------------------------------------------------ what the page is told


def _data(survey: Survey, stores: list[ResultStore], is_whole: bool, runs: pd.DataFrame, items: list[Row]) -> Row:
    """What `page.js` reads."""
    outputs = [redact(store.output.rstrip("/")) for store in stores]
    names, first = _names(survey, outputs), survey.sides[0]
    newest, images = runs.iloc[-1] if len(runs) else None, first.images
    which = f"All {images:,}" if is_whole else f"The newest {images:,} (`python -m helpers report` counts all)"
    tiles: list[list[Any]] = [["images", images], ["failed", first.errors.total(), "bad" if first.errors else ""]]
    for side, name in zip(survey.sides, names, strict=True):
        tiles.append([f"predictions{f' of {name}' if len(names) > 1 else ''}", side.predictions])
    if len(names) > 1:
        common, differing = survey.differing()
        tiles += [["images in both", common], ["of these with other classes", differing]]
    if newest is not None:
        cells = dict(zip([name for name, _ in RUN_COLUMNS], _run_cells(newest), strict=True))
        tiles += [[name, cells[name]] for name in ("images per second", "seconds")]
    tasks = pd.DataFrame() if newest is None else tasks_of(stores[0].storage, newest).sort_values("begin")
    part = f", {TASKS_SHOWN:,} of them shown" if len(tasks) > TASKS_SHOWN else ""
    task_text = f"{len(tasks):,} tasks{part}; those with failed images in red"
    errors = [
        {"side": number, "reason": redact(reason), "count": count, "examples": list(map(redact, side.examples[reason]))}
        for number, side in enumerate(survey.sides)
        for reason, count in side.errors.most_common(ERRORS_SHOWN)
    ]
    return {
        "title": outputs[0].rpartition("/")[2],
        "subtitle": " against ".join(outputs),
        "footer": f"Written {datetime.now(UTC):%Y-%m-%d %H:%M} UTC; charts by Vega-Lite (BSD 3-Clause)",
        "counted": f"{which} images. Every prediction with a box counts, and of a classification the best.",
        "shown_score": DRAWN_SCORE,
        "bands": BANDS,
        "classes": list(survey.classes),
        "pair": list(survey.pair) if len(stores) > 1 else None,
        "tiles": tiles,
        "sides": [
            {"name": name, "boxed": side.is_boxed, "counts": [[n, bands.tolist()] for n, bands in side.counts.items()]}
            for side, name in zip(survey.sides, names, strict=True)
        ],
        "sample": {
            "total": images,
            "text": f"A sample of {len(items):,}, chosen by class, score and error. The arrow keys turn the pages.",
            "items": items,
        },
        "errors": errors,
        "run_text": "" if newest is None else f"The newest run, {newest['run']}, of {newest['model']}.",
        "stages": [{"stage": name, "seconds": float(tasks[f"{name}_seconds"].sum())} for name in STAGES if len(tasks)],
        "tasks": {"text": task_text if len(tasks) else "", "rows": _task_rows(tasks)},
        "run_columns": RUN_COLUMNS,
        "runs": [_run_cells(run) for _, run in runs[::-1][:RUNS_SHOWN].iterrows()],
        "settings": [] if newest is None else _settings(newest),
    }


def _names(survey: Survey, outputs: list[str]) -> list[str]:
    """What the page calls the sides: their models, with the outputs where these alone tell them apart."""
    models = [side.model for side in survey.sides]
    for names in ([model.partition("@")[0] for model in models], models):
        if len(set(names)) == len(names):
            return names
    tails = [output.rpartition("/")[2] for output in outputs]
    tails = tails if len(set(tails)) == len(tails) else ["this", "other"]
    return [f"{tails[side.store]}: {side.model}" for side in survey.sides]


def _sources(runs: pd.DataFrame, config: Config) -> list[Storage]:
    """Where the runs' images lie, the innermost first; what is no location, such as a table, is left out."""
    places = []
    for uri in runs["source"].unique():
        with contextlib.suppress(StorageError):
            places.append(open_storage(uri, config))
    return sorted(places, key=lambda place: -len(place.root))


def _task_rows(tasks: pd.DataFrame) -> list[Row]:
    return [
        {
            "worker": f"{task.host} {task.process}",
            "begin": round(task.begin, 3),
            "end": round(task.end, 3),
            "images": task.images,
            "failed": task.failed > 0,
        }
        for task in tasks.iloc[:: -(-len(tasks) // TASKS_SHOWN) or 1].itertuples()
    ]


def _run_cells(run: pd.Series) -> list[Any]:
    """A row of the table of runs, as `RUN_COLUMNS` says."""
    passed = run["pass_seconds"]
    # A run that writes the page has not ended yet.
    seconds = np.nansum(run[PHASES[1:-1]].to_numpy(float)) if pd.isna(run["seconds"]) else run["seconds"]
    return [
        f"{run['started']:%Y-%m-%d %H:%M}",
        run["images"],
        run["failed"],
        run["images"] / passed if passed > 0 else None,
        float(seconds),
        run["slots"],
        run["retries"],
        redact(run["source"]),
        run["model"],
    ]


def _settings(run: pd.Series) -> list[list[str]]:
    """Names and values of a run's settings, and its versions, without secrets."""
    (flat,) = pd.json_normalize({**run["config"], "versions": run["versions"]}, max_level=1).to_dict("records")
    return [[str(name), redact(json.dumps(value))] for name, value in flat.items()]


# ------------------------------------------------------------ pictures


def draw_sample(output: Storage, files: list[str], source: Files, config: Config) -> list[str]:
    """Annotate a sample of the images in a run's result files and write the PNG files; return their names.

    `pictures` says how many; one takes at most about `inference.memory_megabytes`. An image that has changed since it
    was worked on, or cannot be drawn, costs its picture and a warning.
    """
    names: list[str] = []
    max_pixels = config.inference.memory_megabytes * 2**20 // BYTES_PER_PICTURE_PIXEL
    for file in files:
        if len(names) >= config.pictures:
            break
        with only_warn(f"no pictures of the images in {file}"):
            table = read_table(output, file)
            count = min(math.ceil(config.pictures / len(files)), config.pictures - len(names))
            rows = _first_rows(table, count)
            rows = {path: row for path, row in rows.items() if _can_be_drawn(row, source, max_pixels)}
            batches = pa.Table.from_pylist(list(rows.values()), table.schema).to_batches()
            for batch in read_images(batches, source, 1, 1, config.max_image_bytes, config.ingest.max_pixels):
                (image,) = batch.to_pylist()
                with only_warn(f"no picture of {image['path']}"):
                    row, name = rows[image["path"]], picture_name(image["path"])
                    picture = draw(_decode(image, row, InputSpec(0, 0, "bgr", (), ())), row["predictions"])
                    output.write(f"{PICTURES}/{name}", cv2.imencode(".png", picture)[1].tobytes())
                    names.append(name)
    return names


def read_pictures(output: Storage, names: list[str]) -> Iterator[tuple[str, bytes]]:
    """The first pictures for a dashboard, one at a time: name and PNG file."""
    for name in names[:PICTURES_SHOWN]:
        yield name, output.read(f"{PICTURES}/{name}")


def _first_rows(table: pa.Table, count: int) -> dict[str, Row]:
    """By path, one row of each of the first images, with the predictions of all models."""
    table = table.filter(pc.is_null(table["error"]))
    rows: dict[str, Row] = {}
    for row in table.filter(is_in(table["path"], table["path"].unique().slice(0, count))).to_pylist():
        first = rows.setdefault(row["path"], row)
        if first is not row:
            first["predictions"] += row["predictions"]
    return rows


def _can_be_drawn(row: Row, source: Files, max_pixels: int) -> bool:
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


def _decode(image: Row, row: Row, spec: InputSpec) -> Image:
    """The pixels of an image (`IMAGE_SCHEMA`), which must have its row's size still."""
    width, height = row["width"], row["height"]
    if image["error"] is not None:
        raise UnreadableImageError(image["error"])
    pixels, size = decode_reduced(image["content"], spec, max_pixels=width * height)
    if size != (width, height):
        raise UnreadableImageError(f"it does not have the {width} x {height} pixels of its row any more")
    return pixels
