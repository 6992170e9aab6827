"""One task of a production run: the four stages fused, and the results written to storage from the task itself.

A task leaves one Parquet file in the run's staging folder and returns one row about itself; the driver publishes the
files of the tasks that Spark accepted (`helpers.pipeline.results`). Executors import this module.
"""

import itertools
import math
import os
import resource
import shutil
import socket
import sys
import tempfile
import time
import zipimport
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from helpers import tasks
from helpers.bundle.manifest import Bundle
from helpers.bundle.runtime import batch_size, loading_seconds
from helpers.images.video import split_paths
from helpers.pipeline import stages, views
from helpers.pipeline.drift import Distributions
from helpers.pipeline.reading import read_beside
from helpers.pipeline.rows import Statistics, count_values
from helpers.pipeline.schemas import KEPT, RESULT_SCHEMA, TIMESTAMP, Batches, conform
from helpers.pipeline.views import Cascade, Tiling, Views
from helpers.storage import Storage
from helpers.storage.interface import Files
from helpers.storage.parquet import read_table, write_table

T = TypeVar("T")

STAGING = "_staging"
ROW_GROUP_BYTES = 8 * 2**20
SPOOL_BYTES = 16 * 2**20
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
        pa.field("file_bytes", pa.int64()),
        pa.field("statistics", pa.string()),  # of the file's rows, as Delta's log has them
        pa.field("distribution", pa.string()),  # of their predictions, as `drift.Distributions` writes them
        pa.field("images", pa.int64()),
        pa.field("failed", pa.int64()),  # with one model at least
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
class RunModel:
    """One model of a run: its bundle, what the results' `model` column says, and its post-processing's parameters."""

    bundle: Bundle
    identity: str
    parameters: dict[str, Any]


@dataclass(frozen=True)
class Task:
    """What a run's tasks share: plain values and references only, because it is pickled into each."""

    source: Files
    output: Storage
    run: str
    models: tuple[RunModel, ...]
    max_bytes: int
    max_pixels: int
    precision: str | None
    threads: int
    batch_megabytes: int
    max_batch: int
    memory_megabytes: int
    device: str
    tiling: Tiling | None = None
    cascade: Cascade | None = None
    kept: pa.Schema = pa.schema([])  # the user's columns of the source that the results have too
    first_partition: int = 0  # a run may have several jobs, whose partitions Spark counts from 0 each

    @property
    def schema(self) -> pa.Schema:
        """Of the results."""
        return pa.schema([*RESULT_SCHEMA, *self.kept])

    @property
    def flops(self) -> int:
        """Floating-point operations for one image, of all models together."""
        return sum(model.bundle.manifest.flops for model in self.models)

    def __call__(self, batches: Batches, partition: int = 0) -> Iterator[pa.RecordBatch]:
        """Run one partition: the input of `results` in, one row of `RECORD_SCHEMA` out (no images, no row).

        Where Spark does not say the number of the `partition`, the caller does.
        """
        from pyspark import TaskContext

        context, attempt = TaskContext.get(), 0
        if context:
            partition, attempt = context.partitionId(), context.attemptNumber()
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
            **{f"{stage}_seconds": clock.exclusive[stage] for stage in STAGES},
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
        """The fused stages: `ASSIGNED_SCHEMA` in, or `IMAGE_SCHEMA` if Spark has read; works without Spark too.

        Where columns of the source are kept, the input has them in a further one, `schemas.KEPT`, or says where they
        are (`schemas.BESIDE`).
        """
        chain = Chain(self, clock or Clock(), memory_megabytes)
        if not self.kept:
            return chain.results(batches)
        kept = KeptColumns(self.kept, len(self.models))
        inputs = kept.remember(read_beside(batches, self.source, self.kept))
        return kept.append(chain.results(inputs))


class KeptColumns:
    """The user's columns of the images that are on their way through a task's stages, which know nothing of them."""

    def __init__(self, schema: pa.Schema, models: int):
        self._type, self._models = pa.struct(list(schema)), models
        self._rows: dict[str, pa.Array] = {}  # by path: its values, a slice of its batch's
        self._left = Counter[str]()  # results that are to come

    def remember(self, batches: Batches) -> Iterator[pa.RecordBatch]:
        """Take the kept columns off the stages' input."""
        for batch in batches:
            values = batch[KEPT].cast(self._type)
            for row, path in enumerate(batch["path"].to_pylist()):
                self._rows[path] = values.slice(row, 1)
                self._left[path] = self._models
            yield batch.drop_columns([KEPT])

    def append(self, results: Batches) -> Iterator[pa.RecordBatch]:
        """Put them behind the columns of the results."""
        for batch in results:
            paths = batch["path"].to_pylist()
            values = pa.concat_arrays([self._rows[path] for path in paths] or [pa.array([], self._type)])
            self._left.subtract(paths)
            for path in {*paths}:
                if not self._left[path]:
                    del self._left[path], self._rows[path]
            schema = pa.schema([*batch.schema, *self._type])
            yield pa.RecordBatch.from_arrays([*batch.columns, *values.flatten()], schema=schema)


