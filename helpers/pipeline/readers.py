"""Two ways from paths to bytes, one DataFrame (`stages.IMAGE_SCHEMA`).

    files   the task that decodes an image reads it too: nothing is exchanged but paths, and the plan is kept
    spark   Spark's `binaryFile` reads, where only Spark can reach the storage (Unity Catalog, serverless); videos
            and archives are read by the tasks nevertheless, and are error rows where these cannot

`binaryFile` silently leaves out empty files, hidden ones and those it cannot read; a run compares with the listing.
"""

import logging
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial, reduce
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc

from helpers.config import Config
from helpers.errors import RunError
from helpers.images.video import are_frames
from helpers.partitioning import PartitionPlan
from helpers.pipeline import sail, stages
from helpers.pipeline.listing import Listing, assign
from helpers.pipeline.listing import plan as make_plan
from helpers.pipeline.reading import FRAMES_SCHEMA, MEMBERS_SCHEMA, ROWS_SCHEMA, list_frames, list_members, with_frames
from helpers.pipeline.schemas import KEY_NAMES, Batches, conform
from helpers.session import get_slots, is_sail, local_slots, set_where_allowed, spark_failure, spark_schema
from helpers.storage.interface import Files

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

log = logging.getLogger(__name__)

FILES_PER_PLAN = 50_000  # read by Spark: their paths are in its plan, and in the driver's memory
LOOKING_TASKS = 100  # that look for the files of a plan; Spark's own default is 10,000, of 4 ms each
LOOKING_THREADS = 32
PATTERN = r"([\\{}\[\]*?])"  # what is not literal in a path of Spark's
TRIED = 8  # images that a task tries to read, to choose the reader


def choose_reader(spark: "SparkSession", storage: Files, images: pa.Table, config: Config) -> str:
    """Return `files` or `spark` as the `reader` setting says; `auto` tries in a task, and the log says why."""
    if config.reader != "auto":
        reader, why = config.reader, "it is set"
    elif local_slots(spark) is not None:
        reader, why = "files", "tasks run on this machine"
    elif (scheme := re.match("(abfss|s3|gs):", storage.root)) and config.spark.mode != "databricks":
        reader, why = "files", f"only Databricks' Spark surely has the connector for {scheme[0]}"
    elif storage.root.startswith("http"):
        reader, why = "files", "Spark cannot read from a web server"
    elif _tasks_can_read(spark, storage, images, config):
        reader, why = "files", "a task could read an image"
    else:
        reader, why = "spark", "a task could read none of the images tried"
    log.info("reader %s: %s", reader, why)
    return reader


def planned_paths(spark: "SparkSession", images: pa.Table, plan: PartitionPlan) -> "DataFrame":
    """`ASSIGNED_SCHEMA` as a DataFrame in the plan's partitions; paths are exchanged here, bytes never."""
    if is_sail(spark):
        return sail.planned_paths(spark, images)
    return by_partition(spark.createDataFrame(images), plan.partitions)


def by_partition(rows: "DataFrame", partitions: int) -> "DataFrame":
    """Rows divided by their column `partition`; on Sail among its tasks, which are few."""
    spark = rows.sparkSession
    if is_sail(spark):
        return rows.repartition(get_slots(spark))
    return rows.repartitionById(max(1, partitions), "partition")


