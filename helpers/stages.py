"""The four stages as they run in a task: functions from Arrow record batches to Arrow record batches.

Each stage has its output's schema beside it, keeps one row an image, and turns what is wrong with an image into the
row's `error`. A notebook runs one stage alone; `helpers.task` fuses all four, so that pixels and raw outputs stay in
the worker. Executors import this module.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from itertools import accumulate
from typing import Any, BinaryIO

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from helpers.bundle import Bundle, InputSpec, Manifest
from helpers.images import UnreadableImageError, load, reason
from helpers.inference import get_model, pixels_within
from helpers.postprocessing import POSTPROCESSORS, get_arrays
from helpers.prefetch import map_groups
from helpers.storage import Storage
from helpers.video import find_frames, open_file, read_frames, split_paths

Batches = Iterable[pa.RecordBatch]

TIMESTAMP = pa.timestamp("us", tz="UTC")
KEY = [pa.field("path", pa.string()), pa.field("length", pa.int64()), pa.field("modified", TIMESTAMP)]
SIZE = [pa.field("width", pa.int32()), pa.field("height", pa.int32())]
ERROR = pa.field("error", pa.string())

# Where a frame is in its video (`helpers.video.Frames`): null for images, and for frames that can only be counted.
PLACE = [pa.field("pts", pa.int64()), pa.field("seek", pa.int64())]

MANIFEST_SCHEMA = pa.schema([*KEY, ERROR, *PLACE, pa.field("partition", pa.int32())])
IMAGE_SCHEMA = pa.schema([*KEY, ERROR, pa.field("content", pa.binary())])
TENSOR_SCHEMA = pa.schema([*KEY, *SIZE, ERROR, pa.field("tensor", pa.binary())])

BOX = pa.struct([pa.field(name, pa.float32()) for name in ("x1", "y1", "x2", "y2")])
MASK = pa.struct([pa.field("size", pa.list_(pa.int32())), pa.field("counts", pa.string())])
PREDICTION = pa.struct(
    [
        pa.field("class_id", pa.int32()),
        pa.field("label", pa.string()),
        pa.field("score", pa.float32()),
        pa.field("box", BOX),
        pa.field("mask", MASK),
    ]
)
RESULT_SCHEMA = pa.schema(
    [*KEY, *SIZE, ERROR, pa.field("predictions", pa.list_(PREDICTION)), pa.field("model", pa.string())]
)

FRAME_ERROR = "the frame cannot be decoded: the video is damaged here, or cut short"
FRAMES_BYTES = 16 * 2**20  # of decoded frames at once, which are large against their files


def output_schema(manifest: Manifest) -> pa.Schema:
    """Schema of stage 3: a flat float32 list for each of the model's outputs."""
    outputs = [pa.field(output.name, pa.list_(pa.float32())) for output in manifest.outputs]
    return pa.schema([*KEY, *SIZE, ERROR, *outputs])


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
            yield _extend(part, IMAGE_SCHEMA, error=errors, content=contents)
        if is_frame.true_count:
            yield from _read_frames(batch.filter(is_frame), storage, most_images)


def preprocess(
    batches: Batches, spec: InputSpec, most_images: int, max_pixels: int, memory_megabytes: int | None = None
) -> Iterator[pa.RecordBatch]:
    """Stage 2: bytes to the model's input.

    Args:
        batches: `IMAGE_SCHEMA`.
        spec: size, colour order and resize rule, from the bundle's manifest.
        most_images: images an output batch.
        max_pixels: larger images are not decoded.
        memory_megabytes: what this process may take; images that would take it beyond are not decoded either.

    Yields:
        `TENSOR_SCHEMA`; `tensor` holds uint8 `[height, width, channels]` row by row, and the size is the original's.
    """
    # In a fused run the model is in memory by now: the stages run inside one another, the last one's start first.
    max_pixels = pixels_within(memory_megabytes, max_pixels)
    for batch in batches:
        for start in range(0, batch.num_rows, most_images):
            yield _preprocess(batch.slice(start, most_images), spec, max_pixels)


def infer(
    batches: Batches, bundle: Bundle, precision: str | None, threads: int, memory_megabytes: int | None = None
) -> Iterator[pa.RecordBatch]:
    """Stage 3: the model's input to its raw outputs, in the process's one compiled model.

    Args:
        batches: `TENSOR_SCHEMA`; one batch is one inference, or several of one image where the model takes no more.
        bundle: which model.
        precision: arithmetic; None for the bundle's own.
        threads: OpenVINO threads.
        memory_megabytes: what this process may take.

    Yields:
        `output_schema(manifest)`; the outputs are null where `error` is set.
    """
    schema = output_schema(bundle.manifest)
    model = get_model(bundle, precision, threads, memory_megabytes)
    parts = (part for batch in batches for part in (_split_rows(batch) if model.single else [batch]))
    for batch, outputs in model.infer((part, _pixels(part, bundle.manifest.input)) for part in parts):
        failed = np.asarray(batch["error"].is_valid())
        columns = {
            output.name: _float_lists(outputs.get(output.name), int(np.prod(output.shape)), failed)
            for output in bundle.manifest.outputs
        }
        yield _extend(batch, schema, **columns)