@dataclass(frozen=True)
class Chain:
    """The stages of one task, chained: where pixels are decoded once for several models or views, and what follows."""

    task: Task
    clock: "Clock"
    memory_megabytes: int | None

    def results(self, batches: Batches) -> Iterator[pa.RecordBatch]:
        """The rows of each image, `RESULT_SCHEMA`."""
        task, limits = self.task, (self.task.max_pixels, self.memory_megabytes)
        size, budget = max(map(self._batch_size, task.models)), task.batch_megabytes * 2**20
        images = stages.read_images(batches, task.source, size, budget, task.max_bytes, *limits)
        images = self.clock.timed("read", images)
        if len(task.models) == 1 and task.tiling is None:
            (model,) = task.models
            return self._predict(stages.preprocess(images, model.bundle.manifest.input, size, *limits), model)
        decoded = views.decode_each(images, *limits)
        results = self._whole(decoded, task.models[0]) if len(task.models) == 1 else self._in_turn(decoded)
        return self.clock.timed("postprocess", results)

    def _in_turn(self, images: Iterator[Views]) -> Iterator[pa.RecordBatch]:
        """The results of several models, one after the other, for so many images that these fit into memory."""
        for group in self.clock.timed("preprocess", views.in_groups(images)):
            if self.task.cascade is not None:
                yield from self._cascade(group, self.task.cascade)
            else:
                for model in self.task.models:
                    yield from self._whole(group, model)
            group.clear()

    def _whole(self, images: Iterable[Views], model: RunModel) -> Iterator[pa.RecordBatch]:
        """The results of one model for images, of the tiles of large ones if so set."""
        if self.task.tiling is None:
            return self._predict(self._preprocess(images, model), model)
        return views.to_results(self._tiled(images, model))

    def _cascade(self, images: list[Views], cascade: Cascade) -> Iterator[pa.RecordBatch]:
        """The results of a detector, and those of a second model for the detections."""
        detector, second = self.task.models
        rows = [row for finished in self._tiled(images, detector) for row in finished]
        crops = views.crop_each(images, rows, second.bundle.manifest, second.parameters, cascade)
        return views.to_results(itertools.chain([rows], self._joined(crops, second)))

    def _tiled(self, images: Iterable[Views], model: RunModel) -> Iterator[views.Rows]:
        tiling = self.task.tiling or Tiling(math.inf, 0)
        return self._joined(views.tile_each(images, model.bundle.manifest, model.parameters, tiling), model)

    def _joined(self, images: Iterator[Views], model: RunModel) -> Iterator[views.Rows]:
        """A row per image, of its views' results."""
        waiting: deque[Views] = deque()
        tensors = self._preprocess(views.remember(images, waiting), model)
        unfiltered = replace(model, parameters=tasks.without_filters(model.parameters))
        return views.join(self._predict(tensors, unfiltered), waiting)

    def _preprocess(self, images: Iterable[Views], model: RunModel) -> Iterator[pa.RecordBatch]:
        spec, size = model.bundle.manifest.input, self._batch_size(model)
        return views.preprocess_views(images, spec, size, self.memory_megabytes)

    def _predict(self, tensors: Batches, model: RunModel) -> Iterator[pa.RecordBatch]:
        """Stages 3 and 4 of one model."""
        task, manifest = self.task, model.bundle.manifest
        settings = task.precision, task.threads, self.memory_megabytes, _with_number(task.device)
        outputs = stages.infer(self.clock.timed("preprocess", tensors), model.bundle, *settings)
        outputs = self.clock.timed("infer", outputs)
        results = stages.postprocess(outputs, manifest, model.parameters, model.identity, model.bundle.read)
        return self.clock.timed("postprocess", results)

    def _batch_size(self, model: RunModel) -> int:
        return batch_size(model.bundle, self.task.batch_megabytes, self.task.max_batch)


def _with_number(device: str) -> str:
    """A device with the number of the GPU that Spark has given to this task, where it gives any."""
    if device not in ("GPU", "CUDA"):
        return device
    from pyspark import TaskContext

    context = TaskContext.get()
    gpus = context.resources().get("gpu") if context else None
    return f"{device}.{gpus.addresses[0]}" if gpus else device


