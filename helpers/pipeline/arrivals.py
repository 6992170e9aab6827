"""New files from Databricks' Auto Loader as a source, `cloudFiles:URI`: a run lists none of the others. On the driver.

    OUTPUT/_arrivals/SOURCE/checkpoint/   what Auto Loader remembers of a location
    OUTPUT/_arrivals/SOURCE/RUN/          files that have arrived: a Delta table of paths, lengths and times

A run has Auto Loader write down what has arrived, without reading it. Then it works on the files in all these tables as
if it had listed them. Their keys are those of a listing, so that the results tell which of them are done: a file that
arrives twice has one result.

Tables are deleted by the run that has read them, once its results are published. A killed run leaves its table to the
next one. Files with an error that may pass (a timeout, a permission, a limit that is set) go into a table again, and
the next run looks at them.

Auto Loader tells of files that come, and of none that go. Empty files and names that begin with `_` it passes over, as
all of Spark does. A run over the URI itself, into the same output, finds these.
"""

import contextlib
import errno
import hashlib
import re
from collections.abc import Collection, Iterator
from datetime import UTC, datetime, timedelta
from functools import reduce
from typing import TYPE_CHECKING, NamedTuple, cast

import pyarrow as pa
import pyarrow.compute as pc

from helpers.config import Config
from helpers.errors import HostError, RunError
from helpers.images.boundary import READ_ERRORS
from helpers.pipeline.folders import ABANDONED
from helpers.pipeline.listing import Listing
from helpers.pipeline.readers import literal
from helpers.pipeline.rows import file_paths, is_in, is_lasting
from helpers.pipeline.schemas import KEY_NAMES
from helpers.pipeline.sources import AUTO_LOADER
from helpers.pipeline.table import LOG
from helpers.pipeline.task import Task
from helpers.session import spark_failure
from helpers.storage import Storage
from helpers.storage.interface import Entry
from helpers.storage.local import NO_TIME, LocalStorage
from helpers.temporary import on_disk

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

FORMAT = "cloudFiles"
OPTIONS = {
    "cloudFiles.format": "binaryFile",
    "cloudFiles.allowOverwrites": "true",  # a file that changes arrives again
    "cloudFiles.partitionColumns": "",  # a folder `a=1` is no column
    "cloudFiles.maxFilesPerTrigger": "100000",  # of names alone; 1000 by default, with a commit for each
    "recursiveFileLookup": "true",
}
ARRIVALS, CHECKPOINT = "_arrivals", "checkpoint"
PREFIX = "^(file:/+|dbfs:/+|/dbfs/)"  # of a path in a file system, by Spark or by Databricks' mount
COMMIT = re.compile(rf"{LOG}/(\d{{20}})\.json")
CONDITION = re.compile(r"\[[A-Z_.]+\] .*")  # in an exception of Spark, which may begin with the call that failed


class _Table(NamedTuple):
    """A table of arrivals: the numbers of its commits, none where a stream was killed in its first, and its age."""

    commits: frozenset[int]
    changed: datetime


