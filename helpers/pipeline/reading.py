"""What tasks read: which frames and members are in videos and archives, and stage 1, their bytes and those of files.

list_files      a table's URIs to files, with their lengths and times
list_frames     a video to its frames, without decoding it
with_frames     on the driver: every k-th of them a row, as an image has one
list_members    an archive to the images in it, a row each
read_images     stage 1: from paths to the bytes of files and of archives' members, and from frames of videos to images
"""

import errno
import logging
import os
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from functools import partial
from typing import Any, BinaryIO, NamedTuple

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from helpers.images.archive import MARK, Member, find_members, read_member, split_member, split_sample
from helpers.images.boundary import attempt, too_long
from helpers.images.decoding import Image
from helpers.images.video import Frames, are_frames, find_frames, frame_paths, frame_pixels, read_frames, split_paths
from helpers.memory import bounded
from helpers.pipeline.schemas import (
    BESIDE,
    ERROR,
    IMAGE_SCHEMA,
    KEPT,
    KEY,
    KEY_NAMES,
    LISTED_SCHEMA,
    PLACE,
    RANGE,
    Batches,
    conform,
    extend,
)
from helpers.storage.interface import Entry, Files, Storage
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
MEMBERS_PER_BATCH = 8192
MAX_TEXT = 2**20  # bytes of a text beside an image; a longer one is left out
PLACE_OF_TEXT = ("length", "offset", "packed")
LOOKED_UP = 256  # files, while the batch before is passed on
NO_PATH = "the row has no path"

FRAME_ERROR = "the frame cannot be decoded: the video is damaged here, or cut short"
GONE = "the member is gone: its archive has changed since it was listed"
FRAMES_BYTES = 16 * 2**20  # of decoded frames at once, which are large against their files
ARROW_BYTES = 2**31 - 2  # of one value in a column of bytes, at most
ROWS_PER_BATCH = 64  # of a table, which may hold images
GROWTH_BYTES = 2**20  # a file may have grown to so many since it was listed; a longer one waits for the next run

Read = tuple[bytes | None, str | None]  # an image's bytes, or why there are none


def list_files(batches: Batches, storage: Files) -> Iterator[pa.RecordBatch]:
    """Look up the files that a table names in a column `path`.

    Yields:
        `LISTED_SCHEMA`, a row per path; `error` is set where there is no file that can be used.
    """
    for batch in batches:
        paths = batch["path"].to_pylist()
        groups = [paths[start : start + LOOKED_UP] for start in range(0, len(paths), LOOKED_UP)]
        for found in map_groups(partial(_look_up_file, storage), groups, storage.concurrent_reads):
            yield pa.RecordBatch.from_pylist(found, schema=LISTED_SCHEMA)


def _look_up_file(storage: Files, path: str | None) -> dict[str, Any]:
    entry, error = (None, NO_PATH) if path is None else attempt(storage.stat, path)
    entry = entry or Entry("", 0, NO_TIME, error=error)
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
                    frames, row["error"] = attempt(_find_frames, storage, row["path"], pixel_limit)
            if row["error"] is None and frames is not None:
                row |= {"count": frames.count, "announced": frames.announced}
                if frames.pts is not None and frames.seek is not None:
                    row |= {"pts": frames.pts[::every], "seek": frames.seek[::every]}
            yield pa.RecordBatch.from_pylist([row], schema=FRAMES_SCHEMA)


def _find_frames(storage: Files, path: str, max_pixels: int | None) -> Frames:
    with storage.open(path) as file:
        return find_frames(file, max_pixels)


def with_frames(images: pa.Table, videos: pa.Table, every: int) -> pa.Table:
    """The images (`LISTED_SCHEMA`) and every k-th frame of the videos (`FRAMES_SCHEMA`), one row each (`ROWS_SCHEMA`).

    The frames of a video come in rising order; a video without any is one row, its error.
    """
    rows = images.append_column("bytes", images["length"])
    tables = [rows, *(_frame_rows(video, every) for video in videos.sort_by("path").to_batches(max_chunksize=1))]
    return pa.concat_tables([conform(table, ROWS_SCHEMA) for table in tables])


