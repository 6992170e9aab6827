"""A production run, from slice to slice: what is new, its tasks, their files, and what a run tells of itself.

Each slice is compared with the results, planned, worked on and published before the next one is listed.
"""

import contextlib
import json
import logging
import time
import weakref
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import pyarrow as pa
import pyarrow.compute as pc

from helpers.config import Config
from helpers.errors import RunError, first_line, only_warn
from helpers.memory import trim_heap, trimmable
from helpers.partitioning import PartitionPlan
from helpers.pipeline import listing, sail
from helpers.pipeline.arrivals import ARRIVALS, Arrivals
from helpers.pipeline.catalog import open_results
from helpers.pipeline.drift import Distributions
from helpers.pipeline.listing import Known, Listing
from helpers.pipeline.readers import by_partition, choose_reader, expand, planned_paths, read_by_spark
from helpers.pipeline.records import (
    PHASES,
    TASK_SCHEMA,
    Stopwatch,
    shown_settings,
    task_table,
    versions,
    write_record,
)
from helpers.pipeline.report import draw_sample, make_report, read_pictures
from helpers.pipeline.results import Seen, Work
from helpers.pipeline.rows import is_among, outdated, path_range, settled, without
from helpers.pipeline.schemas import KEY_NAMES
from helpers.pipeline.sources import TableSource
from helpers.pipeline.table import File
from helpers.pipeline.task import RECORD_SCHEMA, STAGES, Task, error_kind, pass_through
from helpers.session import expected_slots, get_slots, is_sail, local_slots, spark_failure, spark_schema
from helpers.storage import Storage, open_storage
from helpers.tracking.mlflow import MLflow, server
from helpers.tracking.tensorboard import TensorBoard
from helpers.tracking.watching import call_hook, show_progress, write_prometheus
from helpers.tracking.writers import log_run

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, Row, SparkSession

log = logging.getLogger(__name__)

REASONS_SHOWN = 5
NOWHERE = ("", "")  # a range without any path
PAGE_ROWS = 100_000  # that a run's page counts, some seconds' worth: a nightly run costs what is new
SETTINGS = ("source", "output", "model", "bundle", "flops", "slots", "spark", "versions", "config")  # of a run's record
DISTRIBUTION = "distribution"  # of the predictions, in the table's history

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
    tasks: pa.Table = field(default_factory=TASK_SCHEMA.empty_table, repr=False)  # what each has told
    skipped_errors: Counter[str] = field(default_factory=Counter, repr=False)  # of the skipped; their counts

    @property
    def records(self) -> list[dict[str, Any]]:
        """The rows of `tasks`, which take ten times the memory."""
        return self.tasks.to_pylist()

    @property
    def failed_of_all(self) -> int:
        """How many of the images listed have a row with an error, the skipped among them."""
        return self.failed + self.skipped_errors.total()

    def to_json(self) -> str:
        """One line, without the tasks, the errors of the skipped and the folders not listed."""
        hidden = ("tasks", "skipped_errors", "unlisted")
        return json.dumps({f.name: getattr(self, f.name) for f in fields(self) if f.name not in hidden})

    def reasons(self) -> list[tuple[str, int]]:
        """The commonest errors and how many images have each, the skipped among them."""
        counts = Counter(self.skipped_errors)
        for reason in pc.list_flatten(self.tasks["reasons"]).to_pylist():
            counts[reason["error"]] += reason["count"]
        return counts.most_common(REASONS_SHOWN)