def read_by_spark(spark: "SparkSession", storage: Files, rows: pa.Table, config: Config) -> Iterator["DataFrame"]:
    """The images with their bytes, read by Spark in partitions of about `partitioning.target_bytes`.

    Spark is given the listed paths and sees nothing else of the location. It looks for each before a job begins, which
    takes its driver some tenths of a millisecond and a kilobyte or more per file: a plan has so many that this stays
    small. What Spark cannot read, and what it passes over for its name (`_kinds`), is in none of them.

    Yields:
        DataFrames of `stages.IMAGE_SCHEMA`, to be used one after the other.
    """
    # Both must be set: many small files would otherwise count as 4 MB each, and one core could get all of a large set.
    settings = {"files.maxPartitionBytes": config.partitioning.target_bytes, "files.openCostInBytes": 64 * 2**10}
    settings["sources.parallelPartitionDiscovery.parallelism"] = LOOKING_TASKS
    set_where_allowed(spark, {f"spark.sql.{name}": str(value) for name, value in settings.items()})
    is_part, is_good, is_passed_over = _kinds(rows)
    files = rows.filter(pc.and_(is_good, pc.invert(is_passed_over)))
    for start in range(0, files.num_rows, FILES_PER_PLAN):
        yield _read_files(spark, storage, files.slice(start, FILES_PER_PLAN))
    unread, parts = rows.filter(pc.invert(pc.or_(is_part, is_good))), rows.filter(is_part)
    if unread.num_rows:
        yield spark.createDataFrame(_unread(unread))
    if parts.num_rows:
        # Spark has no ranges of a file: it would send all of a video to whoever wants a frame. The tasks read these.
        tasks = by_partition(spark.createDataFrame(parts), pc.max(parts["partition"]).as_py() + 1)
        yield tasks.mapInArrow(reading(storage, config), spark_schema(stages.IMAGE_SCHEMA))


def read_all_by_spark(spark: "SparkSession", storage: Files, rows: pa.Table, config: Config) -> "DataFrame":
    """All of `read_by_spark` as one DataFrame; what Spark passes over is an error row."""
    from pyspark.sql import functions as F

    parts = list(read_by_spark(spark, storage, rows, config))
    left = rows.filter(_kinds(rows)[2])
    if left.num_rows:
        error = F.lit("Spark's reader passes over files of such a name (_x, x:y, no text): rename it")
        parts.append(spark.createDataFrame(_unread(left)).withColumns({"error": error, "content": F.lit(None)}))
    return reduce(lambda one, other: one.unionByName(other), parts)


def literal(path: str) -> str:
    """Escape what Spark takes for a pattern in a path."""
    return re.sub(PATTERN, r"\\\1", path)


def _kinds(rows: pa.Table) -> tuple[pa.ChunkedArray, pa.ChunkedArray, pa.ChunkedArray]:
    """Which rows are frames or members, which are files to read, and which of these Spark's reader passes over.

    It passes over a file that is hidden to Spark, is not Unicode (`storage.local`), or has a colon in a path that must
    be escaped.
    """
    is_part = pc.or_(are_frames(rows["path"]), rows["offset"].is_valid())
    is_good = pc.and_(pc.greater(rows["length"], 0), pc.is_null(rows["error"]))
    is_good = pc.and_(is_good, pc.invert(is_part))
    hidden_or_bytes, colon, pattern = (
        pc.match_substring_regex(rows["path"], regex) for regex in (r"/_[^/=]*$|\\x", "/[^/]*:", PATTERN)
    )
    return is_part, is_good, pc.and_(is_good, pc.or_(hidden_or_bytes, pc.and_(colon, pattern)))


def _read_files(spark: "SparkSession", storage: Files, files: pa.Table) -> "DataFrame":
    from pyspark.sql import functions as F

    # A file may have grown since it was listed; this is pushed down, and what is longer is not opened.
    content = _load(spark, storage, files["path"].to_pylist()).where(F.col("length") <= pc.max(files["length"]).as_py())
    content = content.select(F.regexp_replace("path", "^(file|dbfs):/+", "/").alias("path"), "content")
    # The small side is the listing: it goes to every task, and the images stay where they are read.
    listed = spark.createDataFrame(files.select([*KEY_NAMES, "error"]))
    return content.join(F.broadcast(listed), "path").select(stages.IMAGE_SCHEMA.names)


def _load(spark: "SparkSession", storage: Files, paths: list[str]) -> "DataFrame":
    """Spark's own DataFrame of some files, less those that have gone since they were listed."""
    from pyspark.errors import AnalysisException

    reader = spark.read.format("binaryFile").option("recursiveFileLookup", "true")  # folder names are no columns
    # A file that fails when it is read is passed over too, as `run` finds out.
    reader = reader.option("ignoreMissingFiles", "true").option("ignoreCorruptFiles", "true")
    while paths:
        try:
            files = reader.load([literal(path) for path in paths])
            assert files.schema.names  # which has Spark look for the files now, over Connect too
            return files
        except AnalysisException as error:
            if error.getCondition() != "PATH_NOT_FOUND":
                raise
            missing = (error.getMessageParameters() or {}).get("path", "")
            with ThreadPoolExecutor(LOOKING_THREADS) as pool:
                existence = zip(paths, pool.map(storage.exists, paths), strict=True)
                left = [path for path, is_there in existence if is_there and not missing.endswith(path)]
            if len(left) == len(paths):
                raise
            paths = left
    return spark.createDataFrame([], "path string, length long, content binary")


