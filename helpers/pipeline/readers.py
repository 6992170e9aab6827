"""Two ways from paths to bytes, one DataFrame (`stages.IMAGE_SCHEMA`).

    files   the task that decodes an image reads it too: nothing is exchanged but paths, and the plan is kept
    spark   Spark's `binaryFile` reads, where only Spark can reach the storage (Unity Catalog, serverless); videos are
            read by the tasks nevertheless, and are error rows where these cannot

`binaryFile` silently leaves empty files out, and folders with an image's suffix; both come back from the listing.
"""

import logging
import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.compute as pc

from helpers.config import Config
from helpers.errors import RunError
from helpers.images.video import split_paths
from helpers.partitioning import PartitionPlan
from helpers.pipeline import stages
from helpers.pipeline.frames import FRAMES_SCHEMA, list_frames, with_frames
from helpers.pipeline.listing import Listing
from helpers.pipeline.listing import manifest as make_manifest
from helpers.pipeline.listing import plan as make_plan
from helpers.pipeline.schemas import PLACE, Batches
from helpers.session import get_slots, local_slots, set_where_allowed, spark_failure, spark_schema
from helpers.storage import Storage

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

log = logging.getLogger(__name__)

TRIED = 8  # images that a task tries to read, to choose the reader


def choose_reader(spark: "SparkSession", storage: Storage, manifest: pa.Table, config: Config) -> str:
    """Return `files` or `spark` as the `reader` setting says; `auto` tries in a task, and the log says why."""
    if config.reader != "auto":
        reader, why = config.reader, "it is set"
    elif local_slots(spark) is not None:
        reader, why = "files", "tasks run on this machine"
    elif storage.root.startswith("abfss:") and config.spark.mode != "databricks":
        reader, why = "files", "only Databricks' Spark surely has the connector for abfss:"
    elif _tasks_can_read(spark, storage, manifest, config):
        reader, why = "files", "a task could read an image"
    else:
        reader, why = "spark", "a task could read none of the images tried"
    log.info("reader %s: %s", reader, why)
    return reader


def planned_paths(spark: "SparkSession", manifest: pa.Table, plan: PartitionPlan) -> "DataFrame":
    """The manifest as a DataFrame in the plan's partitions; paths are exchanged here, bytes never."""
    return spark.createDataFrame(manifest).repartitionById(max(1, plan.partitions), "partition")


def read_by_spark(spark: "SparkSession", storage: Storage, manifest: pa.Table, config: Config) -> "DataFrame":
    """The images of a manifest with their bytes, read by Spark in partitions of about `partitioning.target_bytes`."""
    from pyspark.sql import functions as F

    # Both must be set: many small files would otherwise count as 4 MB each, and one core could get all of a large set.
    settings = {"maxPartitionBytes": config.partitioning.target_bytes, "openCostInBytes": 64 * 2**10}
    set_where_allowed(spark, {f"spark.sql.files.{name}": str(value) for name, value in settings.items()})
    is_frame = split_paths(manifest["path"])[1].is_valid()
    frames, manifest = manifest.filter(is_frame), manifest.filter(pc.invert(is_frame))
    listed = spark.createDataFrame(manifest.drop_columns(["partition", *(place.name for place in PLACE)]))
    files = (
        spark.read.format("binaryFile")
        .option("recursiveFileLookup", "true")
        .option("ignoreMissingFiles", "true")
        .load(_literal(storage.root))
        .select(F.regexp_replace("path", "^(file|dbfs):/+", "/").alias("path"), "content")
    )
    # The small side is the listing: it goes to every task, and the images stay where they are read.
    good = "length > 0 and error is null"
    read = files.join(F.broadcast(listed.where(good)), "path")
    rest = listed.where(f"not ({good})").withColumn("content", F.when(F.col("error").isNull(), F.lit(b"")))
    read = read.unionByName(rest).select(stages.IMAGE_SCHEMA.names)
    if not frames.num_rows:
        return read
    # Spark has no ranges of a file: it would send all of a video to whoever wants a frame. The tasks read these.
    tasks = spark.createDataFrame(frames).repartitionById(pc.max(frames["partition"]).as_py() + 1, "partition")
    return read.unionByName(tasks.mapInArrow(reading(storage, config), spark_schema(stages.IMAGE_SCHEMA)))


def reading(storage: Storage, config: Config) -> Callable[[Batches], Iterator[pa.RecordBatch]]:
    """Stage 1 as the tasks run it."""
    return partial(
        stages.read_images,
        storage=storage,
        most_images=config.inference.max_batch,
        most_bytes=config.inference.batch_megabytes * 2**20,
        max_bytes=config.max_image_bytes,
        max_pixels=config.ingest.max_pixels,
        memory_megabytes=config.inference.memory_megabytes,
    )


def add_frames(spark: "SparkSession", storage: Storage, listed: Listing, config: Config) -> pa.Table:
    """The images of a listing and the wanted frames of its videos, which are found in tasks.

    Returns:
        `frames.ROWS_SCHEMA`; the listing's own images where there is no video.

    Raises:
        RunError: the tasks failed.
    """
    if not listed.videos.num_rows:
        return listed.images
    plan = make_plan(listed.videos, get_slots(spark), config)
    find = partial(
        list_frames,
        storage=storage,
        every=config.video.every,
        max_pixels=config.ingest.max_pixels,
        memory_megabytes=config.inference.memory_megabytes,
    )
    try:
        paths = planned_paths(spark, make_manifest(listed.videos, plan), plan)
        videos = paths.mapInArrow(find, spark_schema(FRAMES_SCHEMA)).toArrow()
    except Exception as error:
        raise RunError(f"the frames of the videos could not be found: {spark_failure(error)}") from error
    images = with_frames(listed.images, videos.cast(FRAMES_SCHEMA), config.video.every)
    log.info("%d videos, %d of their frames are images", videos.num_rows, images.num_rows - listed.images.num_rows)
    return images


def _literal(path: str) -> str:
    """Escape what Spark takes for a pattern in a path."""
    return re.sub(r"([\\{}\[\]*?])", r"\\\1", path)


def _tasks_can_read(spark: "SparkSession", storage: Storage, manifest: pa.Table, config: Config) -> bool:
    images = manifest.filter(pc.and_(pc.greater(manifest["length"], 0), pc.is_null(manifest["error"])))
    if not images.num_rows:
        return True
    # Several, from all over the listing: one file may have gone, or have other permissions.
    sample = images.take(sorted({i * (images.num_rows - 1) // (TRIED - 1) for i in range(TRIED)}))
    rows = spark.createDataFrame(sample).mapInArrow(reading(storage, config), spark_schema(stages.IMAGE_SCHEMA))
    try:
        return rows.where("error is null").count() > 0
    except Exception as error:  # such as a credential that only the driver has
        log.info("%s", spark_failure(error))
        return False
