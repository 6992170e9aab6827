"""The four stages on Spark: one at a time for looking at, or fused in one pass for production.

    ingest -> preprocess -> infer -> postprocess        DataFrames, for a notebook
    run                                                 the same code, fused; results written by the tasks

Only the DataFrame calls that Spark Connect has too are used.
"""

import hashlib
import json
import time
import uuid
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from helpers.bundle.manifest import Bundle, load_bundle
from helpers.bundle.runtime import batch_size
from helpers.config import Config
from helpers.errors import ConfigError
from helpers.pipeline import listing, stages
from helpers.pipeline.arrivals import Arrivals
from helpers.pipeline.catalog import CatalogStore, open_output, open_results
from helpers.pipeline.readers import choose_reader, expand, planned_paths, read_all_by_spark, reading
from helpers.pipeline.records import Stopwatch
from helpers.pipeline.runs import Run, RunSummary
from helpers.pipeline.sources import AUTO_LOADER, TableSource, is_table, open_files, open_table, text_columns
from helpers.pipeline.task import RunModel, Task
from helpers.pipeline.views import Cascade, Tiling
from helpers.session import get_slots, spark_schema
from helpers.storage import open_storage
from helpers.tasks import has_boxes, parameter_names, parameters_for
from helpers.tracking import registry

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession


def ingest(spark: "SparkSession", source: str, config: Config) -> "DataFrame":
    """Stage 1: the images below a location, frames of videos and members of archives among them, with their bytes.

    Returns:
        A DataFrame of `stages.IMAGE_SCHEMA`; nothing is read until an action.
    """
    storage = open_storage(source, config)
    listed = listing.list_images(storage, config)
    images = expand(spark, storage, listed, config)
    listing.check_any(images.num_rows, str(listed), storage, config)
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
    """Run the four stages, fused, over every image below a location, and publish each one's results once.

    Every k-th frame of a video (`video.every`) is an image too, with the path `FILE#frame=N`, and so are members of
    archives, with the path `FILE#member=NAME` and the archive's modification time. Images whose path, length and
    modification time are already in the results, of all models, are skipped, unless their error is not of their bytes
    or `config.resume` is false. A damaged image is a row with an `error`. After the results are published nothing
    raises: pictures, dashboard and record that cannot be written are warnings.

    Results appear slice by slice (`partitioning.slice_images`), and this process's memory does not depend on the number
    of images (`runs`). Other runs may work in the same output meanwhile: an image then has the row of one of them
    (`results`). Source and output may be tables too (`sources`, `catalog`); `cloudFiles:URI` is the files that are new
    since the last run, of which there may be none (`arrivals`).

    `session_seconds`, what the session took to start, is recorded.

    Raises:
        RunError: no image, results of another model in the output, or a failed job.
        HostError: Spark lacks what the source needs.
        BundleError: the model cannot be used.
        StorageError: a location cannot be used.
        ConfigError: a table lacks a column, or settings do not go together.
    """
    watch = Stopwatch()
    task = make_task(source, model, output, config)
    table = open_table(spark, source, config) if is_table(source, config) else None
    arrivals = Arrivals(spark, task, config) if source.startswith(AUTO_LOADER) else None
    return Run(spark, task, output, config, watch, table, session_seconds, arrivals).complete()


