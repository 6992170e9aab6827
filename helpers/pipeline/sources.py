"""Sources that are tables: Spark has the rows, and each names an image or holds its bytes. On the driver.

    table:NAME                 a table or view of Spark's catalog
    a location                 a Delta table, or Parquet files
    `pipeline.run_frame`       a DataFrame, which must give the same rows each time

With `source.path` a row names a file, and tasks look up its length and time; from there on all is as if these files had
been listed. With `source.content` a row holds the bytes, which go from Spark's reader to the task that decodes them:
they are divided into tasks as the table is. Such an image is known by its key, and by `source.modified` where that is
set. So a changed image that has neither is not seen.

A path or a key stands for one image, so two rows with the same one stop the run. A row without one is an error row.
The kept columns (`source.keep`) never come to the driver.
"""

import difflib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial, reduce
from typing import TYPE_CHECKING
from urllib.parse import unquote

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from deltalake import Schema

from helpers.config import Config, SourceSettings
from helpers.errors import ConfigError, RunError, StorageError, first_line
from helpers.images.archive import MARK as MEMBER_MARK
from helpers.images.boundary import too_long
from helpers.images.video import MARK as FRAME_MARK
from helpers.pipeline.listing import Listing
from helpers.pipeline.reading import list_files, read_parquet
from helpers.pipeline.schemas import KEPT, KEY_NAMES, LISTED_SCHEMA, RESULT_SCHEMA
from helpers.pipeline.table import LOG, Table
from helpers.session import NO_CATALOG, get_slots, is_sail, spark_failure, spark_schema
from helpers.storage import Storage, open_storage
from helpers.storage.interface import Files
from helpers.storage.local import NO_TIME, LocalStorage
from helpers.storage.uris import UriStorage

if TYPE_CHECKING:
    from pyspark.sql import Column, DataFrame, SparkSession

TABLE = "table:"
AUTO_LOADER = "cloudFiles:"  # begins a source of new files (`arrivals`)
FILE = re.compile(r"/[^/]*\.parquet$")
HIDDEN = re.compile(r"/[._][^/]*(/|$)")  # as Spark has it
SECRET_OPTION = re.compile("(?i)secret|key|token|password|connectionstring")
FILE_NAME = "_file_name"  # a column of ours beside the user's
# Of a Delta table: what must be known to read its files, and which of it plain Parquet files have too.
READ_AS_FILES = {"timestampNtz", "v2Checkpoint", "vacuumProtocolCheck"}
NO_KEY = "the row has no key"
NO_CONTENT = "the row has no bytes"
NAMELESS = "#null="  # begins the paths of rows that have none
LOOKING_TASKS = 4  # per slot, that look up the files of a table


def is_table(source: str, config: Config) -> bool:
    """Whether a source is a table, by its name or by the settings."""
    return source.startswith(TABLE) or bool(config.source.path or config.source.content)


def open_files(source: str | None, config: Config) -> Files:
    """What reads the files of a source, or of a DataFrame for None, without Spark; mistakes in the settings are told.

    Raises:
        ConfigError: settings that do not go together.
        StorageError: there is no such location.
    """
    if source is not None and source.startswith(AUTO_LOADER):
        _check_options(config.source)
        return _existing(source.removeprefix(AUTO_LOADER), config)
    if config.source.options:
        raise ConfigError(f"source.options are for Auto Loader: name a source {AUTO_LOADER}URI, or leave them out")
    if source is not None and not is_table(source, config):
        if odd := [name for name in ("key", "modified", "root") if getattr(config.source, name)]:
            raise ConfigError(f"source.{odd[0]} is for tables: name the column of URIs, source.path, or source.content")
        return _existing(source, config)
    _check_settings(config.source)
    root = open_storage(config.source.root, config).root if config.source.root else ""
    if source is not None and not source.startswith(TABLE):
        root = root or FILE.sub("", _existing(source, config).root)
    return UriStorage(root, config.storage)


def text_columns(config: Config) -> pa.Schema:
    """The kept columns of a source that is no table: texts beside the members of archives, named by their suffix.

    Raises ConfigError if results have a column of this name.
    """
    _check_free(config.source.keep)
    return pa.schema([pa.field(name, pa.string()) for name in config.source.keep])


