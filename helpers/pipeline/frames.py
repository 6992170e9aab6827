"""Before stage 1: the frames of videos take their places among the images.

list_frames     in tasks: a video to its frames, without decoding it
with_frames     on the driver: every k-th of them a row, as an image has one
"""

import logging
from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from helpers.images.boundary import attempt
from helpers.images.video import Frames, find_frames, frame_paths, frame_pixels
from helpers.memory import bounded
from helpers.pipeline.schemas import ERROR, KEY, KEY_NAMES, PLACE, Batches, conform
from helpers.storage import Storage

log = logging.getLogger(__name__)

FRAMES_SCHEMA = pa.schema(
    [
        *KEY,
        ERROR,
        pa.field("count", pa.int64()),
        pa.field("announced", pa.int64()),
        *(pa.field(place.name, pa.list_(place.type)) for place in PLACE),
    ]
)
# A frame has its share of the file's bytes, for the plan.
ROWS_SCHEMA = pa.schema([*KEY, ERROR, *PLACE, pa.field("bytes", pa.int64())])


def list_frames(
    batches: Batches, storage: Storage, every: int, max_pixels: int, memory_megabytes: int | None = None
) -> Iterator[pa.RecordBatch]:
    """Find the frames of videos.

    Args:
        batches: `listing.LISTED_SCHEMA`, or more.
        storage: where they lie.
        every: k, where every k-th frame is wanted, from the first on.
        max_pixels: videos with larger frames are not decoded.
        memory_megabytes: what this process may take; frames that would take it beyond are not decoded either.

    Yields:
        `FRAMES_SCHEMA`, one row per video. `count` is of all frames. The lists are of the wanted, null where they can
        only be counted. `error` is set where no frame can be read.
    """
    for batch in batches:
        import av  # noqa: F401 - what loading it takes or lacks is not a video's

        for row in batch.select([*KEY_NAMES, "error"]).to_pylist():
            if row["error"] is None:
                with bounded(memory_megabytes):
                    pixel_limit = frame_pixels(max_pixels, memory_megabytes)
                    frames, row["error"] = attempt(_find, storage, row["path"], pixel_limit)
            if row["error"] is None and frames is not None:
                row |= {"count": frames.count, "announced": frames.announced}
                if frames.pts is not None and frames.seek is not None:
                    row |= {"pts": frames.pts[::every], "seek": frames.seek[::every]}
            yield pa.RecordBatch.from_pylist([row], schema=FRAMES_SCHEMA)


def _find(storage: Storage, path: str, max_pixels: int | None) -> Frames:
    with storage.open(path) as file:
        return find_frames(file, max_pixels)


def with_frames(images: pa.Table, videos: pa.Table, every: int) -> pa.Table:
    """The images and every k-th frame of the videos, one row each; a video without any frame is one row, its error.

    Args:
        images: `listing.LISTED_SCHEMA`.
        videos: `FRAMES_SCHEMA`, from `list_frames` with the same `every`.
        every: which frames; the first is one of them.

    Returns:
        `ROWS_SCHEMA`, the frames of a video in rising order.
    """
    rows = images.append_column("bytes", images["length"])
    tables = [rows, *(_rows(video, every) for video in videos.sort_by("path").to_batches(max_chunksize=1))]
    return pa.concat_tables([conform(table, ROWS_SCHEMA) for table in tables])


def _rows(video: pa.RecordBatch, every: int) -> pa.Table:
    table = pa.Table.from_batches([video])
    (row,) = table.drop_columns(["pts", "seek"]).to_pylist()
    if row["error"] is not None:
        return table.select([*KEY_NAMES, "error"]).append_column("bytes", table["length"])
    if 0 < row["count"] < row["announced"]:
        log.warning("%s has %d of the %d frames it announces", row["path"], row["count"], row["announced"])
    numbers = np.arange(0, row["count"], every)
    keys = table.select(["length", "modified"]).take(np.zeros(len(numbers), np.int64))
    rows = keys.append_column("path", frame_paths(pa.scalar(row["path"]), pa.array(numbers)))
    for place in PLACE:
        if not video[place.name].null_count:
            rows = rows.append_column(place.name, video[place.name].flatten())
    return rows.append_column("bytes", pa.array(np.full(len(numbers), row["length"] // len(numbers)), pa.int64()))