def _frame_rows(video: pa.RecordBatch, every: int) -> pa.Table:
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
            yield from members.to_batches(max_chunksize=MEMBERS_PER_BATCH)


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
            is_hidden = any(part.startswith(".") and part not in (".", "..") for part in name.split("/"))
            if is_hidden or not name.endswith(suffixes + refused):
                continue
            error = member.error or too_long(member.length, max_bytes)
            if not name.endswith(suffixes):
                error = "the member is an archive or a video; put it beside the archive, where it is read"
            row = {"path": f"{archive['path']}{MARK}{member.name}", "length": member.length, "error": error}
            rows.append({**archive, **row, "offset": member.offset, "packed": member.packed, "bytes": member.length})
            if len(rows) == MEMBERS_PER_BATCH:
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


def _last_of_each_path(members: pa.Table) -> pa.Table:
    if pc.count_distinct(members["path"]).as_py() == members.num_rows:
        return members
    numbered = members.append_column("number", pa.array(range(members.num_rows), pa.int64()))
    last = numbered.group_by("path").aggregate([("number", "max")])["number_max"]
    return members.take(last.take(pc.sort_indices(last)))


# ------------------------------------------------------------ stage 1


class File(NamedTuple):
    """What to read of an image: a file, or a member of an archive; or why not."""

    path: str
    error: str | None
    limit: int  # bytes that it may have
    member: Member | None  # where it is in its archive


def read_images(
    batches: Batches,
    storage: Files,
    max_images: int,
    batch_bytes: int,
    max_bytes: int = ARROW_BYTES,
    max_pixels: int | None = None,
    memory_megabytes: int | None = None,
) -> Iterator[pa.RecordBatch]:
    """Stage 1 in a task: paths to bytes; what Spark has read already passes through.

    A video's frame becomes the bytes of an uncompressed image file, and the stages after this one see no difference.

    Paths are those of `ASSIGNED_SCHEMA`, or at least of its `KEY`. A batch of the output has so many images and bytes
    at most, unless a single image has more. No more than `max_bytes` of an image file are read, and a longer one is an
    error; videos may have any length. Frames that have too many pixels, or would take this process beyond its memory,
    are not decoded.

    Yields:
        `IMAGE_SCHEMA`; `content` is null where `error` is set.
    """
    for batch in batches:
        if "content" in batch.schema.names:
            yield batch
            continue
        is_frame = are_frames(batch["path"])
        images = batch.filter(pc.invert(is_frame))
        runs = list(_runs(images["length"].to_pylist(), max_images, batch_bytes))
        files = _files(images, storage, min(max_bytes, ARROW_BYTES), max(batch_bytes, GROWTH_BYTES))
        read = map_groups(partial(_read, storage), [files[run] for run in runs], storage.concurrent_reads)
        for run, contents in zip(runs, read, strict=True):
            part = images.slice(run.start, run.stop - run.start)
            # Files may have grown since they were listed.
            for again in _runs([len(content or b"") for content, _ in contents], max_images, batch_bytes):
                yield _batch(part.slice(again.start, again.stop - again.start), contents)
        if is_frame.true_count:
            pixel_limit = frame_pixels(max_pixels, memory_megabytes)
            yield from _read_frames(batch.filter(is_frame), storage, max_images, pixel_limit, memory_megabytes)


