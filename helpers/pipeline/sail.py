"""What differs on Sail, a Spark Connect server without a JVM, whose tasks are threads of this process.

It starts all tasks at once, tries each once, numbers none, and has no `repartitionById`. So it gets as many as there
are slots. Each works on one partition of the plan after the other, taken from a file that they share, or on one part
of a table's rows after the other, and tries each again as Spark would.
"""

import contextlib
import functools
import itertools
import logging
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc

from helpers import memory
from helpers.bundle import runtime
from helpers.config import PartitionSettings
from helpers.images.boundary import MORE_THAN_LEFT
from helpers.pipeline.schemas import ASSIGNED_SCHEMA, Batches
from helpers.pipeline.task import Clock, Task
from helpers.session import get_slots, process_folder, spark_schema

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

log = logging.getLogger(__name__)

LOOK_SECONDS = 0.05  # in which a decoder can take some 100 MB

PLANNED = "planned"

_numbers = itertools.count()  # of the tasks of this process
_taken: dict[str, Iterator[int]] = {}  # by a plan's file: its partitions, each for one task
_starts: list[Callable[[], Any]] = []  # how this process starts again, with Spark, if it may


def planned_paths(spark: "SparkSession", images: pa.Table) -> "DataFrame":
    """As `readers.planned_paths`: rows of `ASSIGNED_SCHEMA`, which come in the order of their partitions."""
    return planned(spark, images).mapInArrow(_rows, spark_schema(ASSIGNED_SCHEMA))


def planned(spark: "SparkSession", images: pa.Table) -> "DataFrame":
    """What `Tasks` take for rows in the order of their partitions: the numbers of these, and the file that has them."""
    from pyspark.sql import functions as F

    ends = pc.run_end_encode(images["partition"].combine_chunks()) if images.num_rows else None
    bounds = [0, *ends.run_ends.to_pylist()] if ends is not None else [0]
    with tempfile.NamedTemporaryFile(dir=process_folder(), suffix=".arrow", delete=False) as file:
        options = pa.ipc.IpcWriteOptions(compression="zstd")
        with pa.ipc.new_file(file, ASSIGNED_SCHEMA, options=options) as writer:
            for start, end in zip(bounds, bounds[1:], strict=False):
                (batch,) = images.slice(start, end - start).combine_chunks().to_batches()
                writer.write_batch(batch)
    numbers = spark.range(0, len(bounds) - 1, 1, max(1, min(len(bounds) - 1, get_slots(spark))))
    return numbers.select("id", F.lit(file.name).alias(PLANNED))


def _rows(batches: Batches) -> Iterator[pa.RecordBatch]:
    """The partitions that a task was given by their numbers."""
    for batch in batches:
        for row in batch.to_pylist():
            yield from _read(row[PLANNED], [row["id"]])


def _read(file: str, numbers: Iterable[int]) -> Iterator[pa.RecordBatch]:
    """So many partitions of a plan, until there is none of a number."""
    with pa.memory_map(file) as source:
        reader = pa.ipc.open_file(source)
        for number in numbers:
            if number >= reader.num_record_batches:
                break
            yield reader.get_batch(number)


class LightTask(Task):
    """A run's task, which leaves images that take much memory to Spark (`within`)."""

    def results(
        self, batches: Batches, clock: Clock | None = None, memory_megabytes: int | None = None
    ) -> Iterator[pa.RecordBatch]:
        """As a task of Spark's, but what an image may take is what all tasks together leave."""
        for batch in super().results(batches, clock, self.memory_megabytes):
            if pc.any(pc.match_substring(batch["error"], MORE_THAN_LEFT)).as_py():
                _leave_to_spark("an image")
            yield batch


@dataclass(frozen=True)
class Tasks:
    """A partition of Sail's as several tasks of Spark's: so many run at once as there are slots, each tried again."""

    task: Callable[[Batches, int], Iterator[pa.RecordBatch]]
    slots: int
    attempts: int
    limits: PartitionSettings

    def __call__(self, batches: Batches) -> Iterator[pa.RecordBatch]:
        """Run the tasks; what they are given, and what they give, is small enough to be kept."""
        runtime.share(self.slots)
        memory.share()
        for rows in self._inputs(batches):
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

    def _inputs(self, batches: Batches) -> Iterator[list[pa.RecordBatch]]:
        """What each task is given: of a plan a partition, of a table so many rows."""
        rows: list[pa.RecordBatch] = []
        size = count = 0
        for batch in batches:
            if PLANNED in batch.schema.names:
                file = batch[PLANNED][0].as_py()
                # All tasks count together, and who is done earlier takes more.
                yield from ([partition] for partition in _read(file, _taken.setdefault(file, itertools.count())))
                return
            rows.append(batch)
            size, count = size + batch.nbytes, count + batch.num_rows
            if size >= self.limits.target_bytes or count >= self.limits.target_images:
                yield rows
                rows, size, count = [], 0, 0
        if rows:
            yield rows


@functools.cache
def _slot(slots: int) -> AbstractContextManager[Any]:
    return threading.BoundedSemaphore(slots)


@contextlib.contextmanager
def within(megabytes: int, start_again: Callable[[], Any]) -> Iterator[None]:
    """Start this process again, with Spark, where the block takes it beyond so many megabytes.

    Each of Spark's workers has a bound (`memory.bounded`), and then the error is that of one image. A process of many
    tasks can only be looked at, so that what one of them may not take is left to Spark.
    """
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(LOOK_SECONDS):
            if memory.resident_megabytes() > megabytes:
                _leave_to_spark("all tasks together")

    _starts.append(start_again)
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        _starts.clear()
        ended.set()
        watcher.join()


def _leave_to_spark(what: str) -> None:
    for start_again in _starts:
        log.warning("on Sail %s would take %s: Spark goes on, whose workers have a bound each", what, MORE_THAN_LEFT)
        start_again()
