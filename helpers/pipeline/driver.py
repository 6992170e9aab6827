"""The four stages on Spark: one at a time for looking at, or fused in one pass for production.

    ingest -> preprocess -> infer -> postprocess        DataFrames, for a notebook
    run                                                 the same code, fused; results written by the tasks

Only the DataFrame calls that Spark Connect has too are used.
"""

import json
import logging
import time
import uuid
import weakref
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from helpers.bundle.runtime import batch_size
from helpers.config import Config
from helpers.errors import RunError, StorageError, only_warn
from helpers.partitioning import PartitionPlan
from helpers.pipeline import listing, stages
from helpers.pipeline.drift import Distributions
from helpers.pipeline.models import cascade_of, model_identity, open_bundle, open_models, parameters_of
from helpers.pipeline.readers import choose_reader, expand, planned_paths, read_all_by_spark, read_by_spark, reading
from helpers.pipeline.records import PHASES, Stopwatch, describe, write_record
from helpers.pipeline.results import ResultStore, Work
from helpers.pipeline.rows import is_among, outdated, settled, without
from helpers.pipeline.sample import draw_sample, read_pictures
from helpers.pipeline.table import File
from helpers.pipeline.task import RECORD_SCHEMA, STAGES, Task, error_kind, pass_through
from helpers.pipeline.views import Tiling
from helpers.session import get_slots, local_slots, spark_failure, spark_schema
from helpers.storage import open_storage
from helpers.tracking.mlflow import MLflow, server
from helpers.tracking.progress import Progress
from helpers.tracking.tensorboard import TensorBoard
from helpers.tracking.watching import call_hook, write_prometheus
from helpers.tracking.writers import log_run

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, Row, SparkSession

log = logging.getLogger(__name__)

REASONS_SHOWN = 5
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
    images = expand(spark, storage, listing.list_images(storage, config), config)
    plan = listing.plan(images, get_slots(spark), config)
    assigned = listing.assign(images, plan)
    if choose_reader(spark, storage, assigned, config) == "spark":
        return read_all_by_spark(spark, storage, assigned, config)
    return planned_paths(spark, assigned, plan).mapInArrow(reading(storage, config), spark_schema(stages.IMAGE_SCHEMA))