def read_beside(batches: Batches, storage: Files, kept: pa.Schema) -> Iterator[pa.RecordBatch]:
    """Add the column `KEPT` where an archive may have the texts for it beside the images; else it is there already.

    A text that cannot be read is null, and the image's predictions are none the worse. Batches are of
    `ASSIGNED_SCHEMA`, or any with `KEPT`.
    """
    for batch in batches:
        if KEPT in batch.schema.names:
            yield batch
            continue
        rows = batch[BESIDE.name].to_pylist() if BESIDE.name in batch.schema.names else [None] * batch.num_rows
        texts = [
            (split_member(path)[0], place)
            for path, places in zip(batch["path"].to_pylist(), rows, strict=True)
            for place in places or [None] * len(kept)
        ]
        (found,) = map_groups(partial(_read_text, storage), [texts], storage.concurrent_reads)
        columns = [pa.array(found[number :: len(kept)], field.type) for number, field in enumerate(kept)]
        yield batch.append_column(KEPT, pa.StructArray.from_arrays(columns, fields=list(kept)))


def _read_text(storage: Files, text: tuple[str, dict[str, Any] | None]) -> str | None:
    archive, place = text
    if place is None:
        return None
    content, _ = attempt(read_member, partial(storage.read_range, archive), *place.values())
    return None if content is None else content.decode("utf-8", "replace")


def read_parquet(batches: Batches, storage: Storage, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    """Read the rows of Parquet files, for a Spark that has no connector for their storage.

    Batches have a column `path`, and others for what all rows of a file have in common. What a file lacks of the
    columns that are wanted is null.
    """
    for batch in batches:
        for row in batch.to_pylist():
            with storage.open(row.pop("path")) as content:
                file = pq.ParquetFile(content)
                names = [name for name in schema.names if name in file.schema_arrow.names]
                for group in range(file.num_row_groups):
                    # Without threads, which may outlive the interpreter and the file.
                    rows = file.read_row_group(group, names, use_threads=False)
                    for name, value in row.items():
                        rows = rows.append_column(name, pa.array([value] * rows.num_rows, schema.field(name).type))
                    yield from conform(rows, schema).to_batches(max_chunksize=ROWS_PER_BATCH)


def _runs(lengths: list[int], max_images: int, batch_bytes: int) -> Iterator[slice]:
    """Neighbors that make one batch, with so many images and bytes at most; one image may have more."""
    start, total = 0, 0
    for row, length in enumerate(lengths):
        if row > start and (row - start == max_images or total + length > batch_bytes):
            yield slice(start, row)
            start, total = row, 0
        total += length
    if len(lengths) > start:
        yield slice(start, len(lengths))


def _files(images: pa.RecordBatch, storage: Files, max_bytes: int, growth: int) -> list[File]:
    """What to read for each image, with the error that the listing has found.

    The listing decides how much is read at once. A file that is much longer by now waits for the next run, which lists
    it anew.
    """
    paths, lengths = images["path"].to_pylist(), images["length"].to_pylist()
    errors = images["error"].to_pylist() if "error" in images.schema.names else [None] * images.num_rows
    limits = [min(max_bytes, max(length, growth)) for length in lengths]
    if "offset" in images.schema.names:
        ranges = zip(paths, lengths, images["offset"].to_pylist(), images["packed"].to_pylist(), strict=True)
        members = [None if row[2] is None else Member(*row) for row in ranges]
        return list(map(File, paths, errors, limits, members))
    return _look_up([File(*row, None) for row in zip(paths, errors, limits, strict=True)], storage)


def _look_up(files: list[File], storage: Files) -> list[File]:
    """The same with the members among them, where no row says which range they have: each archive is listed once."""
    split = {file.path: split_member(file.path) for file in files}
    archives = {path: archive for path, (archive, member) in split.items() if member is not None}
    members: dict[str, Member | None] = dict.fromkeys(archives)
    errors = {archive: attempt(_note_members, members, storage, archive)[1] for archive in set(archives.values())}
    for number, file in enumerate(files):
        if file.path in archives:
            member = members[file.path]
            error = member.error if member else errors[archives[file.path]] or GONE
            files[number] = file._replace(error=file.error or error, member=member)
    return files


def _note_members(members: dict[str, Member | None], storage: Files, archive: str) -> None:
    """Note the members of one archive that are wanted, by their paths."""
    with storage.open(archive) as file:
        for member in find_members(file):
            path = f"{archive}{MARK}{member.name}"
            if path in members:
                members[path] = member


def _read(storage: Files, file: File) -> Read:
    if file.error:
        return None, file.error
    if file.member is None:
        return attempt(storage.read, file.path, file.limit)
    return attempt(_read_member, storage, file.path, file.member, file.limit)


def _read_member(storage: Files, path: str, member: Member, limit: int) -> bytes:
    if member.length > limit:
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG), path)
    read = partial(storage.read_range, split_member(path)[0])
    return read_member(read, member.length, member.offset, member.packed)