def pass_through(batches: Batches) -> Iterator[pa.RecordBatch]:
    """Do nothing with them: a worker that is given this has imported all that a run needs."""
    import openvino  # noqa: F401

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
    """Seconds spent in each stage of generators, which run inside one another.

    And those of the processor: `cpu_seconds` of all threads, `thread_seconds` of this one.
    """

    def __init__(self) -> None:
        self.start = self._last = time.perf_counter()
        self.cpu_seconds, self.thread_seconds = -time.process_time(), -time.thread_time()
        self.exclusive = dict.fromkeys(STAGES, 0.0)
        self.seconds = 0.0
        self._stage = STAGES[-1]  # what takes the results is at work where no stage is

    def timed(self, stage: str, batches: Iterable[T]) -> Iterator[T]:
        """Pass batches on; the time that making them takes is the stage's, less that of stages inside it."""
        iterator = iter(batches)
        while True:
            outer = self._enter(stage)
            batch = next(iterator, None)
            self._enter(outer)
            if batch is None:
                return
            yield batch

    def finish(self, load_seconds: float = 0.0) -> None:
        """End the last stage; so many seconds of the inference were loading the model."""
        self._enter(STAGES[-1])
        self.seconds = self._last - self.start
        self.cpu_seconds += time.process_time()
        self.thread_seconds += time.thread_time()
        self.exclusive["load"] = load_seconds
        self.exclusive["infer"] -= load_seconds

    def _enter(self, stage: str) -> str:
        """Book the time since the last change, begin a stage, and return the one that was at work."""
        now = time.perf_counter()
        self.exclusive[self._stage] += now - self._last
        self._last, left, self._stage = now, self._stage, stage
        return left


def _write(task: Task, partition: int, batches: Batches) -> dict[str, Any]:
    """Write a partition's results as one Parquet file, under a name that tells the driver how many there are."""
    rows, failures, files = Counter[str](), dict[str, str](), dict[str, int]()
    statistics, distributions = Statistics(), Distributions()
    # On disk only where a partition's results are large; the storage then gets the file whole.
    with tempfile.SpooledTemporaryFile(max_size=SPOOL_BYTES) as spool:
        with pq.ParquetWriter(spool, task.schema, compression="zstd") as writer:
            for table in _row_groups(batches):
                writer.write_table(table)
                statistics.add(table)
                distributions.add(table)
                rows.update(count_values(table["model"]))
                failed = table.filter(table["error"].is_valid())
                failures.update(zip(failed["path"].to_pylist(), failed["error"].to_pylist(), strict=True))
                paths, frames = split_paths(table["path"])
                # An image that is too long is not read, and of a video all frames together are the file.
                read = pc.or_(frames.is_valid(), pc.less_equal(table["length"], task.max_bytes))
                lengths = pc.if_else(read, table["length"], 0).to_pylist()
                files.update(zip(paths.to_pylist(), lengths, strict=True))
        images = min(rows[model.identity] for model in task.models)  # an image has a row of each
        if not images:
            return {}
        path = f"{staging(task.run)}/{partition:06d}-{images}-{len(failures)}.parquet"
        file_bytes = spool.tell()
        spool.seek(0)
        with task.output.create(path) as file:
            shutil.copyfileobj(spool, file)
    reasons = Counter(map(error_kind, failures.values())).most_common(REASONS)
    top = [{"error": error, "count": count} for error, count in reasons]
    return {
        "file": path,
        "file_bytes": file_bytes,
        "statistics": statistics.to_json(),
        "distribution": distributions.to_json(),
        "images": images,
        "failed": len(failures),
        "bytes": sum(files.values()),
        "reasons": top,
    }


def error_kind(error: str) -> str:
    """An error without its details, to be counted."""
    return error.partition(";")[0]


def staging(run: str) -> str:
    """The folder below the output where a run's tasks leave their files."""
    return f"{STAGING}/{run}"


def read_staged(batches: Batches, storage: Storage, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    """Read files of tasks again: a column `path` in, their rows out with the file in the last column of the schema."""
    for batch in batches:
        for path in batch["path"].to_pylist():
            rows = read_table(storage, path)
            rows = rows.append_column(schema.names[-1], pa.array([path] * rows.num_rows, pa.string()))
            yield from conform(rows, schema).to_batches()


def write_rows(batches: Batches, storage: Storage, folder: str) -> Iterator[pa.RecordBatch]:
    """Write rows of `RESULT_SCHEMA` to files of some megabytes each; a column `path` of these comes out."""
    from pyspark import TaskContext

    context = TaskContext.get()
    assert context is not None
    for number, rows in enumerate(_row_groups(batches)):
        path = f"{folder}/{context.partitionId():06d}-{context.attemptNumber()}-{number}.parquet"
        write_table(storage, path, conform(rows, RESULT_SCHEMA))
        yield pa.RecordBatch.from_pydict({"path": [path]})


def _row_groups(batches: Batches) -> Iterator[pa.Table]:
    waiting: list[pa.RecordBatch] = []
    for batch in batches:
        waiting.append(batch)
        if sum(b.nbytes for b in waiting) >= ROW_GROUP_BYTES:
            yield pa.Table.from_batches(waiting)
            waiting = []
    if waiting:
        yield pa.Table.from_batches(waiting)