def run_frame(frame: "DataFrame", model: str | Sequence[str], output: str, config: Config) -> RunSummary:
    """The same for the rows of a DataFrame; `source.path` or `source.content` says which column has the images.

    The rows are asked for several times, and must be the same each time. Takes and raises what `run` does.
    """
    watch = Stopwatch()
    task = make_task(None, model, output, config)
    table = TableSource.of("a DataFrame", frame, task.source, config)
    return Run(frame.sparkSession, task, output, config, watch, table).complete()


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

    `source` is None where a DataFrame says where the images lie.

    Raises:
        ConfigError: a model is named twice, or settings of the source or the output do not go together.
        BundleError: a model cannot be used.
        StorageError: a location cannot be used.
    """
    models = open_models([model] if isinstance(model, str) else model, config)
    files = open_files(source, config)
    now = time.time()
    # Names of runs are in the order of their starts (`rows_of_later_runs`), of those in the same second too.
    run_id = f"{time.strftime('%Y%m%dT%H%M%S', time.gmtime(now))}-{int(now % 1 * 16**4):04x}{uuid.uuid4().hex[:4]}"
    return Task(
        source=files,
        output=open_output(output, config),
        run=run_id,
        models=models,
        max_bytes=config.max_image_bytes,
        max_pixels=config.ingest.max_pixels,
        **config.inference.model_dump(exclude={"gpu_share"}),
        tiling=Tiling(**config.tiling.model_dump()) if config.tiling.factor else None,
        cascade=cascade_of(models, config),
        kept=pa.schema([]) if source is None or is_table(source, config) else text_columns(config),
    )


# ------------------------------------------------------------ the models of a run


def open_models(uris: Sequence[str], config: Config) -> tuple[RunModel, ...]:
    """Open the bundles of a run, each with its parameters and its name in the results."""
    bundles = [open_bundle(uri, config) for uri in uris]
    models: list[RunModel] = []
    for bundle, parameters in zip(bundles, parameters_of(bundles, config), strict=True):
        detector = models[0].identity if config.cascade.enabled and models else None
        models.append(RunModel(bundle, model_identity(bundle, parameters, config, detector), parameters))
    if len({model.identity for model in models}) < len(models):
        raise ConfigError("--model names the same model twice; name each once")
    return tuple(models)


def open_bundle(uri: str, config: Config) -> Bundle:
    """Open a bundle, or the one of a registered model: `models:/NAME@ALIAS` or `models:/NAME/VERSION`.

    Raises:
        BundleError: it cannot be used, or there is no such model.
        ConfigError: a registered model needs a server that is not set.
    """
    return registry.fetch(uri, config) if uri.startswith(registry.SCHEME) else load_bundle(open_storage(uri, config))


def parameters_of(bundles: Sequence[Bundle], config: Config) -> list[dict[str, Any]]:
    """The post-processing parameters of each model: what it has of those for all, and its own below its name.

    Raises:
        ConfigError: a setting is a parameter of no model, or of a model that the run does not have.
    """
    manifests = [bundle.manifest for bundle in bundles]
    shared = {name: value for name, value in config.postprocess.items() if not isinstance(value, dict)}
    own = {name: value for name, value in config.postprocess.items() if isinstance(value, dict)}
    if strangers := sorted(set(own) - {manifest.name for manifest in manifests}):
        known = ", ".join(manifest.name for manifest in manifests)
        raise ConfigError(f"postprocess.{strangers[0]}: no model of this run has that name; there is {known}")
    names = [parameter_names(manifest) for manifest in manifests]
    nobodys = set(shared).difference(*names)  # which `parameters_for` has an error for
    return [
        parameters_for(
            manifest,
            {name: shared[name] for name in shared if name in known or name in nobodys} | own.get(manifest.name, {}),
        )
        for manifest, known in zip(manifests, names, strict=True)
    ]


def model_identity(bundle: Bundle, parameters: dict[str, Any], config: Config, detector: str | None = None) -> str:
    """Name a model in the results so that whatever changes its predictions changes its name.

    The name is the bundle's, and of a registered model `NAME/VERSION`; a digest follows it. `detector` is the identity
    of the model whose detections it looks at.
    """
    settings: list[Any] = [bundle.manifest.digest, parameters, config.inference.precision]
    if config.inference.device != "CPU":
        settings.append(config.inference.device)
    if detector is not None:
        settings += [detector, config.cascade.model_dump()]
    elif config.tiling.factor:
        settings.append(config.tiling.model_dump())
    text = json.dumps(settings, sort_keys=True)
    return f"{bundle.registered or bundle.manifest.name}@{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def cascade_of(models: tuple[RunModel, ...], config: Config) -> Cascade | None:
    """What of the first model's detections the second one looks at; None where both look at whole images.

    Raises:
        ConfigError: the models are not two, or of tasks that do not go together.
    """
    settings = config.cascade
    if not settings.enabled:
        return None
    tasks = [model.bundle.manifest.task for model in models]
    if len(tasks) != 2:
        count = len(tasks)
        raise ConfigError(f"cascade.enabled needs two models, and this run has {count}; name a detector and another")
    if not has_boxes(tasks[0]):
        raise ConfigError(f"cascade.enabled: the first model is for {tasks[0]}; name one that gives boxes first")
    if tasks[1] == "embedding":
        raise ConfigError("cascade.enabled: the second model gives embeddings, and a row has one; name another model")
    return Cascade(**settings.model_dump(exclude={"enabled"}))
