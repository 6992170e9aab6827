"""The four stages on Spark: one at a time for looking at, or fused in one pass for production.

    ingest -> preprocess -> infer -> postprocess        DataFrames, for a notebook
    run                                                 the same code, fused; results written by the tasks

Only the DataFrame calls that Spark Connect has too are used.
"""

import contextlib
import json
import logging
import time
import uuid
import weakref
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, fields, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, cast

import pyarrow as pa

from helpers.bundle.manifest import load_bundle
from helpers.bundle.runtime import batch_size
from helpers.config import Config
from helpers.errors import RunError, only_warn
from helpers.partitioning import PartitionPlan
from helpers.pipeline import listing, stages
from helpers.pipeline.catalog import CatalogStore, open_output, open_results
from helpers.pipeline.known import Known
from helpers.pipeline.listing import Listing
from helpers.pipeline.models import cascade_of, model_identity, open_models, parameters_of
from helpers.pipeline.readers import choose_reader, expand, planned_paths, read_all_by_spark, read_by_spark, reading
from helpers.pipeline.records import Stopwatch, describe, write_record
from helpers.pipeline.results import Seen, Work
from helpers.pipeline.rows import is_among, outdated, path_range, settled, without
from helpers.pipeline.sample import draw_sample, read_pictures
from helpers.pipeline.schemas import KEY_NAMES
from helpers.pipeline.sources import TableSource, is_table, open_files, open_table, text_columns
from helpers.pipeline.table import File
from helpers.pipeline.task import RECORD_SCHEMA, STAGES, Task, error_kind, pass_through
from helpers.pipeline.views import Tiling
from helpers.session import get_slots, local_slots, spark_failure, spark_schema
from helpers.storage import Storage, open_storage
from helpers.tracking.progress import Progress
from helpers.tracking.tensorboard import log_run

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, Row, SparkSession

log = logging.getLogger(__name__)

REASONS_SHOWN = 5
NOWHERE = ("", "")  # a range without any path

_started: "weakref.WeakSet[SparkSession]" = weakref.WeakSet()  # sessions whose workers have imported all they need


@dataclass(frozen=True)
class RunSummary:
    """What one run did; `images` = `ok` + `failed` + `skipped`.

    `images` are those listed, `ok` and `failed` those worked on; `skipped` have a row of an earlier run that still
    holds, with predictions or with an error of the image's bytes. `images_per_second` counts the images processed over
    the wall time of the distributed pass, model loading in it, session start-up and listing left out; `seconds` is the
    whole run. With several models an image counts once, and has failed if it has with one of them. Nobody knows how
    many images are in the `unlisted` folders, which could not be listed.
    """

    images: int
    ok: int
    failed: int
    skipped: int
    partitions: int
    seconds: float
    images_per_second: float
    results: str
    unlisted: int = 0
    records: list[dict[str, Any]] = field(default_factory=list, repr=False)  # `task.RECORD_SCHEMA`, one a task
    skipped_errors: Counter[str] = field(default_factory=Counter, repr=False)  # of the skipped; their counts

    @property
    def failed_of_all(self) -> int:
        """How many of the images listed have a row with an error, the skipped among them."""
        return self.failed + self.skipped_errors.total()

    def to_json(self) -> str:
        """One line, without the tasks' records, the errors of the skipped and the folders not listed."""
        hidden = ("records", "skipped_errors", "unlisted")
        return json.dumps({f.name: getattr(self, f.name) for f in fields(self) if f.name not in hidden})

    def reasons(self) -> list[tuple[str, int]]:
        """The commonest errors and how many images have each, the skipped among them."""
        counts = Counter(self.skipped_errors)
        for record in self.records:
            counts.update({reason["error"]: reason["count"] for reason in record["reasons"]})
        return counts.most_common(REASONS_SHOWN)


def ingest(spark: "SparkSession", source: str, config: Config) -> "DataFrame":
    """Stage 1: the images below a location, frames of videos and members of archives among them, with their bytes.

    Returns:
        A DataFrame of `stages.IMAGE_SCHEMA`; nothing is read until an action.
    """
    storage = open_storage(source, config)
    listed = listing.list_images(storage, config)
    images = expand(spark, storage, listed, config)
    listing.check_any(images.num_rows, listed, storage, config)
    plan = listing.plan(images, get_slots(spark), config)
    assigned = listing.assign(images, plan)
    if choose_reader(spark, storage, assigned, config) == "spark":
        return read_all_by_spark(spark, storage, assigned, config)
    return planned_paths(spark, assigned, plan).mapInArrow(reading(storage, config), spark_schema(stages.IMAGE_SCHEMA))


