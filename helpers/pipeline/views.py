"""What models look at where that is not one whole image after the other: a *view*, such as a tile or a crop.

Images are decoded once, however many models and views there are. A view is a row of the stages, as an image is where
there is nothing else; `join` makes one row per image of them again. Executors import this module.
"""

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa

from helpers import tasks
from helpers.bundle.manifest import Manifest
from helpers.images.boundary import attempt
from helpers.images.decoding import Image, decode, fit
from helpers.images.enlargement import Window
from helpers.images.headers import Size
from helpers.images.spec import InputSpec
from helpers.memory import bounded
from helpers.pipeline.schemas import KEY, KEY_NAMES, RESULT_SCHEMA, Batches
from helpers.pipeline.stages import tensor_batch
from helpers.tasks.tiling import merge, shift, tiles

HELD_BYTES, HELD_IMAGES = 64 * 2**20, 1024  # decoded, that several models look at in turn
NO_VIEW = "there is nothing to look at"  # never in a row of the results
NMS_THRESHOLD = 0.5  # for the duplicates of two tiles, where the model's own decoder needs none


Rows = list[dict[str, Any]]  # of `RESULT_SCHEMA`


@dataclass(frozen=True)
class Tiling:
    """Which images are cut into tiles of the size of the model's input: those with a side `factor` times as long.

    `overlap` is the share of a tile's side that its neighbor has too.
    """

    factor: float
    overlap: float


@dataclass(frozen=True)
class Cascade:
    """Which detections a second model looks at: the `max_crops` best of an image, with `min_score` at least.

    `padding` is added to each side of a box, as a share of the box's side.
    """

    min_score: float
    padding: float
    max_crops: int


@dataclass(frozen=True)
class Views:
    """An image with its views."""

    key: dict[str, Any]  # its columns of `KEY`
    size: Size | None  # width and height; None where it could not be decoded ...
    error: str | None  # ... and why
    pixels: Image | None  # uint8 BGR `[height, width, 3]`; None where there are none, or they are not needed any more
    windows: Sequence[Window]  # where the views are; there may be none
    # From what `tasks.predict` returns for the views, in their order, to that for the image.
    merge: Callable[[list[Any]], Any]


def decode_each(batches: Batches, max_pixels: int, memory_megabytes: int | None = None) -> Iterator[Views]:
    """Decode the images of `IMAGE_SCHEMA` one at a time; each has one view, which is the whole.

    Images with more pixels, or that would take this process beyond its memory, are not decoded.
    """
    for batch in batches:
        keys = batch.select([*KEY_NAMES, "error"]).to_pylist()
        for key, content in zip(keys, batch["content"], strict=True):
            error, pixels = key.pop("error"), None
            if error is None:
                with bounded(memory_megabytes) as left:
                    pixels, error = attempt(decode, memoryview(content.as_buffer()).cast("B"), max_pixels, left)
            size = None if pixels is None else (pixels.shape[1], pixels.shape[0])
            yield Views(key, size, error, pixels, [(0, 0, *size)] if size else [], lambda parts: parts[0])


def tile_each(
    images: Iterable[Views], manifest: Manifest, parameters: Mapping[str, Any], tiling: Tiling
) -> Iterator[Views]:
    """Cut images that are large against a model's input into tiles; each comes with the whole as its view.

    The filters among the post-processing's parameters are for the merged predictions.
    """
    tile = manifest.input.width, manifest.input.height

    def cut(views: Views) -> Views:
        size, windows = views.size, views.windows
        if size is None:
            return views
        if any(side > tiling.factor * length for side, length in zip(size, tile, strict=True)):
            windows = tiles(size, tile, tiling.overlap)

        def merge_tiles(parts: list[Any]) -> Any:
            merged = parts[0]
            if len(parts) > 1:
                threshold = parameters.get("nms_threshold", NMS_THRESHOLD)
                merged = merge(manifest.task, list(zip(windows, parts, strict=True)), size, threshold)
            return tasks.apply_filters(merged, size, manifest, parameters)

        return replace(views, windows=windows, merge=merge_tiles)

    return map(cut, images)  # which, unlike a loop, holds no image while the next is decoded


def crop_each(
    images: Iterable[Views], rows: Rows, manifest: Manifest, parameters: Mapping[str, Any], cascade: Cascade
) -> Iterator[Views]:
    """The detections of one model, from the rows of the images, as the views of another.

    Manifest and parameters are the second model's; filters among these are for the merged predictions.
    """

    def crop(views: Views, row: dict[str, Any]) -> Views:
        size = views.size
        if size is None:
            return views
        boxed = [p for p in row["predictions"] or () if p["box"] and p["score"] >= cascade.min_score]
        boxed = sorted(boxed, key=lambda p: -p["score"])[: cascade.max_crops]
        windows = [_around(p["box"], cascade.padding, size) for p in boxed]

        def merge_crops(parts: list[Any]) -> list[dict[str, Any]]:
            if manifest.task == "classification":  # the best class of each crop, where the detection is
                merged = [{**part[0], "box": one["box"]} for one, part in zip(boxed, parts, strict=True) if part]
            else:
                merged = [p for window, part in zip(windows, parts, strict=True) for p in shift(part, window, size)]
            return tasks.apply_filters(merged, size, manifest, parameters)

        return replace(views, error=row["error"], windows=windows, merge=merge_crops)

    return map(crop, images, rows)


