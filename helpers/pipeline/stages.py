"""The four stages as they run in a task: functions from Arrow record batches to Arrow record batches.

Each stage keeps one row per image, and turns what is wrong with an image into the row's `error`. A notebook runs one
stage alone; `helpers.pipeline.task` fuses all four, so that pixels and raw outputs stay in the worker. Stage 1 is in
`helpers.pipeline.reading`. Executors import this module.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from helpers import tasks
from helpers.bundle.manifest import Bundle, Manifest, OutputSpec
from helpers.bundle.runtime import get_model
from helpers.images.boundary import attempt
from helpers.images.decoding import load
from helpers.images.geometry import place
from helpers.images.headers import Size
from helpers.images.spec import InputSpec
from helpers.memory import bounded
from helpers.pipeline.reading import read_images  # noqa: F401 - stage 1
from helpers.pipeline.schemas import (  # noqa: F401 - what stages take and give
    ASSIGNED_SCHEMA,
    EMBEDDING,
    IMAGE_SCHEMA,
    PREDICTIONS,
    RESULT_SCHEMA,
    TENSOR_SCHEMA,
    Batches,
    extend,
    output_schema,
    shape_column,
)
from helpers.tasks import get_arrays

NOT_FINITE = "the model's outputs for this image are not finite: the model is damaged, or not fit for its arithmetic"


def preprocess(
    batches: Batches, spec: InputSpec, max_images: int, max_pixels: int, memory_megabytes: int | None = None
) -> Iterator[pa.RecordBatch]:
    """Stage 2: the bytes of `IMAGE_SCHEMA` to the model's input, as the bundle's `spec` says.

    Images with more than `max_pixels`, or that would take this process beyond its memory, are not decoded.

    Yields:
        `TENSOR_SCHEMA`, `max_images` at most in a batch; `tensor` holds uint8 `[height, width, channels]` row by row,
        and the size is the original's. The tensor's own size is that of `geometry.place`.
    """
    step = 1 if spec.is_variable else max_images
    for batch in batches:
        for start in range(0, batch.num_rows, step):
            yield _preprocess(batch.slice(start, step), spec, max_pixels, memory_megabytes)


def infer(
    batches: Batches,
    bundle: Bundle,
    precision: str | None,
    threads: int,
    memory_megabytes: int | None = None,
    device: str = "CPU",
) -> Iterator[pa.RecordBatch]:
    """Stage 3: the model's input to its raw outputs, in the process's one compiled model; settings as of `get_model`.

    A batch of `TENSOR_SCHEMA` is one inference, or several of one image where the model takes no more.

    Yields:
        `output_schema(manifest)`; the outputs are null where `error` is set. Outputs that are not numbers, or infinite,
        are an error of their image.
    """
    schema = output_schema(bundle.manifest)
    model = get_model(bundle, precision, threads, memory_megabytes, device)
    parts = (part for batch in batches for part in (_split_rows(batch) if model.single else [batch]))
    for batch, outputs in model.infer((part, _pixels(part, bundle.manifest.input)) for part in parts):
        errors = batch["error"].to_pylist()
        if not_finite := _not_finite(outputs):
            good = np.flatnonzero(batch["error"].is_null())
            errors = [NOT_FINITE if row in good[not_finite] else error for row, error in enumerate(errors)]
            outputs = {name: np.delete(values, not_finite, axis=0) for name, values in outputs.items()}
        failed = np.array([error is not None for error in errors], bool)
        columns: dict[str, Any] = {}
        for output in bundle.manifest.outputs:
            values = outputs.get(output.name)
            columns[output.name] = _float_lists(values, failed)
            if name := shape_column(output):
                columns[name] = [None if bad or values is None else values.shape[1:] for bad in failed]
        yield extend(batch, schema, error=errors, **columns)


def postprocess(
    batches: Batches,
    manifest: Manifest,
    parameters: Mapping[str, Any],
    model: str,
    read: Callable[[str], bytes] | None = None,
) -> Iterator[pa.RecordBatch]:
    """Stage 4: raw outputs, `output_schema(manifest)`, to predictions.

    `model` is what the results' column says, and `read` reads a file of the bundle (`Bundle.read`) for tasks that need
    more than the graph's outputs.

    Yields:
        `RESULT_SCHEMA`; `predictions` is null where `error` is set. What goes wrong with one image is its own error.
    """
    arrays = get_arrays(manifest, read)
    is_open = any(map(shape_column, manifest.outputs))
    column, kind = ("embedding", EMBEDDING) if manifest.task == "embedding" else ("predictions", PREDICTIONS)

    def predict(good: pa.RecordBatch) -> pa.Array:
        outputs = {o.name: _array(good, o) for o in manifest.outputs}
        sizes = list(zip(good["width"].to_pylist(), good["height"].to_pylist(), strict=True))
        return pa.array(tasks.predict(outputs, sizes, manifest, parameters, arrays), kind)

    parts = (part for batch in batches for part in (_split_rows(batch) if is_open else [batch]))
    for batch in parts:
        values, errors = _each(predict, batch, kind)
        columns = {
            "predictions": [None if error else [] for error in errors],  # of an embedding
            "embedding": pa.nulls(batch.num_rows, EMBEDDING),
            column: values,
        }
        yield extend(batch, RESULT_SCHEMA, error=errors, model=[model] * batch.num_rows, **columns)


def _preprocess(
    batch: pa.RecordBatch, spec: InputSpec, max_pixels: int, memory_megabytes: int | None
) -> pa.RecordBatch:
    pixels = np.empty((0 if spec.is_variable else batch.num_rows, *spec.shape), np.uint8)
    errors, count = batch["error"].to_pylist(), 0
    sizes: list[Size | None] = []
    # The files are in memory by now, and in a fused run the model, because the last stage's start is the first.
    with bounded(memory_megabytes) as left:
        for row, content in enumerate(batch["content"]):
            size = None
            if errors[row] is None:
                loaded, errors[row] = attempt(_load, content, spec, max_pixels, left)
                if loaded is not None:
                    tensor, size = loaded
                    if spec.is_variable:  # then the batch is this image
                        pixels = tensor[None]
                    else:
                        pixels[count] = tensor
                    count += 1
            sizes.append(size)
    return tensor_batch(batch, sizes, errors, pixels[:count])


def _load(
    content: pa.BinaryScalar, spec: InputSpec, max_pixels: int, max_memory: int | None
) -> tuple[np.ndarray, Size]:
    return load(memoryview(content.as_buffer()).cast("B"), spec, max_pixels, max_memory)


def tensor_batch(
    batch: pa.RecordBatch, sizes: Sequence[Size | None], errors: Sequence[str | None], pixels: np.ndarray
) -> pa.RecordBatch:
    """A batch of `TENSOR_SCHEMA` with the `KEY` of another, without copying pixels.

    Sizes are of the original images, and pixels the model's input of the rows without an error, uint8 `[rows, height,
    width, channels]`.
    """
    widths, heights = zip(*[size or (None, None) for size in sizes], strict=True)
    failed = [error is not None for error in errors]
    nbytes = int(np.prod(pixels.shape[1:]))
    offsets = np.fromiter(accumulate((0 if bad else nbytes for bad in failed), initial=0), np.int32)
    valid = None if not any(failed) else pa.array([not bad for bad in failed]).buffers()[1]
    buffers = [valid, pa.py_buffer(offsets), pa.py_buffer(pixels)]
    tensors = pa.Array.from_buffers(pa.binary(), len(failed), buffers)
    return extend(batch, TENSOR_SCHEMA, width=widths, height=heights, error=errors, tensor=tensors)


def _not_finite(outputs: dict[str, np.ndarray]) -> list[int]:
    """The images, by their place among the good ones, with an output that is not a number, or infinite."""
    places: set[int] = set()
    for values in outputs.values():
        # A sum has the worst of what is in it, and takes a fraction of the time that a look at each number does.
        with np.errstate(over="ignore", invalid="ignore"):
            total = values.sum()
        if not np.isfinite(total):
            places.update(np.flatnonzero(~np.isfinite(values).reshape(len(values), -1).all(axis=1)).tolist())
    return sorted(places)


def _split_rows(batch: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
    return (batch.slice(row, 1) for row in range(batch.num_rows))


def _pixels(batch: pa.RecordBatch, spec: InputSpec) -> np.ndarray:
    """The pixels of a `tensor_batch`: uint8 `[good images, height, width, channels]`, without copying."""
    column = batch["tensor"]
    _, offsets, data = column.buffers()
    bounds = np.frombuffer(offsets, np.int32)[column.offset : column.offset + len(column) + 1]
    content = np.frombuffer(data or b"", np.uint8)[bounds[0] : bounds[-1]]
    shape = spec.shape
    if spec.is_variable and len(content):  # then the batch is one image
        width, height = place(spec, (batch["width"][0].as_py(), batch["height"][0].as_py())).input
        shape = height, width, shape[2]
    return content.reshape(-1, *shape)


def _float_lists(values: np.ndarray | None, failed: np.ndarray) -> pa.Array:
    flat = np.zeros(0, np.float32) if values is None else values.reshape(-1)
    width = flat.size // (int(np.count_nonzero(~failed)) or 1)
    offsets = np.concatenate([[0], np.cumsum(np.where(failed, 0, width))]).astype(np.int32)
    return pa.ListArray.from_arrays(offsets, flat, mask=pa.array(failed) if failed.any() else None)


def _each(
    predict: Callable[[pa.RecordBatch], pa.Array], batch: pa.RecordBatch, kind: pa.DataType
) -> tuple[pa.Array, list[str | None]]:
    """Values of a type for a batch, all together, or one by one where that fails, and the errors; null where one is."""
    errors, good = batch["error"].to_pylist(), batch["error"].is_null()
    if not good.true_count:
        return pa.nulls(len(errors), kind), errors
    # Filtering copies, and raw outputs can be large.
    predictions, _ = attempt(predict, batch.filter(good) if good.false_count else batch)
    if predictions is None:
        alone = [(None, e) if e else attempt(predict, batch.slice(row, 1)) for row, e in enumerate(errors)]
        values = [pa.nulls(1, kind) if value is None else value for value, _ in alone]
        return pa.concat_arrays(values), [error for _, error in alone]
    if good.false_count:
        places = pc.subtract(pc.cumulative_sum(good.cast(pa.int64())), 1)
        predictions = predictions.take(pc.if_else(good, places, None))
    return predictions, errors


def _array(batch: pa.RecordBatch, output: OutputSpec) -> np.ndarray:
    """An output of a batch, float32 `[B, ...]`; where its shape is open, the batch is one image."""
    name = shape_column(output)
    shape = batch[name][0].as_py() if name else output.shape
    return batch[output.name].flatten().to_numpy(zero_copy_only=False).reshape(batch.num_rows, *shape)