def open_table(spark: "SparkSession", source: str, config: Config) -> "TableSource":
    """A table of Spark's catalog, or at a location, as a source of images.

    Raises:
        ConfigError: as for `TableSource.of`.
        RunError: there is no such table, or Spark cannot read it.
        StorageError: the location cannot be used.
    """
    files = open_files(source, config)
    try:
        if source.startswith(TABLE):
            rows = spark.table(source.removeprefix(TABLE))
        else:
            storage = open_storage(source, config)
            is_delta = storage.exists(LOG)
            if config.spark.mode == "databricks":
                rows = spark.read.format("delta" if is_delta else "parquet").load(source)
            elif isinstance(storage, LocalStorage) and not (is_delta and is_sail(spark)):
                options = {"pathGlobFilter": "*.parquet"} if is_sail(spark) else {}  # it stumbles over other files
                rows = _read_delta(spark, storage) if is_delta else spark.read.options(**options).parquet(storage.root)
            else:
                return _read_by_tasks(spark, source, storage, is_delta, files, config)
        return TableSource.of(source, rows, files, config)
    except (ConfigError, RunError, StorageError):
        raise
    except Exception as error:
        remedy = f"; {NO_CATALOG}" if source.startswith(TABLE) and is_sail(spark) else ""
        raise RunError(f"{source} cannot be read as a table: {spark_failure(error)}{remedy}") from None


