"""Results in a table of Spark's catalog, `table:CATALOG.SCHEMA.NAME`, which Spark alone writes. On the driver.

A managed table must not be written by path. So tasks leave their files at a staging location, which has all else of an
output too (pictures, records), and Spark merges their rows into the table in one commit: a reader sees the old rows or
the new. A row is found by its path and model, so that a repeated merge changes nothing.

What a killed run has left staged is merged by the next one and stays where it is, because the run may only be slow;
after a day without any change it is deleted. Of two runs that merge at once, Delta lets one through, and the other one
tries again. Old files of the table are its owner's to `VACUUM`.
"""

import contextlib
import json
import logging
import re
import time
import uuid
from collections.abc import Iterable, Iterator
from datetime import UTC
from functools import partial
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc

from helpers.config import Config
from helpers.errors import ConfigError, HostError, RunError, only_warn
from helpers.pipeline.folders import run_of, staged_counts, time_of
from helpers.pipeline.results import TOLD, ResultStore, Seen, Work
from helpers.pipeline.rows import ROWS_SCHEMA, in_first_file, is_new, path_range
from helpers.pipeline.schemas import RESULT_SCHEMA, conform
from helpers.pipeline.sources import TABLE
from helpers.pipeline.table import NONE
from helpers.pipeline.task import read_staged, staging, write_rows
from helpers.session import NO_CATALOG, is_sail, set_where_allowed, spark_failure, spark_schema
from helpers.storage import Storage, open_storage

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

log = logging.getLogger(__name__)

PART = r"(\w[\w-]*|`[^`{}]+`)"
NAME = re.compile(rf"{PART}(\.{PART}){{0,2}}")
CONFLICT = re.compile(
    r"DELTA_CONCURRENT|Concurrent(Append|Delete|Transaction|Write)|(MetadataChanged|ProtocolChanged)E"
)
TRIES = 20
MAKING, LOOKS = "DELTA_CREATE_TABLE_WITH_NON_EMPTY_LOCATION", 10
METADATA = "spark.databricks.delta.commitInfo.userMetadata"  # goes into the table's history, of OSS Delta too
FILE, GONE = "_file", "_gone"  # columns of a merge that are none of the results


def open_output(output: str, config: Config) -> Storage:
    """Where tasks leave their files, and pictures and records go; for a table the staging location.

    Raises:
        ConfigError: this is no name of a table.
        StorageError: the location cannot be used.
    """
    if output.startswith(TABLE):
        name = _checked_name(output).replace("`", "")
        output = config.results.staging or f"{config.paths.results}/{name}"
    return open_storage(output, config)


def open_results(
    spark: "SparkSession | None", output: str, config: Config, kept: pa.Schema | None = None
) -> ResultStore:
    """The results of an output, in the table of its folder or, with a session, in one of Spark's catalog.

    `kept` are the columns that a run keeps of its source; None for those who only look. Raises HostError if the output
    is a table, and Spark is Sail, which has none that lasts.
    """
    storage = open_output(output, config)
    if not output.startswith(TABLE):
        return ResultStore(storage, kept)
    assert spark is not None
    if is_sail(spark):
        raise HostError(f"the results cannot go to {output}: {NO_CATALOG}")
    return CatalogStore(spark, output, storage, kept)