def preprocess(images: "DataFrame", model: str, config: Config) -> "DataFrame":
    """Stage 2: decoded and resized as the bundle's manifest says; a DataFrame of `stages.TENSOR_SCHEMA`."""
    bundle = load_bundle(open_storage(model, config))
    stage = partial(
        stages.preprocess,
        spec=bundle.manifest.input,
        max_images=batch_size(bundle, config.inference.batch_megabytes, config.inference.max_batch),
        max_pixels=config.ingest.max_pixels,
        memory_megabytes=config.inference.memory_megabytes,
    )
    return images.mapInArrow(stage, spark_schema(stages.TENSOR_SCHEMA))


def infer(tensors: "DataFrame", model: str, config: Config) -> "DataFrame":
    """Stage 3: OpenVINO on every executor; a DataFrame of `stages.output_schema(manifest)`."""
    bundle = load_bundle(open_storage(model, config))
    stage = partial(
        stages.infer,
        bundle=bundle,
        precision=config.inference.precision,
        threads=config.inference.threads,
        memory_megabytes=config.inference.memory_megabytes,
        device=config.inference.device,
    )
    return tensors.mapInArrow(stage, spark_schema(stages.output_schema(bundle.manifest)))


def postprocess(outputs: "DataFrame", model: str, config: Config) -> "DataFrame":
    """Stage 4: predictions; a DataFrame of `stages.RESULT_SCHEMA`."""
    bundle = load_bundle(open_storage(model, config))
    (parameters,) = parameters_of([bundle], config)
    stage = partial(
        stages.postprocess,
        manifest=bundle.manifest,
        parameters=parameters,
        model=model_identity(bundle, parameters, config),
        read=bundle.read,
    )
    return outputs.mapInArrow(stage, spark_schema(stages.RESULT_SCHEMA))


def run(
    spark: "SparkSession",
    source: str,
    model: str | Sequence[str],
    output: str,
    config: Config,
    session_seconds: float | None = None,
) -> RunSummary:
    """Run the four stages, fused, over every image below a location, and publish each one's results once.

    Every k-th frame of a video (`video.every`) is an image too, with the path `FILE#frame=N`, and so are members of
    archives, with the path `FILE#member=NAME` and the archive's modification time. Images whose path, length and
    modification time are already in the results are skipped, unless their error is not of their bytes or
    `config.resume` is false. A damaged image is a row with an `error`. `session_seconds`, what the session took to
    start, is recorded. After the results are published nothing raises: pictures, dashboard and record that cannot be
    written are warnings.

    The images are worked on in slices of `partitioning.slice_images`: what is new in one is found out and done, and its
    results are published, before the next is listed. So results appear slice by slice, and this process's memory does
    not depend on the number of images. With `config.resume` false the tasks' files of all slices wait, and replace all
    earlier results in one step at the end: a reader never misses an image.

    With several models every image is decoded once, and has a row per model; it is skipped when it has all of them.

    Other runs may work in the same output meanwhile: an image then has the row of one of them (`results`).

    Source and output may be tables too, at a location or of Spark's catalog (`sources`, `catalog`).

    Raises:
        RunError: no image, results of another model in the output, or a failed job.
        BundleError: the model cannot be used.
        StorageError: a location cannot be used.
        ConfigError: a table lacks a column, or settings do not go together.
    """
    watch = Stopwatch()
    task = make_task(source, model, output, config)
    table = open_table(spark, source, config) if is_table(source, config) else None
    return _run(spark, task, table, output, config, watch, session_seconds)


def run_frame(frame: "DataFrame", model: str | Sequence[str], output: str, config: Config) -> RunSummary:
    """The same for the rows of a DataFrame; `source.path` or `source.content` says which column has the images.

    The rows are asked for several times, and must be the same each time. Takes and raises what `run` does.
    """
    watch = Stopwatch()
    task = make_task(None, model, output, config)
    table = TableSource.of("a DataFrame", frame, task.source, config)
    return _run(frame.sparkSession, task, table, output, config, watch, None)


def _run(
    spark: "SparkSession",
    task: Task,
    table: TableSource | None,
    output: str,
    config: Config,
    watch: Stopwatch,
    session_seconds: float | None,
) -> RunSummary:
    if table:
        task = replace(task, kept=table.kept)
    with ThreadPoolExecutor(1) as pool:
        current = _Run(spark, task, table, output, config, watch, session_seconds, pool)
        for listed in current.slices():
            current.work_on(listed)
        return current.end(listed)