@dataclass
class TableSource:
    """The rows of a table as a source of images."""

    name: str  # what the records say of it
    rows: "DataFrame"  # the user's
    keys: "DataFrame"  # the same, of which the paths or keys may be asked for without reading all else
    columns: SourceSettings  # which of them are what
    files: Files  # reads the files that rows name
    kept: pa.Schema  # the columns for the results, as these have them
    max_bytes: int  # of an image
    nameless: int = 0  # how many rows have no path or key; `list` finds out
    listed: int = 0  # how many rows there are, likewise

    @classmethod
    def of(
        cls, name: str, rows: "DataFrame", files: Files, config: Config, keys: "DataFrame | None" = None
    ) -> "TableSource":
        """Look at a table.

        Raises ConfigError if it lacks a column, has one of another type than it should, or results cannot have one.
        """
        columns = config.source
        types = {"path": "string", "content": "binary", "key": "", "modified": "timestamp"}
        for setting, expected in types.items():
            if column := getattr(columns, setting):
                _check_column(rows, f"source.{setting}", column, expected)
        kept = _kept_schema(rows, columns.keep)
        return cls(name, rows, rows if keys is None else keys, columns, files, kept, config.max_image_bytes)

    @property
    def key(self) -> list[str]:
        """The columns of the results by which an image that has not changed is known."""
        return ["path", "modified"] if self.columns.content else KEY_NAMES

    def list(self, config: Config) -> Iterator[Listing]:
        """The images of the table, videos and archives apart; tasks look for the files.

        Yields:
            Slices in the order of paths; one where the rows hold bytes, because Spark reads all of the table for each.

        Raises:
            RunError: two rows name the same image, there is no row, or Spark cannot read the table.
        """
        names = self.keys.select(self._name.alias("path"), self._modified.alias("modified"))
        try:
            if self.columns.content:
                table = names.toArrow()
            else:
                tasks = LOOKING_TASKS * get_slots(self.rows.sparkSession)
                look_up = partial(list_files, storage=self.files)
                table = names.repartition(tasks).mapInArrow(look_up, spark_schema(LISTED_SCHEMA)).toArrow()
        except Exception as error:
            raise RunError(f"the source cannot be read: {spark_failure(error)}") from error
        if not table.num_rows:
            raise RunError("the source is a table without rows; name another --source")
        is_nameless, self.nameless, self.listed = table["path"].is_null(), table["path"].null_count, table.num_rows
        if self.columns.content:
            errors = pc.if_else(is_nameless, NO_KEY, pa.scalar(None, pa.string()))
            table = table.append_column("length", pa.array([0] * table.num_rows, pa.int64()))
            table = table.append_column("error", errors)
        paths = table["path"]
        if self.nameless:
            numbers = pc.cumulative_sum(is_nameless.cast(pa.int64())).cast(pa.string())
            paths = pc.coalesce(paths, pc.binary_join_element_wise(NAMELESS, numbers, ""))
        _check_unique(paths)
        table = table.set_column(table.schema.get_field_index("path"), "path", paths)
        files = table.select(LISTED_SCHEMA.names).cast(LISTED_SCHEMA).sort_by("path")
        step = files.num_rows if self.columns.content else config.partitioning.slice_images
        for start in range(0, files.num_rows, step):
            part, is_last = files.slice(start, step), start + step >= files.num_rows
            yield replace(_divide(part, config, bool(self.columns.content)), is_last=is_last)

    def contents(self, images: pa.Table) -> "DataFrame":
        """`stages.IMAGE_SCHEMA` and the kept columns of some of the listed images, as Spark reads the table."""
        from pyspark.sql import functions as F

        content = _column(self.rows, self.columns.content or "")
        length = F.coalesce(F.octet_length(content), F.lit(0)).cast("long")
        limits = "ingest.max_bytes and inference.memory_megabytes allow"
        over_limit = f"the image has more than the {self.max_bytes} bytes that {limits}"
        error = F.when(self._name.isNull(), NO_KEY).when(content.isNull(), NO_CONTENT)
        error = error.when(length > self.max_bytes, over_limit)
        columns = {"length": length, "modified": self._modified, "error": error}
        columns["content"] = F.when(error.isNull(), content)
        rows = self._named(**columns)
        if images.num_rows == self.listed:
            return rows
        wanted = self.rows.sparkSession.createDataFrame(images.select(["path"]))
        # The small side are the keys: they go to every task, and the images stay where they are read.
        return rows.join(F.broadcast(wanted), "path", "left_semi")

    def with_kept(self, images: "DataFrame") -> "DataFrame":
        """Rows of images, of their frames or members, with the columns that are kept of the user's rows."""
        from pyspark.sql import functions as F

        if not self.kept:
            return images
        file = F.regexp_replace("path", rf"(?s){FRAME_MARK}[0-9]+\z", "")
        images = images.withColumn("file", F.regexp_replace(file, rf"(?s){MEMBER_MARK}.*", ""))
        kept = self._named().withColumnRenamed("path", "file")
        if "content" in images.columns:  # images stay where they are read
            kept = F.broadcast(kept)
        return images.join(kept, "file", "left").drop("file")

    def _named(self, **columns: "Column") -> "DataFrame":
        """The kept columns of all rows, and others, with the image's path; those without one get the listing's."""
        from pyspark.sql import Window
        from pyspark.sql import functions as F

        if self.kept:
            columns[KEPT] = F.struct(*(_column(self.rows, name).alias(name) for name in self.kept.names))
        rows = self.rows.select(self._name.alias("path"), *(value.alias(name) for name, value in columns.items()))
        if not self.nameless:
            return rows
        number = F.row_number().over(Window.orderBy(F.lit(0)))  # in one task: there should be few
        nameless = rows.where(F.col("path").isNull()).withColumn("path", F.concat(F.lit(NAMELESS), number))
        return rows.where(F.col("path").isNotNull()).unionByName(nameless)

    @property
    def _name(self) -> "Column":
        name = self.columns.key or self.columns.path or ""
        return _column(self.rows, name).cast("string")

    @property
    def _modified(self) -> "Column":
        from pyspark.sql import functions as F

        never = F.lit(NO_TIME)
        name = self.columns.modified
        return F.coalesce(_column(self.rows, name).cast("timestamp"), never) if name else never


def _check_settings(columns: SourceSettings) -> None:
    if not (columns.path or columns.content):
        remedy = (
            "name the column of the images' URIs with --set source.path=COLUMN, or of their bytes with source.content"
        )
        raise ConfigError(f"the source is a table: {remedy}")
    if columns.content and not (columns.key or columns.path):
        raise ConfigError("source.content needs a column that tells the images apart: name it with source.key")
    if not columns.content and (columns.key or columns.modified):
        name = "key" if columns.key else "modified"
        raise ConfigError(f"source.{name} is for source.content: a file is known by its path, length and time")