def _batch(part: pa.RecordBatch, read: list[Read]) -> pa.RecordBatch:
    """A batch of what was read first, which is forgotten here: a large file would be in memory twice."""
    contents, errors = zip(*read[: part.num_rows], strict=True)
    del read[: part.num_rows]
    return extend(part, IMAGE_SCHEMA, error=errors, content=contents)


def _read_frames(
    batch: pa.RecordBatch, storage: Files, max_images: int, max_pixels: int | None, memory_megabytes: int | None
) -> Iterator[pa.RecordBatch]:
    import av  # noqa: F401 - what loading it takes or lacks is not a video's

    files, numbers = split_paths(batch["path"])
    frames = pa.table({"file": files, "number": numbers, "row": pa.array(range(batch.num_rows))})
    # An exchange does not keep the order, and each file is to be decoded once and forwards.
    frames = frames.sort_by([("file", "ascending"), ("number", "ascending")])
    for file in frames["file"].unique():
        mine = frames.filter(pc.equal(frames["file"], file)).combine_chunks()
        part, start, size = batch.take(mine["row"].combine_chunks()), 0, 0
        read: list[Read] = []
        with closing(_images(part, storage, file.as_py(), mine["number"].to_numpy(), max_pixels)) as images:
            for content, error in _decode_frames(images, part.num_rows, memory_megabytes):
                read.append((content, error))
                size += len(content or b"")
                if start + len(read) == part.num_rows or len(read) == max_images or size >= FRAMES_BYTES:
                    ready = part.slice(start, len(read))
                    yield _batch(ready, read)
                    start, size = start + ready.num_rows, 0


def _decode_frames(images: Iterator[Image | str | None], count: int, memory_megabytes: int | None) -> Iterator[Read]:
    """For each frame of one video, in rising order, its bytes as an image file, or why there are none."""
    content, missing = None, FRAME_ERROR
    for _ in range(count):
        with bounded(memory_megabytes):
            image, error = attempt(next, images, None)
            if isinstance(image, np.ndarray):
                content, error = attempt(lambda pixels: cv2.imencode(".bmp", pixels)[1].tobytes(), image)
            elif error is not None:  # nothing more comes
                content, missing = None, error
            else:
                content, error = None, image or missing
        yield content, error


def _images(
    part: pa.RecordBatch, storage: Files, path: str, numbers: np.ndarray, max_pixels: int | None
) -> Generator[Image | str | None]:
    with storage.open(path) as file:
        pts, seek = _places(part, file, numbers, max_pixels)
        yield from read_frames(file, numbers, pts, seek, max_pixels)


def _places(
    part: pa.RecordBatch, file: BinaryIO, numbers: np.ndarray, max_pixels: int | None
) -> tuple[np.ndarray | None, ...]:
    """`pts` and `seek` of some frames, from the batch where it has them."""
    if "pts" in part.schema.names:
        return tuple(None if part[p.name].null_count else part[p.name].to_numpy() for p in PLACE)
    frames = find_frames(file, max_pixels)
    if frames.pts is None or frames.seek is None or numbers[-1] >= frames.count:
        return None, None
    return frames.pts[numbers], frames.seek[numbers]