class Arrivals:
    """The files of a location that have arrived and are not settled; the name is what the records say of the source."""

    def __init__(self, spark: "SparkSession", task: Task, config: Config):
        """Open the stream, which reads nothing yet.

        Raises HostError if Spark has no Auto Loader here, or it cannot read the location.
        """
        self.name = f"{AUTO_LOADER}{task.source.root}"
        self._spark, self._files, self._output = spark, cast(Storage, task.source), task.output
        source = hashlib.blake2b(task.source.root.encode(), digest_size=6).hexdigest()
        self._folder, self._run = f"{ARRIVALS}/{source}", task.run
        self._tables: dict[str, _Table] = {}  # that were read, by run
        self._left: list[pa.Table] = []  # files that are not settled
        suffixes = (*config.ingest.suffixes, *config.video.suffixes, *config.ingest.archives)
        either = ("".join(f"[{c.lower()}{c.upper()}]" if c.isalpha() else c for c in suffix) for suffix in suffixes)
        pattern = "{" + ",".join(f"*{end}" for end in either) + "}"  # names that end in a suffix, in capitals or not
        self._stream = self._open({**OPTIONS, "pathGlobFilter": pattern, **config.source.options})

    def take(self, skip: Collection[str]) -> Iterator[Entry]:
        """The files that have arrived until now, as the location's storage lists them, each once, but for some folders.

        Raises RunError if Spark cannot read the location, or write below the output.
        """
        try:
            stream = self._stream.writeStream.format("delta").option("checkpointLocation", self._place(CHECKPOINT))
            query = stream.trigger(availableNow=True).start(self._place(self._run))  # into a table of this run's
            try:
                query.awaitTermination()
            finally:
                query.stop()
            self._tables = {run: table for run, table in self._present().items() if 0 in table.commits}
            # Spark does not keep the rows while the tasks of a slice run.
            files = on_disk(map(tuple, self._newest().toLocalIterator())) if self._tables else iter(())
        except Exception as error:
            raise RunError(
                f"{self.name} cannot be read: {spark_failure(error)}; Spark itself must reach the source and "
                f"{self._output.join(ARRIVALS)}. If you delete the latter, all files arrive again, and those that are "
                "done are skipped"
            ) from None
        left_out = tuple(f"{folder}/" for folder in skip)
        for path, length, microseconds in files:
            place = listed_path(path, self._files)
            if not place.startswith(left_out):
                yield self._look(place, length, NO_TIME + timedelta(microseconds=microseconds))

    def settle(self, listed: Listing, failed: pa.Table | None) -> None:
        """Take note of which files of a slice the next run has to look at again.

        `failed` are path and error of its images with one; None where nobody knows.
        """
        files = pa.concat_tables([listed.images, listed.videos, listed.archives]).select(KEY_NAMES)
        if failed is not None:
            # What has gone arrives again if it comes back.
            is_settled = pc.or_(is_lasting(failed["error"]), pc.equal(failed["error"], READ_ERRORS[errno.ENOENT]))
            open_paths = failed.filter(pc.invert(is_settled))["path"]
            files = files.filter(is_in(files["path"], file_paths(open_paths)))
        self._left.append(files)

    def forget(self) -> None:
        """Forget what has arrived but for what is not settled; to be called when all results are published.

        Tables to which somebody has added since they were read stay, and so do those that may be in the making.
        """
        left = pa.concat_tables(self._left) if self._left else pa.table({})
        if left.num_rows:
            rows = self._spark.createDataFrame(left).write.format("delta")
            rows.mode("overwrite").save(self._place(self._run))
        for run, table in self._present().items():
            is_read = run in self._tables and self._tables[run].commits == table.commits
            is_waste = 0 not in table.commits and table.changed < datetime.now(UTC) - ABANDONED
            if (is_read or is_waste) and not (run == self._run and left.num_rows):
                self._output.delete(f"{self._folder}/{run}")

    def _open(self, options: dict[str, str]) -> "DataFrame":
        from pyspark.sql import functions as F

        try:
            files = self._spark.readStream.format(FORMAT).options(**options).load(literal(_spark_path(self._files)))
            assert files.schema.names  # which has Spark look for the format now, over Connect too
        except Exception as error:
            condition = CONDITION.search(str(error))
            why = condition[0] if condition else spark_failure(error)
            raise HostError(
                f"{self.name}: Spark cannot take new files from Auto Loader, which only Databricks has ({why}); name "
                f"{self._files.root} itself as the --source: that lists all files, and works everywhere"
            ) from None
        return files.select("path", "length", F.col("modificationTime").alias("modified"))

    def _present(self) -> dict[str, _Table]:
        """The tables of arrivals, by run."""
        folder = self._output.join(self._folder)
        commits: dict[str, set[int]] = {}
        changed: dict[str, datetime] = {}
        entries = self._output.list(self._folder, skip=[self._output.join(self._folder, CHECKPOINT)])
        for entry in entries if self._output.exists(self._folder) else ():
            run, _, name = entry.path.removeprefix(f"{folder}/").partition("/")
            numbers = commits.setdefault(run, set())
            if match := COMMIT.fullmatch(name):
                numbers.add(int(match[1]))
            changed[run] = max(changed.get(run, NO_TIME), entry.modified)
        return {run: _Table(frozenset(numbers), changed[run]) for run, numbers in commits.items()}

    def _newest(self) -> "DataFrame":
        """Path, length and time in microseconds of each file that has arrived, in the order of paths."""
        from pyspark.sql import functions as F

        tables = [self._spark.read.format("delta").load(self._place(run)) for run in self._tables]
        rows = reduce(lambda one, other: one.unionByName(other), tables)
        rows = rows.withColumn("path", F.regexp_replace("path", PREFIX, "/"))
        files = rows.groupBy("path").agg(F.max(F.struct("modified", "length")).alias("file"))
        return files.select("path", "file.length", F.unix_micros("file.modified")).sort("path")

    def _look(self, place: str, length: int, modified: datetime) -> Entry:
        """A file as the location's storage lists it, from what Spark knows: its time to the millisecond."""
        if isinstance(self._files, LocalStorage):  # whose times are finer than those of object storage
            with contextlib.suppress(OSError):  # it has gone: the task that reads it says so
                return self._files.stat(place)
        return Entry(place, length, modified)

    def _place(self, name: str) -> str:
        return _spark_path(self._output, f"{self._folder}/{name}")


def listed_path(path: str, files: Storage) -> str:
    """What a storage calls a file below its location that Spark calls by a path.

    Raises RunError if the file is not below the location.
    """
    path, root = (re.sub(PREFIX, "/", name) for name in (path, f"{files.root.rstrip('/')}/"))
    if not path.startswith(root):
        raise RunError(f"Auto Loader tells of {path}, which is not below {root}; name another --source")
    return files.join(path.removeprefix(root))


def _spark_path(storage: Storage, name: str = "") -> str:
    """What Spark calls a place: it does not see Databricks' mount."""
    return re.sub("^/dbfs/", "dbfs:/", storage.join(name) if name else storage.root)