def _check_options(columns: SourceSettings) -> None:
    """Raise ConfigError where there are settings of tables, or where a secret would get into Spark's plans."""
    for name, value in columns.model_dump().items():
        if value and name not in ("options", "keep"):
            raise ConfigError(f"source.{name} is for tables, and {AUTO_LOADER}URI is of files")
    for name in columns.options:
        if SECRET_OPTION.search(name):
            raise ConfigError(
                f"source.options.{name} is a secret: let Auto Loader use a credential of Unity Catalog, which "
                "source.options.databricks.serviceCredential names"
            )


def _existing(source: str, config: Config) -> Storage:
    storage = open_storage(source, config)
    if not storage.exists(""):
        raise StorageError(f"{storage.root}: no such folder; check the --source location")
    return storage


def _delta_files(storage: Storage) -> tuple[pa.Schema, pa.Table]:
    """The columns of the newest version of a Delta table, and its files: `path`, and the columns it is divided by.

    Raises RunError if its files do not tell all of it.
    """
    table = Table(storage, "", pa.schema([]), may_have_more=True).open().table
    assert table is not None
    protocol = table.protocol()
    features = set(protocol.reader_features or [])
    if protocol.min_reader_version == 2:
        features.add("columnMapping")
    if more := sorted(features - READ_AS_FILES):
        problem = f"{storage.root} is a Delta table with {more[0]}, which only a Spark with Delta reads"
        raise RunError(f"{problem}; give it a name there, and --source table:NAME")
    schema, partitions = pa.schema(table.schema().to_arrow()), table.metadata().partition_columns
    files = pa.table(table.get_add_actions())
    # The log says what is the same in all of a file. The names of folders say it too, each library's in its own way.
    values = [pc.struct_field(files["partition"], name).cast(schema.field(name).type) for name in partitions]
    paths = pa.array([storage.join(unquote(path)) for path in files["path"].to_pylist()], pa.string())
    return schema, pa.table([paths, *values], names=["path", *partitions])


def _read_delta(spark: "SparkSession", storage: Storage) -> "DataFrame":
    """A Delta table whose files Spark reads as Parquet: it may lack Delta itself."""
    from pyspark.sql import functions as F

    schema, files = _delta_files(storage)
    if not files.num_rows:
        return spark.createDataFrame([], spark_schema(schema))
    paths, partitions = files["path"].to_pylist(), files.schema.names[1:]
    in_files = spark_schema(pa.schema([field for field in schema if field.name not in partitions]))
    rows = spark.read.schema(in_files).option("recursiveFileLookup", "true").parquet(*paths)
    if not partitions:
        return rows
    names = pa.array([path.rpartition("/")[2] for path in paths])
    said = spark.createDataFrame(files.set_column(0, FILE_NAME, names))
    rows = rows.withColumn(FILE_NAME, F.col("_metadata.file_name")).join(F.broadcast(said), FILE_NAME)
    return rows.select(*(F.col(f"`{name}`") for name in schema.names))


def _read_by_tasks(
    spark: "SparkSession", source: str, storage: Storage, is_delta: bool, files: Files, config: Config
) -> TableSource:
    """The columns that are wanted of a Delta table, or of Parquet files, where Spark may not reach or read them."""
    from pyspark.sql.pandas.types import to_arrow_schema

    if is_delta:
        schema, parts = _delta_files(storage)
    else:
        below = [entry.path for entry in storage.list() if entry.path.endswith(".parquet")]
        paths = sorted(path for path in below if not HIDDEN.search(path.removeprefix(storage.root)))
        if not paths:
            raise RunError(f"{storage.root} has no file that ends in .parquet, and is no Delta table")
        with storage.open(paths[0]) as content:
            schema = pq.ParquetFile(content).schema_arrow
        parts = pa.table({"path": paths})
    schema = to_arrow_schema(spark_schema(schema))  # the types that Spark has for these
    everything = spark.createDataFrame([], spark_schema(schema))
    TableSource.of(source, everything, files, config)  # mistakes are told before anything is read

    def read(names: Iterable[str | None]) -> "DataFrame":
        tops = {name if name in schema.names else name.partition(".")[0] for name in names if name}
        wanted = pa.schema([field for field in schema if field.name in tops])
        columns = parts.select(["path", *(name for name in parts.schema.names[1:] if name in tops)])
        tasks = get_slots(spark) if is_sail(spark) else columns.num_rows  # it starts all at once
        paths = spark.createDataFrame(columns).repartition(max(1, tasks))
        return paths.mapInArrow(partial(read_parquet, storage=storage, schema=wanted), spark_schema(wanted))

    columns = config.source
    keys = [columns.key or columns.path, columns.modified]
    return TableSource.of(source, read([*keys, columns.content, *columns.keep]), files, config, read(keys))


