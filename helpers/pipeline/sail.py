"""What differs on Sail, a Spark Connect server without a JVM, whose tasks are threads of this process.

It starts all tasks at once, tries each once, numbers none, has no `repartitionById`, and reads a table in as few
partitions as there are cores. So a task here takes its rows from a file by the plan's partition, or a part of a table's
rows, waits for one of the slots, and is tried again as Spark would.
"""

import functools
import itertools
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc

from helpers.bundle import runtime
from helpers.pipeline.schemas import ASSIGNED_SCHEMA, Batches
from helpers.session import process_folder, spark_schema

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

_numbers = itertools.count()  # of the tasks of this process


def planned_paths(spark: "SparkSession", images: pa.Table) -> "DataFrame":
    """As `readers.planned_paths`: rows of `ASSIGNED_SCHEMA`, which come in the order of their partitions."""
    ends = pc.run_end_encode(images["partition"].combine_chunks()) if images.num_rows else None
    bounds = [0, *ends.run_ends.to_pylist()] if ends is not None else [0]
    with tempfile.NamedTemporaryFile(dir=process_folder(), suffix=".arrow", delete=False) as file:
        options = pa.ipc.IpcWriteOptions(compression="zstd")
        with pa.ipc.new_file(file, ASSIGNED_SCHEMA, options=options) as writer:
            for start, end in zip(bounds, bounds[1:], strict=False):
                (batch,) = images.slice(start, end - start).combine_chunks().to_batches()
                writer.write_batch(batch)
    numbers = spark.range(0, max(1, len(bounds) - 1), 1, max(1, len(bounds) - 1))
    return numbers.mapInArrow(functools.partial(_rows, file=file.name), spark_schema(ASSIGNED_SCHEMA))


def _rows(batches: Batches, file: str) -> Iterator[pa.RecordBatch]:
    for number in (number for batch in batches for number in batch.column(0).to_pylist()):
        with pa.memory_map(file) as source:
            reader = pa.ipc.open_file(source)
            if number < reader.num_record_batches:
                yield reader.get_batch(number)


@dataclass(frozen=True)
class Tasks:
    """A partition of Sail's as several tasks of Spark's: so many run at once as there are slots, each tried again."""

    task: Callable[[Batches, int], Iterator[pa.RecordBatch]]
    slots: int
    attempts: int
    target_bytes: int

    def __call__(self, batches: Batches) -> Iterator[pa.RecordBatch]:
        """Run the tasks; what they are given, and what they give, is small enough to be kept."""
        runtime.share(self.slots)
        for rows in _divide(batches, self.target_bytes):
            number = next(_numbers)
            with _slot(self.slots):
                for attempt in range(1, self.attempts + 1):
                    try:
                        results = list(self.task(iter(rows), number))
                        break
                    except Exception:
                        if attempt == self.attempts:
                            raise
            yield from results


def _divide(batches: Batches, target_bytes: int) -> Iterator[list[pa.RecordBatch]]:
    """The rows of one task after the other; paths are few enough for one, and rows with images' bytes may not be."""
    rows: list[pa.RecordBatch] = []
    size = 0
    for batch in batches:
        rows.append(batch)
        size += batch.nbytes
        if size >= target_bytes:
            yield rows
            rows, size = [], 0
    if rows:
        yield rows


@functools.cache
def _slot(slots: int) -> AbstractContextManager[Any]:
    return threading.BoundedSemaphore(slots)
