"""Stage 2: from the files' bytes to the model's input."""

from collections.abc import Iterator
from itertools import accumulate

import numpy as np
import pyarrow as pa

from helpers.images.boundary import attempt
from helpers.images.decoding import load
from helpers.images.headers import Size
from helpers.images.spec import InputSpec
from helpers.memory import bounded
from helpers.pipeline.schemas import TENSOR_SCHEMA, Batches, extend


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
    for batch in batches:
        for start in range(0, batch.num_rows, most_images):
            yield _preprocess(batch.slice(start, most_images), spec, max_pixels, memory_megabytes)


def _preprocess(
    batch: pa.RecordBatch, spec: InputSpec, max_pixels: int, memory_megabytes: int | None
) -> pa.RecordBatch:
    pixels = np.empty((batch.num_rows, *spec.shape), np.uint8)
    errors, sizes, count = batch["error"].to_pylist(), [], 0
    # The files are in memory by now, and in a fused run the model, because the last stage's start is the first.
    with bounded(memory_megabytes) as left:
        for row, content in enumerate(batch["content"]):
            size = None
            if errors[row] is None:
                loaded, errors[row] = attempt(_load, content, spec, max_pixels, left)
                if loaded is not None:
                    pixels[count], size = loaded
                    count += 1
            sizes.append(size or (None, None))
    widths, heights = zip(*sizes, strict=True)
    tensors = _tensors(pixels[:count], [error is not None for error in errors])
    return extend(batch, TENSOR_SCHEMA, width=widths, height=heights, error=errors, tensor=tensors)


def _load(
    content: pa.BinaryScalar, spec: InputSpec, max_pixels: int, most_memory: int | None
) -> tuple[np.ndarray, Size]:
    return load(memoryview(content.as_buffer()).cast("B"), spec, max_pixels, most_memory)


def _tensors(pixels: np.ndarray, failed: list[bool]) -> pa.Array:
    """The rows of a uint8 array as a binary column, without copying, with nulls where an image failed."""
    nbytes = int(np.prod(pixels.shape[1:]))
    offsets = np.fromiter(accumulate((0 if bad else nbytes for bad in failed), initial=0), np.int32)
    valid = None if not any(failed) else pa.array([not bad for bad in failed]).buffers()[1]
    return pa.Array.from_buffers(pa.binary(), len(failed), [valid, pa.py_buffer(offsets), pa.py_buffer(pixels)])
