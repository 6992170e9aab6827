"""The columns that each stage hands to the next."""

from collections.abc import Iterable
from typing import Any

import pyarrow as pa

from helpers.bundle.manifest import OPEN, Manifest, OutputSpec

Batches = Iterable[pa.RecordBatch]

TIMESTAMP = pa.timestamp("us", tz="UTC")
KEY = [pa.field("path", pa.string()), pa.field("length", pa.int64()), pa.field("modified", TIMESTAMP)]
KEY_NAMES = [field.name for field in KEY]
SIZE = [pa.field("width", pa.int32()), pa.field("height", pa.int32())]
ERROR = pa.field("error", pa.string())

# Where a frame is in its video (`helpers.images.video.Frames`): null for images, and for frames that can only be
# counted.
PLACE = [pa.field("pts", pa.int64()), pa.field("seek", pa.int64())]
# Where a member is in its archive (`helpers.images.archive.Member`): null for all else.
RANGE = [pa.field("offset", pa.int64()), pa.field("packed", pa.int64())]
# Where the texts are that lie beside a member, one for each kept column; null where there is none.
BESIDE = pa.field("beside", pa.list_(pa.struct([pa.field("length", pa.int64()), *RANGE])))

LISTED_SCHEMA = pa.schema([*KEY, ERROR])
ASSIGNED_SCHEMA = pa.schema([*KEY, ERROR, *PLACE, *RANGE, BESIDE, pa.field("partition", pa.int32())])
IMAGE_SCHEMA = pa.schema([*KEY, ERROR, pa.field("content", pa.binary())])
TENSOR_SCHEMA = pa.schema([*KEY, *SIZE, ERROR, pa.field("tensor", pa.binary())])

KEPT = "kept"  # a column of structures: of the user's columns that go from the source to the results

BOX = pa.struct([pa.field(name, pa.float32()) for name in ("x1", "y1", "x2", "y2")])
MASK = pa.struct([pa.field("size", pa.list_(pa.int32())), pa.field("counts", pa.string())])
POINT = pa.struct([pa.field(name, pa.float32()) for name in ("x", "y", "score")])
PREDICTION = pa.struct(
    [
        pa.field("class_id", pa.int32()),
        pa.field("label", pa.string()),
        pa.field("score", pa.float32()),
        pa.field("box", BOX),
        pa.field("mask", MASK),
        pa.field("keypoints", pa.list_(POINT)),
    ]
)
PREDICTIONS = pa.list_(PREDICTION)
EMBEDDING = pa.list_(pa.float32())
MODEL = pa.field("model", pa.string())
RESULT_SCHEMA = pa.schema(
    [*KEY, *SIZE, ERROR, pa.field("predictions", PREDICTIONS), pa.field("embedding", EMBEDDING), MODEL]
)
# Of results that versions without keypoints and embeddings have written.
EARLIER_RESULT_SCHEMA = pa.schema(
    [*KEY, *SIZE, ERROR, pa.field("predictions", pa.list_(pa.struct(list(PREDICTION)[:-1]))), MODEL]
)


def shape_column(output: OutputSpec) -> str | None:
    """The column with the shape of an output that differs from image to image; None where all are alike."""
    return f"{output.name}.shape" if OPEN in output.shape else None


def output_schema(manifest: Manifest) -> pa.Schema:
    """Schema of stage 3: a flat float32 list for each of the model's outputs, and its shape where that is open."""
    columns = [pa.field(output.name, pa.list_(pa.float32())) for output in manifest.outputs]
    columns += [pa.field(name, pa.list_(pa.int32())) for name in map(shape_column, manifest.outputs) if name]
    return pa.schema([*KEY, *SIZE, ERROR, *columns])


def extend(batch: pa.RecordBatch, schema: pa.Schema, **columns: Any) -> pa.RecordBatch:
    """The columns of a stage's output: its own where given, else those of its input."""
    arrays = []
    for field in schema:
        column = columns[field.name] if field.name in columns else batch[field.name]
        arrays.append(column if isinstance(column, pa.Array) else pa.array(column, field.type))
    return pa.RecordBatch.from_arrays(arrays, schema=schema)


def conform(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """A table with a schema's columns, and theirs in its structures, null where it has none."""
    missing = {field.type for field in schema if field.name not in table.schema.names}
    nulls = {kind: pa.nulls(table.num_rows, kind) for kind in missing}  # one for all columns of a type
    columns = [
        table[field.name].cast(field.type) if field.name in table.schema.names else nulls[field.type]
        for field in schema
    ]
    return pa.table(columns, schema=schema)