def read_results(spark: "SparkSession", output: str, config: Config, version: int | None = None) -> "DataFrame":
    """The results of an output, the newest or those of an earlier version of the table.

    The columns are those of `stages.RESULT_SCHEMA`, and then those that the runs have kept of their sources.

    Raises:
        StorageError: there is no such version, or the table is damaged.
    """
    store = open_results(spark, output, config)
    if isinstance(store, CatalogStore):
        return store.frame(version)
    if config.spark.mode == "databricks":  # which has Delta, and reads no table's files as plain Parquet
        options = {} if version is None else {"versionAsOf": version}
        return spark.read.format("delta").options(**options).load(store.location)
    schema, paths = spark_schema(store.schema(version)), [store.storage.join(path) for path in store.files(version)]
    return spark.read.schema(schema).parquet(*paths) if paths else spark.createDataFrame([], schema)


def make_task(source: str | None, model: str | Sequence[str], output: str, config: Config) -> Task:
    """Everything the tasks of a run share; `Task.results` also runs in one process, without Spark.

    Args:
        source: where the images lie; None where a DataFrame says it.
        model: a bundle's location, or several.
        output: where results go.
        config: settings.

    Raises:
        ConfigError: a model is named twice, or settings of the source or the output do not go together.
        BundleError: a model cannot be used.
        StorageError: a location cannot be used.
    """
    models = open_models([model] if isinstance(model, str) else model, config)
    files = open_files(source, config)
    run_id = f"{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}-{uuid.uuid4().hex[:8]}"
    return Task(
        source=files,
        output=open_output(output, config),
        run=run_id,
        models=models,
        max_bytes=config.max_image_bytes,
        max_pixels=config.ingest.max_pixels,
        precision=config.inference.precision,
        threads=config.inference.threads,
        batch_megabytes=config.inference.batch_megabytes,
        max_batch=config.inference.max_batch,
        memory_megabytes=config.inference.memory_megabytes,
        device=config.inference.device,
        tiling=Tiling(config.tiling.factor, config.tiling.overlap) if config.tiling.factor else None,
        cascade=cascade_of(models, config),
        kept=pa.schema([]) if source is None or is_table(source, config) else text_columns(config),
    )


def _start_workers(spark: "SparkSession") -> None:
    """Have a Python worker in each slot import what a run needs, and the JVM load the classes of a run's plan.

    In the first run of a session all cores would wait for that after the listing; a later run finds it done.
    """
    slots = local_slots(spark)
    if slots is not None and spark not in _started:  # on a cluster executors may come and go
        table = pa.table({"partition": pa.array(range(slots), pa.int32())})
        rows = spark.createDataFrame(table).repartitionById(slots, "partition")
        rows.mapInArrow(pass_through, rows.schema).collect()
        _started.add(spark)


