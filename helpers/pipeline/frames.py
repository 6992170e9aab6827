"""Before stage 1: the frames of videos and the members of archives take their places among the images.

list_files      in tasks: a table's URIs to files, with their lengths and times
list_frames     in tasks: a video to its frames, without decoding it
with_frames     on the driver: every k-th of them a row, as an image has one
list_members    in tasks: an archive to the images in it, a row each
"""

import logging
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from helpers.images.archive import MARK, Member, find_members, split_member, split_sample
from helpers.images.boundary import attempt, too_long
from helpers.images.video import Frames, find_frames, frame_paths, frame_pixels
from helpers.memory import bounded
from helpers.pipeline.schemas import BESIDE, ERROR, KEY, KEY_NAMES, LISTED_SCHEMA, PLACE, RANGE, Batches, conform
from helpers.storage.interface import Files
from helpers.storage.local import NO_TIME
from helpers.storage.prefetch import map_groups

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
ROWS_SCHEMA = pa.schema([*KEY, ERROR, *PLACE, *RANGE, BESIDE, pa.field("bytes", pa.int64())])
MEMBERS_SCHEMA = pa.schema([*KEY, ERROR, *RANGE, BESIDE, pa.field("bytes", pa.int64())])
ROWS_PER_BATCH = 8192
MAX_TEXT = 2**20  # bytes of a text beside an image; a longer one is left out
PLACE_OF_TEXT = ("length", "offset", "packed")
LOOKED_UP = 256  # files, while the batch before is passed on
NO_PATH = "the row has no path"


def list_files(batches: Batches, storage: Files) -> Iterator[pa.RecordBatch]:
    """Look up the files that a table names in a column `path`.

    Yields:
        `LISTED_SCHEMA`, a row per path; `error` is set where there is no file that can be used.
    """
    for batch in batches:
        paths = batch["path"].to_pylist()
        groups = [paths[start : start + LOOKED_UP] for start in range(0, len(paths), LOOKED_UP)]
        for found in map_groups(partial(_look_up, storage), groups, storage.concurrent_reads):
            yield pa.RecordBatch.from_pylist(found, schema=LISTED_SCHEMA)


def _look_up(storage: Files, path: str | None) -> dict[str, Any]:
    entry, error = (None, NO_PATH) if path is None else attempt(storage.stat, path)
    if entry is None:
        return {"path": path, "length": 0, "modified": NO_TIME, "error": error}
    return {"path": path, "length": entry.length, "modified": entry.modified, "error": entry.error}


def list_frames(
    batches: Batches, storage: Files, every: int, max_pixels: int, memory_megabytes: int | None = None
) -> Iterator[pa.RecordBatch]:
    """Find the frames of videos (`LISTED_SCHEMA` or more), of which every k-th is wanted, from the first on.

    Videos with larger frames, or with some that would take this process beyond its memory, are not decoded.

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


def _find(storage: Files, path: str, max_pixels: int | None) -> Frames:
    with storage.open(path) as file:
        return find_frames(file, max_pixels)


def with_frames(images: pa.Table, videos: pa.Table, every: int) -> pa.Table:
    """The images (`LISTED_SCHEMA`) and every k-th frame of the videos (`FRAMES_SCHEMA`), one row each (`ROWS_SCHEMA`).

    The frames of a video come in rising order; a video without any is one row, its error.
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


def list_members(
    batches: Batches,
    storage: Files,
    suffixes: tuple[str, ...],
    refused: tuple[str, ...],
    max_bytes: int,
    memory_megabytes: int | None = None,
    beside: Sequence[str] = (),
) -> Iterator[pa.RecordBatch]:
    """Find the images in archives (`LISTED_SCHEMA` or more).

    Members with other suffixes, in lower case, are left out, and so are hidden ones. Those with a refused one are an
    error, because what is in them would be images outside an archive. So are images with more bytes, and an archive
    whose list takes this process beyond its memory. `beside` are the suffixes of texts that are carried with the image
    of the same sample.

    Yields:
        `MEMBERS_SCHEMA`, a row per image, and one for an archive that cannot be read, or not to its end.
    """
    for batch in batches:
        for archive in batch.select([*KEY_NAMES, "error"]).to_pylist():
            members = None
            if archive["error"] is None:
                arguments = archive, storage, suffixes, refused, max_bytes, memory_megabytes, beside
                members, archive["error"] = attempt(_members, *arguments)
            if members is None:
                members = _member_table([{**archive, "bytes": archive["length"]}])
            yield from members.to_batches(max_chunksize=ROWS_PER_BATCH)


def _members(
    archive: dict[str, Any],
    storage: Files,
    suffixes: tuple[str, ...],
    refused: tuple[str, ...],
    max_bytes: int,
    memory_megabytes: int | None,
    beside: Sequence[str],
) -> pa.Table:
    tables: list[pa.Table] = []
    texts: dict[tuple[str, str], Member] = {}  # by sample and suffix
    rows: list[dict[str, Any]] = []
    with bounded(memory_megabytes) as left, storage.open(archive["path"]) as file:
        members = find_members(file, left)
        while True:
            member, archive_error = attempt(next, members, None)
            if member is None:
                break
            sample, kind = split_sample(member.name)
            if kind in beside and member.error is None and member.length <= MAX_TEXT:
                texts[sample, kind] = member
            name = member.name.lower()
            if _is_hidden(name) or not name.endswith(suffixes + refused):
                continue
            error = member.error or too_long(member.length, max_bytes)
            if not name.endswith(suffixes):
                error = "the member is an archive or a video; put it beside the archive, where it is read"
            row = {"path": f"{archive['path']}{MARK}{member.name}", "length": member.length, "error": error}
            rows.append({**archive, **row, "offset": member.offset, "packed": member.packed, "bytes": member.length})
            if len(rows) == ROWS_PER_BATCH:
                tables.append(_member_table(rows))
                rows = []
        images = _with_texts(_last_of_each_path(pa.concat_tables([*tables, _member_table(rows)])), texts, beside)
    if archive_error is None:
        return images
    return pa.concat_tables([images, _member_table([{**archive, "error": archive_error, "bytes": archive["length"]}])])


def _with_texts(images: pa.Table, texts: dict[tuple[str, str], Member], kinds: Sequence[str]) -> pa.Table:
    """The images of an archive with the places of the texts beside each."""
    if not kinds:
        return images
    places = []
    for path in images["path"].to_pylist():
        sample, _ = split_sample(split_member(path)[1] or "")
        found = [texts.get((sample, kind)) for kind in kinds]
        places.append([text and {name: getattr(text, name) for name in PLACE_OF_TEXT} for text in found])
    return images.set_column(images.schema.get_field_index(BESIDE.name), BESIDE, pa.array(places, BESIDE.type))


def _member_table(rows: list[dict[str, Any]]) -> pa.Table:
    return pa.Table.from_pylist(rows, schema=MEMBERS_SCHEMA)


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") and part not in (".", "..") for part in name.split("/"))


def _last_of_each_path(members: pa.Table) -> pa.Table:
    if pc.count_distinct(members["path"]).as_py() == members.num_rows:
        return members
    numbered = members.append_column("number", pa.array(range(members.num_rows), pa.int64()))
    last = numbered.group_by("path").aggregate([("number", "max")])["number_max"]
    return members.take(last.take(pc.sort_indices(last)))