def preprocess(images: "DataFrame", model: str, config: Config) -> "DataFrame":
    """Stage 2: decoded and resized as the bundle's manifest says; a DataFrame of `stages.TENSOR_SCHEMA`."""
    bundle = open_bundle(model, config)
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
    bundle = open_bundle(model, config)
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
    bundle = open_bundle(model, config)
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
    """Run the four stages, fused, over every image below a location, and publish the results once.

    Every k-th frame of a video (`video.every`) is an image too, with the path `FILE#frame=N`, and so are members of
    archives, with the path `FILE#member=NAME` and the archive's modification time. Images whose path, length and
    modification time are already in the results are skipped, unless their error is not of their bytes or
    `config.resume` is false; the results then replace all earlier ones when they are published. A damaged image is a
    row with an `error`. `session_seconds`, what the session took to start, is recorded. After the results are
    published nothing raises: pictures, dashboard and record that cannot be written are warnings.

    With several models every image is decoded once, and has a row per model; it is skipped when it has all of them.

    Other runs may work in the same output meanwhile: an image then has the row of one of them (`results`).

    Raises:
        RunError: no image, results of another model in the output, or a failed job.
        BundleError: the model cannot be used.
        StorageError: a location cannot be used.
    """
    watch = Stopwatch()
    task = make_task(source, model, output, config)
    models = tuple(model.identity for model in task.models)
    store = ResultStore(task.output)
    tracked = MLflow(config.tracking.mlflow, task.run) if server(config.tracking.mlflow) else None
    with ThreadPoolExecutor(1) as pool:
        warm_up = pool.submit(_start_workers, spark)
        seen = store.resume(*models) if config.resume else store.look(with_rows=False)
        slots = get_slots(spark)
        watch.lap("open")
        listed = listing.list_images(task.source, config, skip=store.folders)
        images = expand(spark, task.source, listed, config)
        settled_rows = settled(seen.rows, len(models))
        todo = without(images, settled_rows)
        plan = listing.plan(todo, slots, config, _image_seconds(task, config))
        log.info("%d images, %d done already; %s", images.num_rows, images.num_rows - todo.num_rows, plan)
        watch.lap("list")
        warm_up.exception()  # if it failed, so will the run, and say why
        watch.lap("open")
        records = _run_tasks(spark, task, listing.assign(todo, plan), plan, store, config)
        seconds = watch.lap("pass")
        about = describe(task, spark, config, slots, watch, records, session_seconds)
        if records:
            with only_warn("the run has no record"):
                write_record(task.output, about, records)
        watch.lap("log")
        files = {record["file"]: File(record["file_bytes"], record["statistics"]) for record in records}
        gone = outdated(seen.rows, images, listed.videos, listed.archives)
        took = watch.laps["seconds"]
        distributions, distances = _compare(store, records, config)
        told = {DISTRIBUTION: distributions.to_json()}
        published = store.publish(Work(task.run, models, seen, todo, files, gone, not config.resume, took, told))
        with only_warn("what was staged could not be removed"):
            store.unstage(task.run)
            if config.resume:
                store.recover(*models)  # of tasks that have outlived their driver until now
        with only_warn("the files that are not in the results any more could not be deleted"):
            store.vacuum(config.results.retention_days)
        watch.lap("publish")
        pictures: list[str] = []
        with only_warn("there are no pictures"):
            pictures = draw_sample(task.output, published, task.source, config)
        about["drift"] = distances
        if records:
            with only_warn("the run has no dashboard", "set paths.runs to a place that can be written"):
                board = TensorBoard(open_storage(f"{config.paths.runs}/pipeline/{task.run}", config), live=False)
                log_run(board, {**about, **watch.laps}, records, STAGES, read_pictures(task.output, pictures))
            if tracked:
                log_run(tracked, {**about, **watch.laps}, records, STAGES, read_pictures(task.output, pictures))
        watch.lap("log")
        if records:
            with only_warn("the record of the run lacks its last seconds"):
                write_record(task.output, {**about, **watch.laps})
    unlisted = listed.left_out.get(listing.UNLISTED, 0)
    summary = _summarize(images, records, seconds, watch.laps["seconds"], store, settled_rows, unlisted)
    _report(summary, {**about, **watch.laps}, config)
    return summary


def read_results(spark: "SparkSession", output: str, config: Config, version: int | None = None) -> "DataFrame":
    """The results below an output, the newest or those of an earlier version of the table; `stages.RESULT_SCHEMA`.

    Raises:
        StorageError: there is no such version, or the table is damaged.
    """
    storage = open_storage(output, config)
    store, schema = ResultStore(storage), spark_schema(stages.RESULT_SCHEMA)
    if config.spark.mode == "databricks":  # which has Delta, and reads no table's files as plain Parquet
        options = {} if version is None else {"versionAsOf": version}
        return spark.read.format("delta").options(**options).load(store.location)
    paths = [storage.join(path) for path in store.files(version)]
    return spark.read.schema(schema).parquet(*paths) if paths else spark.createDataFrame([], schema)


