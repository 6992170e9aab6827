"""One task of a production run: the four stages fused, and the results written to storage from the task itself.

A task leaves one Parquet file in the run's staging folder and returns one row about itself; the driver publishes the
files of the tasks that Spark accepted (`helpers.pipeline.results`). Executors import this module.
"""

import os
import resource
import shutil
import socket
import sys
import tempfile
import time
import zipimport
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from helpers.bundle.manifest import Bundle
from helpers.bundle.runtime import batch_size, loading_seconds
from helpers.images.video import split_paths
from helpers.pipeline import stages
from helpers.pipeline.schemas import TIMESTAMP, Batches
from helpers.storage import Storage

STAGING = "_staging"
ROW_GROUP_BYTES = 8 * 2**20
SPOOL_BYTES = 16 * 2**20
ON_DRIVER = 999_999  # the partition of what the driver does itself
REASONS = 20  # distinct errors a task reports; the results have them all

REASON = pa.struct([pa.field("error", pa.string()), pa.field("count", pa.int64())])
STAGES = ("load", "read", "preprocess", "infer", "postprocess", "write")  # load: of the model, once a process
RECORD_SCHEMA = pa.schema(
    [
        pa.field("partition", pa.int32()),
        pa.field("attempt", pa.int32()),
        pa.field("host", pa.string()),
        pa.field("executor", pa.int32()),  # the process that its workers are children of; one on a host and executor
        pa.field("process", pa.int32()),
        pa.field("file", pa.string()),
        pa.field("images", pa.int64()),
        pa.field("failed", pa.int64()),
        pa.field("bytes", pa.int64()),
        pa.field("reasons", pa.list_(REASON)),
        pa.field("started", TIMESTAMP),
        pa.field("seconds", pa.float64()),
        *(pa.field(f"{stage}_seconds", pa.float64()) for stage in STAGES),
        pa.field("cpu_seconds", pa.float64()),  # of the processor, all threads together
        pa.field("thread_seconds", pa.float64()),  # of these the task's own thread: everything but inference
        pa.field("peak_megabytes", pa.float64()),
    ]
)


@dataclass(frozen=True)
class Task:
    """What a run's tasks share: plain values and references only, because it is pickled into each."""

    source: Storage
    output: Storage
    run: str
    bundle: Bundle
    model: str
    parameters: dict[str, Any]
    max_bytes: int
    max_pixels: int
    precision: str | None
    threads: int
    batch_megabytes: int
    max_batch: int
    memory_megabytes: int
    first_partition: int = 0  # a run may have several jobs, whose partitions Spark counts from 0 each

    def __call__(self, batches: Batches) -> Iterator[pa.RecordBatch]:
        """Run one partition: the input of `results` in, one row of `RECORD_SCHEMA` out (no images, no row)."""
        from pyspark import TaskContext

        context = TaskContext.get()
        partition, attempt = (context.partitionId(), context.attemptNumber()) if context else (ON_DRIVER, 0)
        partition += self.first_partition
        started, clock, loaded = datetime.now(UTC), Clock(), loading_seconds()
        # The budget is of Spark's workers; the driver has much else in memory.
        memory_megabytes = self.memory_megabytes if context else None
        counts = _write(self, partition, self.results(batches, clock, memory_megabytes))
        if not counts:
            return
        clock.finish(loading_seconds() - loaded)
        record = {
            "partition": partition,
            "attempt": attempt,
            "host": socket.gethostname(),
            "executor": os.getppid(),
            "process": os.getpid(),
            "started": started,
            "seconds": clock.seconds,
            **{f"{stage}_seconds": clock.exclusive.get(stage, 0.0) for stage in STAGES},
            "cpu_seconds": clock.cpu_seconds,
            "thread_seconds": clock.thread_seconds,
            # Linux counts kilobytes
            "peak_megabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            **counts,
        }
        yield pa.RecordBatch.from_pylist([record], schema=RECORD_SCHEMA)
        forget_archives()

    def results(
        self, batches: Batches, clock: "Clock | None" = None, memory_megabytes: int | None = None
    ) -> Iterator[pa.RecordBatch]:
        """The fused stages: `ASSIGNED_SCHEMA` in, or `IMAGE_SCHEMA` if Spark has read; works without Spark too."""
        clock = clock or Clock()
        images = batch_size(self.bundle, self.batch_megabytes, self.max_batch)
        spec = self.bundle.manifest.input
        limits = self.max_bytes, self.max_pixels, memory_megabytes
        read = stages.read_images(batches, self.source, images, self.batch_megabytes * 2**20, *limits)
        tensors = stages.preprocess(clock.timed("read", read), spec, images, self.max_pixels, memory_megabytes)
        outputs = stages.infer(
            clock.timed("preprocess", tensors), self.bundle, self.precision, self.threads, memory_megabytes
        )
        results = stages.postprocess(
            clock.timed("infer", outputs), self.bundle.manifest, self.parameters, self.model, self.bundle.read
        )
        return clock.timed("postprocess", results)


