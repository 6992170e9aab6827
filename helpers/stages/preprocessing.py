"""Stage 2: from the files' bytes to the model's input."""

from collections.abc import Iterator
from itertools import accumulate

import numpy as np
import pyarrow as pa

from helpers.images.decoding import UnreadableImageError, load
from helpers.models.bundle import InputSpec
from helpers.models.runtime import pixels_within
from helpers.stages.schemas import TENSOR_SCHEMA, Batches, extend


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
    return extend(batch, TENSOR_SCHEMA, width=widths, height=heights, error=errors, tensor=tensors)


def _tensors(pixels: np.ndarray, failed: list[bool]) -> pa.Array:
    """The rows of a uint8 array as a binary column, without copying, with nulls where an image failed."""
    nbytes = int(np.prod(pixels.shape[1:]))
    offsets = np.fromiter(accumulate((0 if bad else nbytes for bad in failed), initial=0), np.int32)
    valid = None if not any(failed) else pa.array([not bad for bad in failed]).buffers()[1]
    return pa.Array.from_buffers(pa.binary(), len(failed), [valid, pa.py_buffer(offsets), pa.py_buffer(pixels)])