def make_task(source: str, model: str | Sequence[str], output: str, config: Config) -> Task:
    """Everything the tasks of a run share; `Task.results` also runs in one process, without Spark.

    Args:
        source: where the images lie.
        model: a bundle's location, or several.
        output: where results go.
        config: settings.

    Raises:
        ConfigError: a model is named twice.
        BundleError: a model cannot be used.
        StorageError: a location cannot be used.
    """
    models = open_models([model] if isinstance(model, str) else model, config)
    images = open_storage(source, config)
    if not images.exists(""):
        raise StorageError(f"{images.root}: no such folder; check the --source location")
    run_id = f"{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}-{uuid.uuid4().hex[:8]}"
    return Task(
        source=images,
        output=open_storage(output, config),
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


def _run_tasks(
    spark: "SparkSession", task: Task, images: pa.Table, plan: PartitionPlan, store: ResultStore, config: Config
) -> list[dict[str, Any]]:
    if not images.num_rows:
        return []
    store.stage(task.run, not config.resume)
    try:
        if choose_reader(spark, task.source, images, config) == "spark":
            parts = read_by_spark(spark, task.source, images, config)
        else:
            parts = iter([planned_paths(spark, images, plan)])
        rows: list[Row] = []
        with Progress(images.num_rows, partial(store.progress, task.run)):
            for part in parts:
                numbered = replace(task, first_partition=1 + max((row.partition for row in rows), default=-1))
                rows += part.mapInArrow(numbered, spark_schema(RECORD_SCHEMA)).collect()
    except Exception as error:
        raise RunError(f"the run stopped: {spark_failure(error)}") from error
    records = [row.asDict(recursive=True) for row in rows]
    if sum(record["images"] for record in records) < images.num_rows:
        # What Spark's reader has passed over gets its rows here: read after all, or with the error that this gives.
        left = without(images, store.rows([record["file"] for record in records]))
        log.info("the driver reads %d images that Spark has passed over", left.num_rows)
        records += [record for batch in task(left.to_batches()) for record in batch.to_pylist()]
    peak = max((record["peak_megabytes"] for record in records), default=0)
    if peak > config.inference.memory_megabytes:
        log.warning("a task took %.0f MB, more than inference.memory_megabytes: set it higher", peak)
    processed = sum(record["images"] for record in records)
    if processed != images.num_rows:
        raise RunError(f"{images.num_rows} images went in and {processed} came out; nothing was published")
    return records


def _compare(
    store: ResultStore, records: list[dict[str, Any]], config: Config
) -> tuple[Distributions, dict[str, dict[str, float]]]:
    """How a run's predictions are distributed, and how far that is from those of earlier runs of the same models."""
    distributions = Distributions().merge(record["distribution"] for record in records)
    distances: dict[str, dict[str, float]] = {}
    if not records:
        return distributions, distances
    with only_warn("the run's predictions were not compared with earlier ones"):
        distances = distributions.distances(Distributions().merge(store.told(DISTRIBUTION)))
        for model, parts in distances.items():
            for part, distance in parts.items():
                if distance > config.tracking.drift:
                    log.warning(
                        "the %s that %s finds are distributed otherwise than in earlier runs: their Jensen-Shannon "
                        "distance is %.2f, more than tracking.drift=%g; look at the images",
                        part, model, distance, config.tracking.drift,
                    )  # fmt: skip
    return distributions, distances


def _report(summary: RunSummary, about: dict[str, Any], config: Config) -> None:
    """Tell those who watch scheduled runs."""
    settings, text = config.tracking, summary.to_json()
    if settings.hook:
        with only_warn("the end-of-run hook failed", "tracking.hook is it"):
            call_hook(settings.hook, text)
    if settings.prometheus:
        with only_warn("the file for Prometheus could not be written", "tracking.prometheus is its place"):
            shares = {
                f"drift_{part}": max((parts[part] for parts in about["drift"].values()), default=0.0)
                for part in ("classes", "scores")
            }
            stages = {f"stage_{name}_seconds": sum(r[f"{name}_seconds"] for r in summary.records) for name in STAGES}
            counts = {name: value for name, value in json.loads(text).items() if name != "results"}
            phases = {name: about[name] for name in PHASES if about[name] is not None}
            ended = {"ended_timestamp_seconds": time.time()}
            numbers = {**phases, **stages, **shares, **counts, **ended}
            write_prometheus(settings.prometheus, numbers, {"results": summary.results, "model": about["model"]})


def _summarize(
    images: pa.Table,
    records: list[dict[str, Any]],
    pass_seconds: float,
    seconds: float,
    store: ResultStore,
    settled_rows: pa.Table,
    unlisted: int,
) -> RunSummary:
    processed = sum(record["images"] for record in records)
    failed = sum(record["failed"] for record in records)
    damaged = settled_rows.filter(settled_rows["error"].is_valid())
    damaged = damaged.filter(is_among(damaged, images))
    errors = dict(zip(damaged["path"].to_pylist(), damaged["error"].to_pylist(), strict=True))  # one per image
    return RunSummary(
        images=images.num_rows,
        ok=processed - failed,
        failed=failed,
        skipped=images.num_rows - processed,
        partitions=len(records),
        seconds=round(seconds, 3),
        images_per_second=round(processed / pass_seconds, 2) if processed else 0.0,
        results=store.location,
        unlisted=unlisted,
        records=records,
        skipped_errors=Counter(map(error_kind, errors.values())),
    )


def _image_seconds(task: Task, config: Config) -> float:
    return config.partitioning.image_seconds + task.flops / (config.partitioning.gflops * 1e9)