def pass_through(batches: Batches) -> Iterator[pa.RecordBatch]:
    """Do nothing with them: a worker that is given this has imported all that a run needs."""
    yield from batches


def forget_archives() -> None:
    """Save this worker's next task 80 ms.

    Spark has each worker call `importlib.invalidate_caches` before each task, on which every importer of a zip archive
    reads the archive's whole directory again, and `pyspark.zip` has thousands of entries. An importer that is not in
    the cache is made anew when a module is next looked for, from a directory that is kept.
    """
    importers = sys.path_importer_cache.items()
    for path in [path for path, importer in importers if isinstance(importer, zipimport.zipimporter)]:
        del sys.path_importer_cache[path]


class Clock:
    """Seconds spent in each stage of a chain of generators, which run inside one another.

    And those of the processor: `cpu_seconds` of all threads, `thread_seconds` of this one.
    """

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.cpu_seconds, self.thread_seconds = -time.process_time(), -time.thread_time()
        self.inclusive: dict[str, float] = {}
        self.exclusive: dict[str, float] = {}
        self.seconds = 0.0

    def timed(self, stage: str, batches: Batches) -> Iterator[pa.RecordBatch]:
        """Pass batches on, adding the time that making them takes, upstream stages included."""
        self.inclusive[stage] = 0.0
        iterator = iter(batches)
        while True:
            start = time.perf_counter()
            batch = next(iterator, None)
            self.inclusive[stage] += time.perf_counter() - start
            if batch is None:
                return
            yield batch

    def finish(self, load_seconds: float = 0.0) -> None:
        """Take the upstream stages' time out of each; what is left of the whole is writing.

        Args:
            load_seconds: what of the inference was loading the model.
        """
        self.seconds = time.perf_counter() - self.start
        self.cpu_seconds += time.process_time()
        self.thread_seconds += time.thread_time()
        upstream = 0.0
        for stage in STAGES[1:-1]:
            self.exclusive[stage] = self.inclusive[stage] - upstream
            upstream = self.inclusive[stage]
        self.exclusive["write"] = self.seconds - upstream
        self.exclusive["load"] = load_seconds
        self.exclusive["infer"] -= load_seconds


def _write(task: Task, partition: int, batches: Batches) -> dict[str, Any]:
    """Write a partition's results as one Parquet file, under a name that tells the driver how many there are."""
    totals, reasons, files = Counter[str](), Counter[str](), dict[str, int]()
    # On disk only where a partition's results are large; the storage then gets the file whole.
    with tempfile.SpooledTemporaryFile(max_size=SPOOL_BYTES) as spool:
        with pq.ParquetWriter(spool, stages.RESULT_SCHEMA, compression="zstd") as writer:
            for table in _row_groups(batches):
                writer.write_table(table)
                errors = table["error"].drop_null()
                totals.update(images=table.num_rows, failed=len(errors))
                paths, frames = split_paths(table["path"])
                # An image that is too long is not read, and of a video all frames together are the file.
                read = pc.or_(frames.is_valid(), pc.less_equal(table["length"], task.max_bytes))
                lengths = pc.if_else(read, table["length"], 0).to_pylist()
                files.update(zip(paths.to_pylist(), lengths, strict=True))
                reasons.update(map(error_kind, errors.to_pylist()))
        if not totals["images"]:
            return {}
        path = f"{staging(task.run)}/{partition:06d}-{totals['images']}-{totals['failed']}.parquet"
        spool.seek(0)
        with task.output.create(path) as file:
            shutil.copyfileobj(spool, file)
    top = [{"error": error, "count": count} for error, count in reasons.most_common(REASONS)]
    return {
        "file": path,
        "images": totals["images"],
        "failed": totals["failed"],
        "bytes": sum(files.values()),
        "reasons": top,
    }


def error_kind(error: str) -> str:
    """An error without its details, to be counted."""
    return error.partition(";")[0]


def staging(run: str) -> str:
    """The folder below the output where a run's tasks leave their files."""
    return f"{STAGING}/{run}"


def staged_counts(path: str) -> tuple[int, int]:
    """Images and failed images of a task's file, from its name; the driver sees progress in them."""
    _, images, failed = path.rpartition("/")[2].removesuffix(".parquet").split("-")
    return int(images), int(failed)


def _row_groups(batches: Batches) -> Iterator[pa.Table]:
    waiting: list[pa.RecordBatch] = []
    for batch in batches:
        waiting.append(batch)
        if sum(b.nbytes for b in waiting) >= ROW_GROUP_BYTES:
            yield pa.Table.from_batches(waiting)
            waiting = []
    if waiting:
        yield pa.Table.from_batches(waiting)