class Run:
    """A run, from slice to slice: what its tasks have told, and what the summary counts."""

    def __init__(
        self,
        spark: "SparkSession",
        task: Task,
        output: str,
        config: Config,
        watch: Stopwatch,
        table: TableSource | None = None,
        session_seconds: float | None = None,
        arrivals: Arrivals | None = None,
    ):
        if table:
            task = replace(task, kept=table.kept)
        self.spark, self.task, self.config, self.watch = spark, task, config, watch
        self.table, self.key = table, table.key if table else KEY_NAMES
        self.arrivals = arrivals
        self.session_seconds, self.pool = session_seconds, ThreadPoolExecutor(1)
        self.models = tuple(model.identity for model in task.models)
        self.store = open_results(spark, output, config, task.kept)
        self.tasks = TASK_SCHEMA.empty_table()  # what they have told
        self.distributions = Distributions()  # of all predictions
        self.waiting: dict[str, File] = {}  # staged by a run that starts over
        self.published: list[str] = []  # files
        self.images = self.unlisted = self.first_partition = self.slots = 0
        self.skipped_errors = Counter[str]()
        self.committed_seconds = 0.0
        self.earlier: list[str] | None = None  # how predictions were distributed in the commits before this run's
        self.tracked: MLflow | None = None
        self._start: Future[None] | None = None
        self._reader: str | None = None

    def complete(self) -> RunSummary:
        """Do all there is to do; takes and raises what `driver.run` does."""
        try:
            with self.pool, trimmable():
                self._open()
                for listed in self.slices():
                    self.work_on(listed)
                    last = str(listed)
                    del listed  # while the next slice is listed, none is held
                    trim_heap()
                return self.end(last)
        except BaseException as error:
            if self.tracked:
                with self.tracked as tracked:
                    tracked.log_text("error.txt", first_line(error))
                    raise
            raise

    def _open(self) -> None:
        """Look at the results, and keep what killed runs have finished."""
        if self.config.resume:
            self.store.resume(*self.models)
            seen = self.store.look(NOWHERE)
        else:
            self.store.prepare()
            seen = Seen()
        if not self.config.resume or (self.arrivals and self.store.is_empty()):
            self.task.output.delete(ARRIVALS)  # because the results will lack, or lack already, what has arrived before
        self.known = Known(seen, self.models, self.config)
        if not self.known and not self.arrivals:  # else there may be nothing to do
            self._warm_up()
        self.watch.lap("open")

    @property
    def processed(self) -> int:
        """Images that tasks have worked on."""
        return self._sum("images")

    def _sum(self, column: str) -> int:
        return pc.sum(self.tasks[column]).as_py() or 0

    def slices(self) -> Iterator[Listing]:
        """What there is, a part at a time."""
        if self.table:
            return self.table.list(self.config)
        source, skip = cast(Storage, self.task.source), self.store.folders
        arrived = self.arrivals.take(skip) if self.arrivals else None
        return listing.list_slices(source, self.config, skip, self.known, arrived)

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
        all_failed: pa.Table | None = None
        # A file is gone where another run has taken it: then the commit tells nothing in any case.
        with contextlib.suppress(FileNotFoundError):
            tried = self.store.rows(record["file"] for record in records if record["failed"])
            all_failed = pa.concat_tables([failed, tried.filter(tried["error"].is_valid())])
            self.known.add(listed, images, all_failed)
        if self.arrivals:
            self.arrivals.settle(listed, all_failed)
        gone = outdated(seen.rows, images, listed.videos, listed.archives)
        files = {record["file"]: File(record["file_bytes"], record["statistics"]) for record in records}
        distributions = [record["distribution"] for record in records]
        self.distributions.merge(distributions)
        if not self.config.resume:
            self.waiting |= files
        elif files or gone.num_rows:
            if self.key != KEY_NAMES:  # a table of bytes does not say how long they are
                todo = self.store.rows(files)
            self._publish(seen, todo, files, gone, Distributions().merge(distributions))
        self.watch.lap("publish")

    def end(self, last: str) -> RunSummary:
        """Publish what has waited, tidy up, and write what a run leaves beside its results.

        Raises:
            RunError: there was no image.
            StorageError: the results cannot be written.
        """
        config, watch, store = self.config, self.watch, self.store
        if not self.arrivals or not config.resume:
            listing.check_any(self.images, last, self.task.source, config)
        if not config.resume:
            nothing = Seen()
            self._publish(nothing, nothing.rows, self.waiting, nothing.rows, self.distributions)
        elif self.known.has_news:
            with only_warn("the next run has to look at all images again"):
                store.note(self.known.tell(self.task.run), self.known.commit)
        if self.arrivals:
            with only_warn("the next run looks at what has arrived once more"):
                self.arrivals.forget()
        watch.lap("publish")
        pictures: list[str] = []
        with only_warn("there are no pictures"):
            # Files are drawn, and not the bytes of a table, which Spark would have to look for.
            files = [] if self.table and self.table.columns.content else sorted(self.published)
            pictures = draw_sample(self.task.output, files, self.task.source, config)
        if config.report and self.tasks.num_rows:
            places = [] if self.table else [cast(Storage, self.task.source)]
            with only_warn("the run has no page"):
                make_report(store, config, sources=places, most_rows=PAGE_ROWS)
        trim_heap()  # of what the page has taken
        watch.lap("log")
        with only_warn("what was staged could not be removed"):
            store.unstage(self.task.run)
            if config.resume:
                store.recover(*self.models)  # of tasks that have outlived their driver until now
        with only_warn("the files that are not in the results any more could not be deleted"):
            store.vacuum(config.results.retention_days)
        watch.lap("publish")
        about = self._describe() | {"drift": {}}
        if self.tasks.num_rows:
            with only_warn("the run's predictions were not compared with earlier ones"):
                about["drift"] = self.distributions.compare(self.earlier or [], config.tracking.drift)
            told = {**about, **watch.laps}, self.tasks, STAGES
            shown = partial(read_pictures, self.task.output, pictures)
            with only_warn("the run has no dashboard", "set paths.runs to a place that can be written"):
                place = open_storage(f"{config.paths.runs}/pipeline/{self.task.run}", config)
                with TensorBoard(place, live=False) as board:
                    log_run(board, *told, shown())
            if self.tracked:
                with only_warn("MLflow does not have all of this run"):
                    log_run(self.tracked, *told, shown())
                self.tracked.close()
                self.tracked = None
            watch.lap("log")
            with only_warn("the record of the run lacks its last seconds"):
                write_record(self.task.output, {**about, **watch.laps})
        summary = self._summarize()
        _tell_watchers(summary, {**about, **watch.laps}, config)
        return summary

    def _warm_up(self) -> "Future[None]":
        """The start of Spark's workers, beside what else this process does."""
        self._start = self._start or self.pool.submit(_start_workers, self.spark)
        return self._start

    def _pass(self, todo: pa.Table, is_last: bool) -> list[dict[str, Any]]:
        """Run the tasks over the new images of a slice, and return what they tell."""
        self.slots = get_slots(self.spark)  # executors come and go between slices
        if self.tracked is None and server(self.config.tracking.mlflow):
            self.tracked = MLflow(self.config.tracking.mlflow, self.task.run)  # which starts beside the tasks
            about = self._describe()
            self.tracked.log_settings({name: about[name] for name in SETTINGS})
        settings = self.config.partitioning
        seconds = settings.image_seconds + self.task.flops / (settings.gflops * 1e9)
        trim_heap()  # of what listing and look have left, before the images are there twice
        plan = listing.plan(todo, self.slots, self.config, seconds, expected_slots(self.spark))
        log.info("%s", plan)
        trim_heap()  # and of what the plan has
        assigned = listing.assign(todo, plan)
        self.watch.lap("list")
        self._warm_up().exception()  # if it failed, so will the run, and say why
        self.watch.lap("open")
        records = self._run_tasks(assigned, plan, is_last)
        del assigned
        trim_heap()
        self.tasks = pa.concat_tables([self.tasks, task_table(records)])
        self.watch.lap("pass")
        with only_warn("the run has no record"):
            write_record(self.task.output, self._describe(), self.tasks)
        self.watch.lap("log")
        return records

    def _run_tasks(self, images: pa.Table, plan: PartitionPlan, is_last: bool) -> list[dict[str, Any]]:
        spark, task, store, config = self.spark, self.task, self.store, self.config
        store.stage(task.run, not config.resume)
        total = self.processed + images.num_rows
        first = self.first_partition
        rows: list[Row] = []
        try:
            with show_progress(total, self._count, self.processed, is_last):
                for part in self._inputs(images, plan):
                    numbered: Any = replace(task, first_partition=first)
                    if is_sail(spark):
                        light = sail.LightTask(**vars(numbered))
                        numbered = sail.Tasks(light, self.slots, config.spark.task_attempts, config.partitioning)
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
            yield by_partition(paths, plan.partitions)
        else:
            yield sail.planned(spark, images) if is_sail(spark) else planned_paths(spark, images, plan)

    def _count(self) -> tuple[int, int]:
        """Images and failed images so far."""
        # What waits is still staged, and what has been published is not.
        images, failed = self.store.progress(self.task.run)
        if not self.config.resume:
            return images, failed
        return images + self.processed, failed + self._sum("failed")

    def _publish(
        self, seen: Seen, todo: pa.Table, files: dict[str, File], gone: pa.Table, distributions: Distributions
    ) -> None:
        if self.earlier is None:
            self.earlier = self.store.told(DISTRIBUTION)
        run, seconds, over = self.task.run, self.watch.laps["seconds"], not self.config.resume
        listed = self.known.tell(run)
        told = {DISTRIBUTION: distributions.to_json()} if distributions else {}
        took = seconds - self.committed_seconds
        work = Work(run, self.models, seen, todo, files, gone, over, took, listed, told)
        self.published += self.store.publish(work)
        self.committed_seconds = seconds
        self.known.told(listed, seen)

    def _describe(self) -> dict[str, Any]:
        """What `RUN.json` holds (`records`)."""
        task, tasks, source = self.task, self.tasks, self.table or self.arrivals
        return {
            "run": task.run,
            "started": self.watch.started.isoformat(),
            "source": source.name if source else task.source.root,
            "output": task.output.root,
            "model": " and ".join(self.models),
            "bundle": " and ".join(model.bundle.manifest.digest for model in task.models),
            "flops": task.flops,
            "slots": self.slots,  # as planned for
            "workers": tasks.group_by(["host", "process"]).aggregate([]).num_rows,
            "partitions": tasks.num_rows,
            **{name: self._sum(name) for name in ("images", "failed", "bytes")},
            "retries": self._sum("attempt"),
            "session_seconds": self.session_seconds,  # until there was one; None where one was there already
            **dict.fromkeys(PHASES[1:]),
            **self.watch.laps,
            "seconds": None,
            "spark": self.spark.version,
            "versions": versions(),
            "config": shown_settings(self.config),
        }

    def _summarize(self) -> RunSummary:
        failed = self._sum("failed")
        laps = self.watch.laps
        return RunSummary(
            images=self.images,
            ok=self.processed - failed,
            failed=failed,
            skipped=self.images - self.processed,
            partitions=self.tasks.num_rows,
            seconds=round(laps["seconds"], 3),
            images_per_second=round(self.processed / laps["pass_seconds"], 2) if self.processed else 0.0,
            results=self.store.location,
            unlisted=self.unlisted,
            tasks=self.tasks,
            skipped_errors=self.skipped_errors,
        )


