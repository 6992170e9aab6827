"""Image files packed into Parquet shards by Spark, for training to read few large files instead of many small.

A data set of millions of files is slow to read in random order from object storage; a shard is read whole. Executors
import this module, so it has no torch. `datasets.Shards` reads.
"""

import json
import math
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq

from helpers.errors import DataError
from helpers.images.boundary import reason
from helpers.storage import Storage, open_storage
from helpers.storage.prefetch import map_groups

if TYPE_CHECKING:
    from pyspark.sql import DataFrame

    from helpers.config import Config

INDEX = "_index.json"  # readers of Parquet folders pass over a name that begins so
WRITTEN_SCHEMA = pa.schema({"shard": pa.string(), "rows": pa.int64()})
IMAGES_AT_ONCE = 256  # that a task reads before it compresses them


def write_shards(
    rows: "DataFrame",
    images: str,
    target: str,
    images_per_shard: int = 1000,
    config: "Config | None" = None,
    labels: Sequence[str] = (),
) -> int:
    """Pack images and what is known of them into shards, in Spark tasks; which is in which is as good as random.

    Only rows cross Spark's exchange, no image: each task reads the files of its shard and writes it. The index comes
    last, so that a training never meets half a data set. Returns the number of images.

    Args:
        rows: `file` string, relative to `images`, and any columns that training needs: `label` int for the classifier,
            for YOLACT those of the table that `coco.read_annotations` gives.
        images: where the files are.
        target: a location of its own for the shards; those of an earlier call are replaced.
        images_per_shard: about; a rank holds a few shards in memory.
        config: how object storage is reached.
        labels: names of the classes, which YOLACT takes from the data set.

    Raises:
        DataError: there is no image, or one cannot be read.
    """
    from pyspark.sql.functions import spark_partition_id, xxhash64

    from helpers.session import spark_failure, spark_schema

    source, storage = open_storage(images, config), open_storage(target, config)
    count = rows.count()
    if not count:
        raise DataError(f"there are no labeled images of {images} to write to {target}")
    storage.delete(INDEX)
    shuffled = rows.repartition(math.ceil(count / images_per_shard), xxhash64("file"))
    numbered = shuffled.sortWithinPartitions(xxhash64("file")).withColumn("_shard", spark_partition_id())
    written = numbered.mapInArrow(partial(_write_shard, source, storage), spark_schema(WRITTEN_SCHEMA))
    try:
        shard_rows = written.collect()
    except Exception as error:
        raise DataError(spark_failure(error)) from None
    shards = sorted(({"file": row.shard, "rows": row.rows} for row in shard_rows), key=lambda shard: shard["file"])
    for entry in list(storage.list()):
        if entry.path.endswith(".parquet") and not entry.path.endswith(tuple(shard["file"] for shard in shards)):
            storage.delete(entry.path)
    index = {"columns": [*rows.columns, "content"], "labels": list(labels), "shards": shards}
    storage.write(INDEX, json.dumps(index).encode())
    return sum(shard["rows"] for shard in shards)


def _write_shard(source: Storage, storage: Storage, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    parts = (batch.slice(i, IMAGES_AT_ONCE) for batch in batches for i in range(0, batch.num_rows, IMAGES_AT_ONCE))
    first = next(parts, None)
    if first is None:
        return
    # A task that is tried again writes the same under the same name, and whole or not at all.
    name, rows = f"shard-{first['_shard'][0].as_py():06d}.parquet", 0
    schema = first.schema.remove(first.schema.get_field_index("_shard")).append(pa.field("content", pa.binary()))
    shard = pa.BufferOutputStream()
    with pq.ParquetWriter(shard, schema) as writer:
        for part in chain([first], parts):
            (contents,) = map_groups(partial(_read, source), [part["file"].to_pylist()], source.concurrent_reads)
            columns = [part[name] for name in schema.names[:-1]]
            writer.write_batch(pa.record_batch([*columns, pa.array(contents, pa.binary())], schema=schema))
            rows += part.num_rows
    storage.write(name, shard.getvalue().to_pybytes())
    yield pa.record_batch([[name], [rows]], schema=WRITTEN_SCHEMA)


def _read(source: Storage, file: str) -> bytes:
    try:
        return source.read(file)
    except OSError as error:
        raise DataError(f"{source.join(file)}: {reason(error)}; mend it, or leave its row out") from None