def _column(rows: "DataFrame", name: str) -> "Column":
    """A column by its name, or a field of one, as `image.bytes` is."""
    from pyspark.sql import functions as F

    return F.col(f"`{name.replace('`', '``')}`" if name in rows.columns else name)


def _check_column(rows: "DataFrame", setting: str, name: str, expected: str) -> None:
    """Raise ConfigError unless a table has a column of the type that is expected, if any is."""
    from pyspark.errors import PySparkException

    try:
        kind = rows.select(_column(rows, name)).schema[0].dataType.simpleString()
    except PySparkException:
        raise _no_column(rows, setting, name) from None
    if expected not in (kind, "", kind.removesuffix("_ntz")):
        raise ConfigError(f"{setting}: the column {name} has the type {kind}, and should have {expected}")


def _no_column(rows: "DataFrame", setting: str, name: str) -> ConfigError:
    near = difflib.get_close_matches(name, rows.columns, n=1)
    hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(rows.columns)}"
    return ConfigError(f"{setting}: the source has no column {name}; {hint}")


def _kept_schema(rows: "DataFrame", names: Sequence[str]) -> pa.Schema:
    """The Arrow schema of the columns to keep.

    Raises ConfigError if there is no such column, results have one of this name, or a table cannot have its type.
    """
    from pyspark.sql.pandas.types import to_arrow_schema

    for name in names:
        if name not in rows.columns:
            raise _no_column(rows, "source.keep", name)
    _check_free(names)
    schema = pa.schema([])
    for name in names:
        field = rows.select(_column(rows, name)).schema.toNullable()
        try:
            arrow = to_arrow_schema(field)
            Schema.from_arrow(arrow)
        except Exception as error:
            kind = f"the type of the column {name}, {field[0].dataType.simpleString()} ({first_line(error)})"
            raise ConfigError(f"source.keep: results cannot have {kind}; cast it in the source") from None
        schema = schema.append(arrow.field(0))
    return schema


def _check_free(names: Sequence[str]) -> None:
    taken = {name.lower() for name in RESULT_SCHEMA.names}
    for name in names:
        if name.lower() in taken:
            raise ConfigError(f"source.keep: the results have a column {name} of their own, or twice; rename it")
        taken.add(name.lower())


def _check_unique(paths: pa.ChunkedArray) -> None:
    if pc.count_distinct(paths).as_py() < len(paths):
        counts = pc.value_counts(paths)
        more = counts.filter(pc.greater(pc.struct_field(counts, "counts"), 1))
        example = more[0].as_py()
        raise RunError(
            f"{len(more)} images are named by several rows of the source, such as {example['values']} by "
            f"{example['counts']}: one image has one row of results; leave one row of each, or name another source.key"
        )


def _divide(files: pa.Table, config: Config, are_images: bool) -> Listing:
    """A listing of files; those that do not end as videos or archives do are images, whatever they are called."""
    if are_images:
        return Listing(files, {})
    names = pc.utf8_lower(files["path"])
    nothing = pa.chunked_array([pa.array(np.zeros(len(names), bool))])
    is_video, is_archive = (
        reduce(pc.or_, (pc.ends_with(names, suffix.lower()) for suffix in suffixes), nothing)
        for suffixes in (config.video.suffixes, config.ingest.archives)
    )
    errors = [too_long(length, config.max_image_bytes) for length in files["length"].to_pylist()]
    images = files.set_column(3, "error", pc.coalesce(files["error"], pa.array(errors, pa.string())))
    is_image = pc.invert(pc.or_(is_video, is_archive))
    return Listing(images.filter(is_image), {}, files.filter(is_video), files.filter(is_archive))
