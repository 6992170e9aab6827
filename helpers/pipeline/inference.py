"""Stage 3: from the model's input to its raw outputs."""

from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from helpers.bundle.manifest import Bundle
from helpers.bundle.runtime import get_model
from helpers.images.spec import InputSpec
from helpers.pipeline.schemas import Batches, extend, output_schema

NOT_FINITE = "the model's outputs for this image are not finite: the model is damaged, or not fit for its arithmetic"


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
        `output_schema(manifest)`; the outputs are null where `error` is set. Outputs that are not numbers, or infinite,
        are an error of their image.
    """
    schema = output_schema(bundle.manifest)
    model = get_model(bundle, precision, threads, memory_megabytes)
    parts = (part for batch in batches for part in (_split_rows(batch) if model.single else [batch]))
    for batch, outputs in model.infer((part, _pixels(part, bundle.manifest.input)) for part in parts):
        errors = batch["error"].to_pylist()
        if not_finite := _not_finite(outputs):
            good = np.flatnonzero(batch["error"].is_null())
            errors = [NOT_FINITE if row in good[not_finite] else error for row, error in enumerate(errors)]
            outputs = {name: np.delete(values, not_finite, axis=0) for name, values in outputs.items()}
        failed = np.array([error is not None for error in errors])
        columns = {
            output.name: _float_lists(outputs.get(output.name), int(np.prod(output.shape)), failed)
            for output in bundle.manifest.outputs
        }
        yield extend(batch, schema, error=errors, **columns)


def _not_finite(outputs: dict[str, np.ndarray]) -> list[int]:
    """The images, by their place among the good ones, with an output that is not a number, or infinite."""
    found: set[int] = set()
    for values in outputs.values():
        # A sum has the worst of what is in it, and takes a fraction of the time that a look at each number does.
        with np.errstate(over="ignore", invalid="ignore"):
            total = values.sum()
        if not np.isfinite(total):
            found.update(np.flatnonzero(~np.isfinite(values).reshape(len(values), -1).all(axis=1)).tolist())
    return sorted(found)


def _split_rows(batch: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
    return (batch.slice(row, 1) for row in range(batch.num_rows))


def _pixels(batch: pa.RecordBatch, spec: InputSpec) -> np.ndarray:
    """The inverse of `preprocessing._tensors`: uint8 `[good images, height, width, channels]`, without copying."""
    column = batch["tensor"]
    _, offsets, data = column.buffers()
    bounds = np.frombuffer(offsets, np.int32)[column.offset : column.offset + len(column) + 1]
    content = np.frombuffer(data or b"", np.uint8)[bounds[0] : bounds[-1]]
    return content.reshape(-1, *spec.shape)


def _float_lists(values: np.ndarray | None, width: int, failed: np.ndarray) -> pa.Array:
    flat = np.zeros(0, np.float32) if values is None else values.reshape(-1)
    offsets = np.concatenate([[0], np.cumsum(np.where(failed, 0, width))]).astype(np.int32)
    return pa.ListArray.from_arrays(offsets, flat, mask=pa.array(failed) if failed.any() else None)