def _unread(images: pa.Table) -> pa.Table:
    """Rows, `stages.IMAGE_SCHEMA`, of files that need no reader: empty, or wrong by the listing."""
    content = pc.if_else(pc.is_null(images["error"]), pa.scalar(b""), pa.scalar(None, pa.binary()))
    columns = [*(images[name] for name in KEY_NAMES), images["error"], content]
    return pa.table(columns, schema=stages.IMAGE_SCHEMA)


def reading(storage: Files, config: Config) -> Callable[[Batches], Iterator[pa.RecordBatch]]:
    """Stage 1 as the tasks run it."""
    return partial(
        stages.read_images,
        storage=storage,
        max_images=config.inference.max_batch,
        batch_bytes=config.inference.batch_megabytes * 2**20,
        max_bytes=config.max_image_bytes,
        max_pixels=config.ingest.max_pixels,
        memory_megabytes=config.inference.memory_megabytes,
    )


def expand(
    spark: "SparkSession", storage: Files, listed: Listing, config: Config, beside: Sequence[str] = ()
) -> pa.Table:
    """The images of a listing, the wanted frames of its videos and the members of its archives; tasks find these.

    `beside` are the suffixes of texts to be carried with the members of archives.

    Returns:
        `reading.ROWS_SCHEMA`; the listing's own images where there is no video and no archive.

    Raises:
        RunError: the tasks failed.
    """
    if not listed.videos.num_rows and not listed.archives.num_rows:
        return listed.images
    own = config.ingest
    shared: Any = {"storage": storage, "memory_megabytes": config.inference.memory_megabytes}
    find_frames = partial(list_frames, every=config.video.every, max_pixels=own.max_pixels, **shared)
    find_members = partial(
        list_members,
        suffixes=tuple(suffix.lower() for suffix in own.suffixes),
        refused=tuple(suffix.lower() for suffix in own.archives + config.video.suffixes),
        max_bytes=config.max_image_bytes,
        beside=beside,
        **shared,
    )
    try:
        videos = _find(spark, listed.videos, find_frames, FRAMES_SCHEMA, config)
        members = _find(spark, listed.archives, find_members, MEMBERS_SCHEMA, config)
    except Exception as error:
        raise RunError(f"the images in videos and archives could not be found: {spark_failure(error)}") from error
    frames = with_frames(listed.images, videos, config.video.every)
    images = pa.concat_tables([frames, conform(members, ROWS_SCHEMA)])
    counts = videos.num_rows, frames.num_rows - listed.images.num_rows, listed.archives.num_rows, members.num_rows
    log.info("%d videos, %d of their frames are images; %d archives, %d of their members are", *counts)
    return images


def _find(
    spark: "SparkSession", files: pa.Table, find: Callable[..., Any], schema: pa.Schema, config: Config
) -> pa.Table:
    """What tasks find in videos or archives."""
    if not files.num_rows:
        return schema.empty_table()
    plan = make_plan(files, get_slots(spark), config)
    paths = planned_paths(spark, assign(files, plan), plan)
    return paths.mapInArrow(find, spark_schema(schema)).toArrow().cast(schema)


def _tasks_can_read(spark: "SparkSession", storage: Files, rows: pa.Table, config: Config) -> bool:
    images = rows.filter(pc.and_(pc.greater(rows["length"], 0), pc.is_null(rows["error"])))
    if not images.num_rows:
        return True
    # Several, from all over the listing: one file may have gone, or have other permissions.
    sample = images.take(sorted({i * (images.num_rows - 1) // (TRIED - 1) for i in range(TRIED)}))
    results = spark.createDataFrame(sample).mapInArrow(reading(storage, config), spark_schema(stages.IMAGE_SCHEMA))
    try:
        return results.where("error is null").count() > 0
    except Exception as error:  # such as a credential that only the driver has
        log.info("%s", spark_failure(error))
        return False