class CatalogStore(ResultStore):
    """The results in a table of Spark's catalog, with what is beside them at a staging location."""

    def __init__(self, spark: "SparkSession", output: str, staging: Storage, kept: pa.Schema | None = None):
        super().__init__(staging, kept)
        self._spark, self._merged = spark, set[str]()
        name = _checked_name(output)
        self._name = ".".join(part if part[0] == "`" else f"`{part}`" for part in re.findall(PART, name))

    @property
    def location(self) -> str:
        """The table's name."""
        return f"{TABLE}{self._name.replace('`', '')}"

    @contextlib.contextmanager
    def as_files(self, most_rows: int | None = None) -> Iterator[tuple[list[str], bool]]:
        """The results as files, for the length of a block, and whether these are all results.

        All results are a copy, which Spark's tasks write at the staging location. The newest are what this run's own
        tasks have left there.

        Raises:
            RunError: Spark cannot read the table.
        """
        if most_rows is not None:
            files = sorted(self._merged)
            before = accumulate((staged_counts([file])[0] for file in files), initial=0)
            yield [file for file, rows in zip(files, before, strict=False) if rows < most_rows], False
            return
        copy = uuid.uuid4().hex
        write = partial(write_rows, storage=self.storage, folder=staging(copy))
        self.stage(copy, alone=True)  # so that no run takes it for results
        try:
            try:
                rows = self.frame().select(RESULT_SCHEMA.names)
                files = rows.mapInArrow(write, "path string").toArrow()["path"].to_pylist()
            except Exception as error:
                raise self._cannot(error) from None
            yield files, True
        finally:
            self.unstage(copy)

    def prepare(self) -> None:
        """Tidy up, and make the table where there is none.

        Raises:
            RunError: Spark has no Delta here, or may not make or read the table, or it has other columns.
        """
        with only_warn("what killed runs have left could not be removed"):
            self.tidy()
        columns = spark_schema(self._schema)
        for attempt in range(1, LOOKS + 1):
            try:
                self._sql(f"CREATE TABLE IF NOT EXISTS {self._name} ({columns.toDDL()}) USING DELTA")
                break
            except RunError as error:
                if self._spark.catalog.tableExists(self._name):  # another run may have made it in the same moment
                    break
                if MAKING not in str(error) or attempt == LOOKS:  # or may be making it right now
                    raise
            time.sleep(0.1 * attempt)
        there = self._spark.table(self._name).schema
        kinds = [[(field.name, field.dataType.simpleString()) for field in schema] for schema in (there, columns)]
        if kinds[0] != kinds[1]:
            raise RunError(
                f"{self.location} is a table of other columns ({', '.join(there.names)}) than this run's results "
                f"({', '.join(columns.names)}); name another --output, or change source.keep"
            )

    def resume(self, *models: str) -> None:
        """Prepare for a run of some models, and merge what killed runs of them have left staged.

        Raises:
            RunError: as for `prepare`; or the results are another model's, or what is staged is.
        """
        self.prepare()
        present = self._spark.table(self._name).select("model").distinct().toArrow()
        self._check_models(present["model"].to_pylist(), models)
        self.recover(*models)

    def look(self, within: tuple[str, str] | None = None) -> Seen:
        """The keys of the table as it is now; those of which the path is between two, if these are given."""
        from pyspark.sql import functions as F

        rows = self._spark.table(self._name).select(ROWS_SCHEMA.names[:-1])
        if within:
            rows = rows.where(F.col("path").between(*within))
        return Seen(rows=conform(rows.toArrow(), ROWS_SCHEMA))

    def is_empty(self) -> bool:
        """Whether no image has results."""
        return self._spark.table(self._name).isEmpty()

    def note(self, listed: str, commit: tuple[int, str]) -> None:
        """Do nothing: the table tells nothing of a listing, and the next run compares with its rows."""

    def progress(self, run: str) -> tuple[int, int]:
        """Images and failed images that a run's tasks have finished and nobody has merged."""
        return staged_counts(path for path in self.staged(run) if path not in self._merged)

    def publish(self, work: Work) -> list[str]:
        """Merge a run's work into the table, and return its files, which stay until `unstage`.

        Raises:
            RunError: Spark cannot write the table, or a file has gone.
        """
        from pyspark.sql import functions as F

        if not work.files and not work.gone.num_rows and not work.starts_over:
            return []
        rows = self._read(work.files)
        if work.gone.num_rows:
            gone = self._spark.createDataFrame(work.gone.select(["path", "model"])).withColumn(GONE, F.lit(True))
            # An image that has new rows is not gone.
            gone = gone.join(rows.select("path", "model"), ["path", "model"], "left_anti")
            rows = rows.unionByName(gone, allowMissingColumns=True)
        others = "WHEN NOT MATCHED BY SOURCE THEN DELETE" if work.starts_over else ""
        self._merge(rows, work.about(*staged_counts(work.files)), others)
        self._merged |= set(work.files)
        if work.starts_over:  # what earlier runs have left has no place in the table any more
            for path in self.leftovers(NONE)[0]:
                if time_of(run_of(path)) < time_of(work.run):
                    self.storage.delete(path)
        return sorted(work.files)

    def recover(self, *models: str) -> int:
        """Merge what other runs, killed or slow ones, have left staged, and return how many images that were.

        Raises:
            RunError: it is another model's than those given, or Spark cannot write the table.
        """
        from pyspark.sql import functions as F

        files = self.leftovers(NONE)[0]  # those of the run that began last first
        own = self.rows(files)
        if not own.num_rows:
            self.sweep()
            return 0
        self._check_models(own["model"].unique().to_pylist(), models)
        rows = self.look(path_range(own)).rows
        newest = rows.group_by("path").aggregate([("modified", "max")])
        own = own.join(newest, "path", join_type="left outer")
        # A task may have outlived its driver, and a later run have seen the image as it is now.
        late = pc.fill_null(pc.greater(own["modified_max"], own["modified"]), False)
        new = own.filter(pc.and_(is_new(own, rows, len(models)), pc.invert(late)))
        images = pc.count_distinct(new["path"]).as_py()
        if images:
            wanted = in_first_file(new, files).select(["path", "file"]).rename_columns(["path", FILE])
            rows_left = self._read(new["file"].unique().to_pylist())
            rows_left = rows_left.join(F.broadcast(self._spark.createDataFrame(wanted)), ["path", FILE], "left_semi")
            self._merge(rows_left, {"run": ", ".join(dict.fromkeys(map(run_of, files))), "images": images})
            log.info("kept the results of %d images of an earlier run that did not end", images)
        self.sweep()
        return images

    def vacuum(self, days: float) -> None:
        """Do nothing: the table's owner decides how long its versions can be read."""

    def frame(self, number: int | None = None) -> "DataFrame":
        """The results, the newest or those of an earlier version of the table."""
        reader = self._spark.read if number is None else self._spark.read.option("versionAsOf", number)
        return reader.table(self._name)

    def history(self) -> list[dict[str, Any]]:
        """The runs that have changed the table, the newest first, as of `ResultStore`.

        Raises:
            RunError: there is no such table, or Spark does not tell its history.
        """
        rows = self._sql(f"DESCRIBE HISTORY {self._name}").select("timestamp", "version", "userMetadata").toArrow()
        runs = []
        for row in rows.to_pylist():
            about = json.loads(row["userMetadata"]) if str(row["userMetadata"]).startswith('{"run"') else {}
            if about:
                values = {name: about.get(name) for name in TOLD}
                runs.append({"time": row["timestamp"].astimezone(UTC), **values, "version": row["version"]})
        return runs

    def _read(self, files: Iterable[str]) -> "DataFrame":
        """The rows of staged files, which tasks read: Spark itself may have no connector for the storage."""
        from pyspark.sql import functions as F

        schema = self._schema.append(pa.field(FILE, pa.string()))
        paths = pa.table({"path": pa.array(sorted(files), pa.string())})
        read = partial(read_staged, storage=self.storage, schema=schema)
        files_of_tasks = self._spark.createDataFrame(paths).repartition(max(1, paths.num_rows))
        return files_of_tasks.mapInArrow(read, spark_schema(schema)).withColumn(GONE, F.lit(False))

    def _merge(self, rows: "DataFrame", about: dict[str, Any], others: str = "") -> None:
        """Merge rows of the results, with `GONE`, into the table in one commit, again where another run was first.

        `others` says what becomes of the rows in the table that have no new ones.
        """
        names = [f"`{name}`" for name in self._schema.names]
        query = f"""
            MERGE INTO {self._name} old USING {{rows}} new ON old.path = new.path AND old.model = new.model
            WHEN MATCHED AND new.{GONE} THEN DELETE
            WHEN MATCHED THEN UPDATE SET {", ".join(f"{name} = new.{name}" for name in names)}
            WHEN NOT MATCHED AND NOT new.{GONE} THEN
                INSERT ({", ".join(names)}) VALUES ({", ".join(f"new.{name}" for name in names)})
            {others}
        """
        set_where_allowed(self._spark, {METADATA: json.dumps(about)})
        try:
            for attempt in range(1, TRIES + 1):
                try:
                    self._spark.sql(query, rows=rows)
                    return
                except Exception as error:
                    if not CONFLICT.search(str(error)) or attempt == TRIES:
                        raise self._cannot(error) from None
                log.info("another run has changed %s; merging again", self.location)
                time.sleep(0.1 * attempt)
        finally:
            if self._spark.conf.get(METADATA, None):
                self._spark.conf.unset(METADATA)

    def _sql(self, query: str) -> "DataFrame":
        try:
            return self._spark.sql(query)
        except Exception as error:
            raise self._cannot(error) from None

    def _cannot(self, error: Exception) -> RunError:
        return RunError(
            f"Spark cannot use the table {self.location}: {spark_failure(error)}; it needs Delta Lake and the right to "
            "write there (conf/README.md), and what is finished is kept"
        )


def _checked_name(output: str) -> str:
    name = output.removeprefix(TABLE)
    if not NAME.fullmatch(name):
        raise ConfigError(f"{output} names no table: write table:NAME, table:SCHEMA.NAME or table:CATALOG.SCHEMA.NAME")
    return name