def postprocess(
    batches: Batches,
    manifest: Manifest,
    parameters: Mapping[str, Any],
    model: str,
    read: Callable[[str], bytes] | None = None,
) -> Iterator[pa.RecordBatch]:
    """Stage 4: raw outputs to predictions.

    Args:
        batches: `output_schema(manifest)`.
        manifest: task, outputs and labels.
        parameters: of the task's post-processing.
        model: what the results' `model` column says.
        read: reads a file of the bundle, for tasks that need more than the graph's outputs (`Bundle.read`).

    Yields:
        `RESULT_SCHEMA`; `predictions` is null where `error` is set.
    """
    function, arrays = POSTPROCESSORS[manifest.task], get_arrays(manifest, read)
    for batch in batches:
        # Filtering copies, and raw outputs can be large.
        failed = batch["error"].null_count < batch.num_rows
        good = batch.filter(batch["error"].is_null()) if failed else batch
        outputs = {o.name: _array(good[o.name], o.shape) for o in manifest.outputs}
        sizes = list(zip(good["width"].to_pylist(), good["height"].to_pylist(), strict=True))
        found = iter(function(outputs, sizes, manifest, parameters, arrays) if good.num_rows else [])
        predictions = [None if error else next(found) for error in batch["error"].is_valid().to_pylist()]
        yield _extend(batch, RESULT_SCHEMA, predictions=predictions, model=[model] * batch.num_rows)


def _split_rows(batch: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
    return (batch.slice(row, 1) for row in range(batch.num_rows))


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
                yield _extend(part.slice(start, len(read)), IMAGE_SCHEMA, error=errors, content=contents)
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


def _preprocess(batch: pa.RecordBatch, spec: InputSpec, max_pixels: int) -> pa.RecordBatch:
    pixels = np.empty((batch.num_rows, *spec.shape), np.uint8)
    errors, sizes, count = batch["error"].to_pylist(), [], 0
    for row, content in enumerate(batch["content"]):
        size = None
        if errors[row] is None:
            try:
                pixels[count], size = load(memoryview(content.as_buffer()).cast("B"), spec, max_pixels)
                count += 1
            except UnreadableImageError as error:
                errors[row] = str(error)
        sizes.append(size or (None, None))
    widths, heights = zip(*sizes, strict=True)
    tensors = _tensors(pixels[:count], [error is not None for error in errors])
    return _extend(batch, TENSOR_SCHEMA, width=widths, height=heights, error=errors, tensor=tensors)


def _tensors(pixels: np.ndarray, failed: list[bool]) -> pa.Array:
    """The rows of a uint8 array as a binary column, without copying, with nulls where an image failed."""
    nbytes = int(np.prod(pixels.shape[1:]))
    offsets = np.fromiter(accumulate((0 if bad else nbytes for bad in failed), initial=0), np.int32)
    valid = None if not any(failed) else pa.array([not bad for bad in failed]).buffers()[1]
    return pa.Array.from_buffers(pa.binary(), len(failed), [valid, pa.py_buffer(offsets), pa.py_buffer(pixels)])


def _pixels(batch: pa.RecordBatch, spec: InputSpec) -> np.ndarray:
    """The inverse of `_tensors`: uint8 `[good images, height, width, channels]`, without copying."""
    column = batch["tensor"]
    _, offsets, data = column.buffers()
    bounds = np.frombuffer(offsets, np.int32)[column.offset : column.offset + len(column) + 1]
    content = np.frombuffer(data or b"", np.uint8)[bounds[0] : bounds[-1]]
    return content.reshape(-1, *spec.shape)


def _float_lists(values: np.ndarray | None, width: int, failed: np.ndarray) -> pa.Array:
    flat = np.zeros(0, np.float32) if values is None else values.reshape(-1)
    offsets = np.concatenate([[0], np.cumsum(np.where(failed, 0, width))]).astype(np.int32)
    return pa.ListArray.from_arrays(offsets, flat, mask=pa.array(failed) if failed.any() else None)


def _array(column: pa.ListArray, shape: tuple[int, ...]) -> np.ndarray:
    return column.flatten().to_numpy(zero_copy_only=False).reshape(-1, *shape)


def _extend(batch: pa.RecordBatch, schema: pa.Schema, **columns: Any) -> pa.RecordBatch:
    """The columns of a stage's output: its own where given, else those of its input."""
    arrays = []
    for field in schema:
        column = columns[field.name] if field.name in columns else batch[field.name]
        arrays.append(column if isinstance(column, pa.Array) else pa.array(column, field.type))
    return pa.RecordBatch.from_arrays(arrays, schema=schema)