def _around(box: dict[str, float], padding: float, size: Size) -> Window:
    """The pixels of a box and so much more on each side, one at least, within the image."""
    ends = []
    for axis, side in zip("xy", size, strict=True):
        start, end = box[f"{axis}1"], box[f"{axis}2"]
        more = padding * (end - start)
        first = min(max(0, math.floor(start - more)), side - 1)
        ends.append((first, max(first + 1, min(side, math.ceil(end + more)))))
    (left, right), (top, bottom) = ends
    return left, top, right, bottom


def in_groups(images: Iterable[Views]) -> Iterator[list[Views]]:
    """Lists of `HELD_IMAGES`, or about `HELD_BYTES` of pixels; to be emptied before the next is asked for."""
    group: list[Views] = []
    held = 0
    for views in images:
        group.append(views)
        held += 0 if views.pixels is None else views.pixels.nbytes
        del views  # else it takes memory while the next is decoded
        if held >= HELD_BYTES or len(group) == HELD_IMAGES:
            yield group
            group, held = [], 0
    if group:
        yield group


def preprocess_views(
    images: Iterable[Views], spec: InputSpec, max_views: int, memory_megabytes: int | None
) -> Iterator[pa.RecordBatch]:
    """Views to the model's input; of an image without any view there is one row, with an error.

    Yields:
        `TENSOR_SCHEMA`, one row per view, with the view's size; a batch has `max_views` at most.
    """
    rows: list[tuple[dict[str, Any], Size | None, str | None, np.ndarray | None]] = []
    for views in images:
        windows: Sequence[Window | None] = views.windows or [None]
        for window in windows:
            rows.append((views.key, *_fit(views, window, spec, memory_megabytes)))
            if len(rows) == max_views:
                yield _batch(rows)
                rows = []
        del views  # else it takes memory while the next is decoded
    if rows:
        yield _batch(rows)


def _fit(
    views: Views, window: Window | None, spec: InputSpec, memory_megabytes: int | None
) -> tuple[Size | None, str | None, np.ndarray | None]:
    """A view's size, or why it cannot be looked at, and the model's input."""
    if window is None or views.pixels is None:
        return None, views.error or NO_VIEW, None
    left, top, right, bottom = window
    with bounded(memory_megabytes):
        pixels, error = attempt(fit, views.pixels[top:bottom, left:right], spec)
    return (None, error, None) if pixels is None else ((right - left, bottom - top), None, pixels)


def _batch(rows: list[tuple[dict[str, Any], Size | None, str | None, np.ndarray | None]]) -> pa.RecordBatch:
    keys, sizes, errors, inputs = zip(*rows, strict=True)
    batch = pa.RecordBatch.from_pylist(keys, schema=pa.schema(KEY))
    good = [pixels for pixels in inputs if pixels is not None]
    return tensor_batch(batch, sizes, errors, np.stack(good) if good else np.zeros((0, 0), np.uint8))


def remember(images: Iterable[Views], waiting: "deque[Views]") -> Iterator[Views]:
    """Pass images on, and remember them in order for `join`, without their pixels."""

    def note(views: Views) -> Views:
        waiting.append(replace(views, pixels=None))
        return views

    return map(note, images)


def join(results: Batches, waiting: "deque[Views]") -> Iterator[Rows]:
    """Rows of views to rows of their images, in order, as many at a time as are finished.

    The images of the views are `waiting`, as `remember` leaves them, until their rows are made. What goes wrong with a
    view is its image's error.
    """
    parts: Rows = []
    for batch in results:
        finished = []
        for part in batch.to_pylist():
            parts.append(part)
            if len(parts) == max(1, len(waiting[0].windows)):
                finished.append(_row(waiting.popleft(), parts))
                parts = []
        yield finished


def _row(views: Views, parts: Rows) -> dict[str, Any]:
    error = views.error
    if views.windows:
        error = next((part["error"] for part in parts if part["error"] is not None), None)
    column = "predictions" if parts[0]["embedding"] is None else "embedding"
    width, height = views.size or (None, None)
    row = {**parts[0], **views.key, "width": width, "height": height}
    if error is None:
        row[column], error = attempt(views.merge, [part[column] for part in parts] if views.windows else [])
    return row | ({"error": None} if error is None else {"error": error, "predictions": None, "embedding": None})


def to_results(rows: Iterable[Rows]) -> Iterator[pa.RecordBatch]:
    """Rows of `RESULT_SCHEMA` as such, a batch for each list that is not empty."""
    return (pa.RecordBatch.from_pylist(some, schema=RESULT_SCHEMA) for some in rows if some)