def _start_workers(spark: "SparkSession") -> None:
    """Have a Python worker in each slot import what a run needs, and the JVM load the classes of a run's plan.

    In the first run of a session all cores would wait for that after the listing; a later run finds it done.
    """
    slots = local_slots(spark)
    if slots is not None and not is_sail(spark) and spark not in _started:  # on a cluster executors may come and go
        table = pa.table({"partition": pa.array(range(slots), pa.int32())})
        rows = spark.createDataFrame(table).repartitionById(slots, "partition")
        rows.mapInArrow(pass_through, rows.schema).collect()
        _started.add(spark)


def _tell_watchers(summary: RunSummary, about: dict[str, Any], config: Config) -> None:
    """Tell those who watch scheduled runs."""
    settings, text = config.tracking, summary.to_json()
    if settings.hook:
        with only_warn("the end-of-run hook failed", "tracking.hook is it"):
            call_hook(settings.hook, text)
    if settings.prometheus:
        with only_warn("the file for Prometheus could not be written", "tracking.prometheus is its place"):
            drift = about["drift"].values()
            shares = {f"drift_{part}": max((one[part] for one in drift), default=0.0) for part in ("classes", "scores")}
            stages = {f"stage_{name}_seconds": pc.sum(summary.tasks[f"{name}_seconds"]).as_py() or 0 for name in STAGES}
            counts = {name: value for name, value in json.loads(text).items() if name != "results"}
            phases = {name: about[name] for name in PHASES if about[name] is not None}
            numbers = phases | stages | shares | counts | {"ended_timestamp_seconds": time.time()}
            write_prometheus(settings.prometheus, numbers, {"results": summary.results, "model": about["model"]})
