"""Stage 1 in a task: from paths to the files' bytes, and from frames of videos to images."""

from collections.abc import Iterator
from functools import partial
from typing import BinaryIO

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from helpers.images.decoding import UnreadableImageError, reason
from helpers.images.video import find_frames, open_file, read_frames, split_paths
from helpers.stages.schemas import IMAGE_SCHEMA, PLACE, Batches, extend
from helpers.storage import Storage
from helpers.storage.prefetch import map_groups

FRAME_ERROR = "the frame cannot be decoded: the video is damaged here, or cut short"
FRAMES_BYTES = 16 * 2**20  # of decoded frames at once, which are large against their files


def read_images(batches: Batches, storage: Storage, most_images: int, most_bytes: int) -> Iterator[pa.RecordBatch]:
    """Stage 1 in a task: paths to bytes; what Spark has read already passes through.

    A video's frame becomes the bytes of an uncompressed image file, and the stages after this one see no difference.

    Args:
        batches: `MANIFEST_SCHEMA` or at least `KEY` of it, or `IMAGE_SCHEMA`.
        storage: where the paths lie.
        most_images: images an output batch.
        most_bytes: bytes an output batch, unless a single image has more.

    Yields:
        `IMAGE_SCHEMA`; `content` is null where `error` is set.
    """
    for batch in batches:
        if "content" in batch.schema.names:
            yield batch
            continue
        is_frame = split_paths(batch["path"])[1].is_valid()
        parts = list(_split(batch.filter(pc.invert(is_frame)), most_images, most_bytes))
        read = map_groups(partial(_read, storage), map(_known, parts), storage.concurrent_reads)
        for part, found in zip(parts, read, strict=True):
            contents, errors = zip(*found, strict=True)
            yield extend(part, IMAGE_SCHEMA, error=errors, content=contents)
        if is_frame.true_count:
            yield from _read_frames(batch.filter(is_frame), storage, most_images)


def _split(batch: pa.RecordBatch, most_images: int, most_bytes: int) -> Iterator[pa.RecordBatch]:
    start, total = 0, 0
    for row, length in enumerate(batch["length"].to_pylist()):
        if row > start and (row - start == most_images or total + length > most_bytes):
            yield batch.slice(start, row - start)
            start, total = row, 0
        total += length
    if batch.num_rows > start:
        yield batch.slice(start)


def _known(part: pa.RecordBatch) -> list[tuple[str, str | None]]:
    """Path of each image, and why it cannot be read where the listing has found that out."""
    errors = part["error"].to_pylist() if "error" in part.schema.names else [None] * part.num_rows
    return list(zip(part["path"].to_pylist(), errors, strict=True))


def _read(storage: Storage, listed: tuple[str, str | None]) -> tuple[bytes | None, str | None]:
    path, error = listed
    if error:
        return None, error
    try:
        return storage.read(path), None
    except OSError as failure:
        return None, reason(failure)


def _read_frames(batch: pa.RecordBatch, storage: Storage, most_images: int) -> Iterator[pa.RecordBatch]:
    files, numbers = split_paths(batch["path"])
    frames = pa.table({"file": files, "number": numbers, "row": pa.array(range(batch.num_rows))})
    # An exchange does not keep the order, and each file is to be decoded once and forwards.
    frames = frames.sort_by([("file", "ascending"), ("number", "ascending")])
    for file in frames["file"].unique():
        mine = frames.filter(pc.equal(frames["file"], file)).combine_chunks()
        part, start, size = batch.take(mine["row"].combine_chunks()), 0, 0
        read: list[tuple[bytes | None, str | None]] = []
        for content, error in _decode_frames(part, storage, file.as_py(), mine["number"].to_numpy()):
            read.append((content, error))
            size += len(content or b"")
            if start + len(read) == part.num_rows or len(read) == most_images or size >= FRAMES_BYTES:
                contents, errors = zip(*read, strict=True)
                yield extend(part.slice(start, len(read)), IMAGE_SCHEMA, error=errors, content=contents)
                start, size, read = start + len(read), 0, []


def _decode_frames(
    part: pa.RecordBatch, storage: Storage, path: str, numbers: np.ndarray
) -> Iterator[tuple[bytes | None, str | None]]:
    """For each frame of one video, in rising order, its bytes as an image file, or why there are none."""
    done, why = 0, FRAME_ERROR
    try:
        with open_file(storage, path) as file:
            for image in read_frames(file, numbers, *_places(part, file, numbers)):
                yield (None, FRAME_ERROR) if image is None else (cv2.imencode(".bmp", image)[1].tobytes(), None)
                done += 1
    except (OSError, UnreadableImageError) as error:
        why = reason(error)
    yield from [(None, why)] * (len(numbers) - done)


def _places(part: pa.RecordBatch, file: BinaryIO, numbers: np.ndarray) -> tuple[np.ndarray | None, ...]:
    """`pts` and `seek` of some frames, from the manifest where there is one."""
    if "pts" in part.schema.names:
        return tuple(None if part[p.name].null_count else part[p.name].to_numpy() for p in PLACE)
    frames = find_frames(file)
    if frames.pts is None or frames.seek is None or numbers[-1] >= frames.count:
        return None, None
    return frames.pts[numbers], frames.seek[numbers]