class _Run:
    """A run, from slice to slice: what its tasks have told, and what the summary counts."""

    def __init__(
        self,
        spark: "SparkSession",
        task: Task,
        table: TableSource | None,
        output: str,
        config: Config,
        watch: Stopwatch,
        session_seconds: float | None,
        pool: ThreadPoolExecutor,
    ):
        self.spark, self.task, self.config, self.watch = spark, task, config, watch
        self.table, self.key = table, table.key if table else KEY_NAMES
        self.session_seconds, self.pool = session_seconds, pool
        self.models = tuple(model.identity for model in task.models)
        self.store = open_results(spark, output, config, task.kept)
        self.records: list[dict[str, Any]] = []
        self.waiting: dict[str, File] = {}  # staged by a run that starts over
        self.published: list[str] = []  # files
        self.images = self.unlisted = self.first_partition = 0
        self.skipped_errors = Counter[str]()
        self.committed_seconds = 0.0
        if config.resume:
            self.store.resume(*self.models)
            seen = self.store.look(NOWHERE)
        else:
            self.store.prepare()
            seen = Seen()
        self.known = Known(seen, self.models, config)
        self._start: Future[None] | None = None
        self._reader: str | None = None
        if not self.known:  # else there may be nothing to do
            self._warm_up()
        watch.lap("open")

    @cached_property
    def slots(self) -> int:
        """Tasks that run at once."""
        return get_slots(self.spark)

    @property
    def processed(self) -> int:
        """Images that tasks have worked on."""
        return sum(record["images"] for record in self.records)

    def slices(self) -> Iterator[Listing]:
        """What there is, a part at a time."""
        if self.table:
            return self.table.list(self.config)
        return listing.list_slices(cast(Storage, self.task.source), self.config, self.store.folders, self.known)

    def work_on(self, listed: Listing) -> None:
        """Do what is new in one slice, and publish it unless the run starts over."""
        count, errors = self.known.take(listed.known)
        self.images += count
        self.skipped_errors.update(errors)
        self.unlisted = listed.left_out.get(listing.UNLISTED, 0)
        if count:
            log.info("%d images are as an earlier run has told, and not looked up", count)
        within = path_range(listed.images, listed.videos, listed.archives)
        if within is None:
            self.watch.lap("list")
            return
        self._warm_up()
        images = expand(self.spark, self.task.source, listed, self.config, () if self.table else self.task.kept.names)
        seen = self.store.look(within) if self.config.resume else Seen()
        self.known.look(seen)
        rows = settled(seen.rows, len(self.models))
        todo = without(images, rows, self.key)
        self.images += images.num_rows
        log.info("%d images, %d of them done already", images.num_rows, images.num_rows - todo.num_rows)
        self.watch.lap("list")
        records = self._pass(todo, listed.is_last) if todo.num_rows else []
        failed = rows.filter(rows["error"].is_valid())
        failed = failed.filter(is_among(failed, images, self.key))
        # One error per image.
        skipped = dict(zip(failed["path"].to_pylist(), failed["error"].to_pylist(), strict=True))
        self.skipped_errors.update(map(error_kind, skipped.values()))
        # A file is gone where another run has taken it: then the commit tells nothing in any case.
        with contextlib.suppress(FileNotFoundError):
            tried = self.store.rows(record["file"] for record in records if record["failed"])
            failed = pa.concat_tables([failed, tried.filter(tried["error"].is_valid())])
            self.known.add(listed, images, failed)
        gone = outdated(seen.rows, images, listed.videos, listed.archives)
        files = {record["file"]: File(record["file_bytes"], record["statistics"]) for record in records}
        if not self.config.resume:
            self.waiting |= files
        elif files or gone.num_rows:
            if self.key != KEY_NAMES:  # a table of bytes does not say how long they are
                todo = self.store.rows(files)
            self._publish(seen, todo, files, gone)
        self.watch.lap("publish")

    def end(self, last: Listing) -> RunSummary:
        """Publish what has waited, tidy up, and write what a run leaves beside its results.

        Args:
            last: the last slice.

        Raises:
            RunError: there was no image.
            StorageError: the results cannot be written.
        """
        config, watch, store = self.config, self.watch, self.store
        listing.check_any(self.images, last, self.task.source, config)
        if not config.resume:
            nothing = Seen()
            self._publish(nothing, nothing.rows, self.waiting, nothing.rows)
        elif self.known.has_news:
            with only_warn("the next run has to look at all images again"):
                store.note(self.known.tell(self.task.run), self.known.commit)
        watch.lap("publish")
        pictures: list[str] = []
        with only_warn("there are no pictures"):
            # Files are drawn, and not the bytes of a table, which Spark would have to look for.
            files = [] if self.table and self.table.columns.content else sorted(self.published)
            pictures = draw_sample(self.task.output, files, self.task.source, config)
        watch.lap("log")
        with only_warn("what was staged could not be removed"):
            store.unstage(self.task.run)
            if config.resume:
                store.recover(*self.models)  # of tasks that have outlived their driver until now
        with only_warn("the files that are not in the results any more could not be deleted"):
            store.vacuum(config.results.retention_days)
        watch.lap("publish")
        if self.records:
            about = self._describe()
            with only_warn("the run has no dashboard", "set paths.runs to a place that can be written"):
                place = open_storage(f"{config.paths.runs}/pipeline/{self.task.run}", config)
                log_run(place, {**about, **watch.laps}, self.records, STAGES, read_pictures(self.task.output, pictures))
            watch.lap("log")
            with only_warn("the record of the run lacks its last seconds"):
                write_record(self.task.output, {**about, **watch.laps})
        return self._summarize()

    def _warm_up(self) -> "Future[None]":
        """The start of Spark's workers, beside what else this process does."""
        self._start = self._start or self.pool.submit(_start_workers, self.spark)
        return self._start

    def _pass(self, todo: pa.Table, is_last: bool) -> list[dict[str, Any]]:
        """Run the tasks over the new images of a slice, and return what they tell.

        Args:
            todo: those images.
            is_last: whether no slice follows.
        """
        plan = listing.plan(todo, self.slots, self.config, _image_seconds(self.task, self.config))
        log.info("%s", plan)
        assigned = listing.assign(todo, plan)
        self.watch.lap("list")
        self._warm_up().exception()  # if it failed, so will the run, and say why
        self.watch.lap("open")
        records = self._run_tasks(assigned, plan, is_last)
        self.records += records
        self.watch.lap("pass")
        with only_warn("the run has no record"):
            write_record(self.task.output, self._describe(), self.records)
        self.watch.lap("log")
        return records

    def _run_tasks(self, images: pa.Table, plan: PartitionPlan, is_last: bool) -> list[dict[str, Any]]:
        spark, task, store, config = self.spark, self.task, self.store, self.config
        store.stage(task.run, not config.resume)
        progress = Progress(self.processed + images.num_rows, self._count, self.processed, is_last)
        first = self.first_partition
        rows: list[Row] = []
        try:
            with progress:
                for part in self._inputs(images, plan):
                    numbered = replace(task, first_partition=first)
                    rows += part.mapInArrow(numbered, spark_schema(RECORD_SCHEMA)).collect()
                    first = max(first, 1 + max((row.partition for row in rows), default=-1))
        except Exception as error:
            raise RunError(f"the run stopped: {spark_failure(error)}") from error
        records = [row.asDict(recursive=True) for row in rows]
        if sum(record["images"] for record in records) < images.num_rows:
            # What Spark's reader has passed over gets its rows here: read after all, or with the error that this gives.
            left = without(images, store.rows([record["file"] for record in records]))
            log.info("the driver reads %d images that Spark has passed over", left.num_rows)
            numbered = replace(task, first_partition=first)
            rows_left = self.table.with_kept(spark.createDataFrame(left)).toArrow() if self.table else left
            records += [record for batch in numbered(rows_left.to_batches()) for record in batch.to_pylist()]
        self.first_partition = first + 1
        peak = max((record["peak_megabytes"] for record in records), default=0)
        if peak > config.inference.memory_megabytes:
            log.warning("a task took %.0f MB, more than inference.memory_megabytes: set it higher", peak)
        processed = sum(record["images"] for record in records)
        if processed != images.num_rows:
            raise RunError(f"{images.num_rows} images went in and {processed} came out; none of them was published")
        return records

    def _inputs(self, images: pa.Table, plan: PartitionPlan) -> Iterator["DataFrame"]:
        """What the tasks take (`Task.results`), as DataFrames to be used one after the other."""
        spark, source, config, table = self.spark, self.task.source, self.config, self.table
        if table and table.columns.content:
            yield table.contents(images)
            return
        self._reader = self._reader or choose_reader(spark, source, images, config)
        if self._reader == "spark":
            for part in read_by_spark(spark, source, images, config):
                yield table.with_kept(part) if table else part
        elif table:
            paths = table.with_kept(spark.createDataFrame(images))
            yield paths.repartitionById(max(1, plan.partitions), "partition")
        else:
            yield planned_paths(spark, images, plan)

    def _count(self) -> tuple[int, int]:
        """Images and failed images so far."""
        # What waits is still staged, and what has been published is not.
        records = self.records if self.config.resume else []
        images, failed = self.store.progress(self.task.run)
        return images + sum(r["images"] for r in records), failed + sum(r["failed"] for r in records)

    def _publish(self, seen: Seen, todo: pa.Table, files: dict[str, File], gone: pa.Table) -> None:
        run, seconds, over = self.task.run, self.watch.laps["seconds"], not self.config.resume
        told = self.known.tell(run)
        work = Work(run, self.models, seen, todo, files, gone, over, seconds - self.committed_seconds, told)
        self.published += self.store.publish(work)
        self.committed_seconds = seconds
        self.known.told(told, seen)

    def _describe(self) -> dict[str, Any]:
        own = self.slots, self.watch, self.records, self.session_seconds
        about = describe(self.task, self.spark, self.config, *own)
        return about | {"source": self.table.name} if self.table else about

    def _summarize(self) -> RunSummary:
        failed = sum(record["failed"] for record in self.records)
        laps = self.watch.laps
        return RunSummary(
            images=self.images,
            ok=self.processed - failed,
            failed=failed,
            skipped=self.images - self.processed,
            partitions=len(self.records),
            seconds=round(laps["seconds"], 3),
            images_per_second=round(self.processed / laps["pass_seconds"], 2) if self.processed else 0.0,
            results=self.store.location,
            unlisted=self.unlisted,
            records=self.records,
            skipped_errors=self.skipped_errors,
        )


def _image_seconds(task: Task, config: Config) -> float:
    return config.partitioning.image_seconds + task.flops / (config.partitioning.gflops * 1e9)
