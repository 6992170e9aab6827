"""The folders of an output: files of rows that tasks have staged, those in the results, and what may lie beside them.

Only files of these names are ever moved or removed. Anything else in these folders is somebody else's, and an error.
Paths are relative to the output.
"""

import re
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from functools import partial

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from helpers.errors import StorageError, explain, first_line
from helpers.pipeline.records import RUNS
from helpers.pipeline.rows import ROWS_SCHEMA
from helpers.pipeline.schemas import EARLIER_RESULT_SCHEMA, conform
from helpers.pipeline.table import LOG, NONE, Table, Version
from helpers.pipeline.task import STAGING, staging
from helpers.storage import Storage
from helpers.storage.interface import UNFINISHED, Entry
from helpers.storage.parquet import write_table
from helpers.storage.prefetch import map_each

RESULTS = "results"
PICTURES = "pictures"
REPORT = "report"
KEEP, ALONE = ".keep", ".alone"  # in a run's staging folder: whether others may take its files
# Files of rows in our folders, and what else may lie there: in the results hidden files, which no reader takes.
FILES = {RESULTS: re.compile(r"[^._/][^/]*\.parquet"), STAGING: re.compile(r"[\w-]+/\d{6,}-\d+-\d+\.parquet")}
OTHERS = {
    RESULTS: re.compile(rf"\.[^/]*|{LOG}(/.*)?"),
    STAGING: re.compile(rf"([\w-]+/)?(\.keep|\.alone|{UNFINISHED.pattern})|\.[0-9a-f]{{32}}\.deleted(/.*)?"),
}
STARTED = re.compile(r"(\d{8})T(\d{6})(?:-([0-9a-f]{4}))?")  # begins the name of a run (`driver.make_task`)
OURS = re.compile(r"\d{8}T\d{6}-[0-9a-f]{8}-[\w-]+\.parquet")  # a file that a run has brought into the results
STARTED_OVER = "spark-vision started over"  # the table's mark of when the last run began that did
ABANDONED = timedelta(days=1)  # nobody writes one file, or nothing of a run, for so long


class Folders:
    """The folders below one output; rows have the columns of a schema, or begin with them where they may have more."""

    def __init__(self, storage: Storage, schema: pa.Schema, may_have_more: bool):
        self.storage, self._schema, self._may_have_more = storage, schema, may_have_more
        self._table = Table(storage, RESULTS, schema, may_have_more)

    @property
    def folders(self) -> list[str]:
        """Where they are; what is below is no source of images."""
        return [self.storage.join(name) for name in (RESULTS, PICTURES, REPORT, RUNS, STAGING)]

    def check_writing(self) -> None:
        """Raise StorageError where nothing can be written."""
        self.storage.write(f"{STAGING}/{KEEP}", b"")
        self.storage.delete(f"{STAGING}/{KEEP}")
        self.storage.prune(STAGING)

    def stage(self, run: str, alone: bool = False) -> None:
        """Make a run's staging folder, or have it again where another run has removed it as empty."""
        self.storage.write(f"{staging(run)}/{ALONE if alone else KEEP}", b"")

    def unstage(self, run: str) -> None:
        """Remove a run's staging folder, unless somebody has put something there meanwhile."""
        self.staged(run)
        self.storage.delete(staging(run))
        self.storage.prune(STAGING)

    def staged(self, run: str) -> set[str]:
        """The files of rows that a run's tasks have staged."""
        return set(self._list(STAGING, run)[0])

    def result_files(self) -> dict[str, Entry]:
        """The files of rows in the results, whether or not the table has them."""
        return self._list(RESULTS)[0]

    def leftovers(self, version: Version) -> tuple[dict[str, int], set[str]]:
        """The files of other runs that no version of the table has.

        Returns:
            Those that are finished and not committed, with their sizes in bytes, of the run that began last first; and
            those that are of no use to anybody.

        Raises:
            StorageError: something that is not ours lies in our folders.
        """
        (staged, markers), results = self._list(STAGING), self.result_files()
        keep, alone = ({run_of(path) for path in markers if name_of(path) == name} for name in (KEEP, ALONE))
        files = {path: entry.length for path, entry in staged.items() if run_of(path) not in alone}
        began, names = version.mark(STARTED_OVER), version.names
        useless = {path for path in files if time_of(run_of(path)) < began}
        untracked = {path for path in results if version is not NONE and name_of(path) not in names}
        removed = version.removed() if untracked else set()
        strange = []
        for path in untracked:
            name = name_of(path)
            run = next((run for run in keep | alone if name.startswith(f"{run}-")), None)
            if name in removed or run in alone:
                continue
            if run and FILES[STAGING].fullmatch(_staged(path).partition("/")[2]) and time_of(run) >= began:
                files[path] = results[path].length
            elif run or OURS.fullmatch(name):
                useless.add(path)
            else:
                strange.append(path)
        newest = self._table.open().names if strange else set()  # one may have been added just now
        for path in strange:
            if name_of(path) not in newest:
                raise self.strange(path)
        last_first = sorted(sorted(files.keys() - useless), key=run_of, reverse=True)
        return {path: files[path] for path in last_first}, useless

    def sweep(self) -> None:
        """Remove the folders of other runs from staging that have nothing in them, or nothing new for a day."""
        staged, others = self._list(STAGING)
        entries = staged | others
        for run in {path.split("/")[1] for path in entries if entries[path].is_directory or path.count("/") > 1}:
            folder = staging(run)
            below = {path: entry for path, entry in entries.items() if path.startswith(f"{folder}/")}
            if below.keys() <= {f"{folder}/{KEEP}"}:
                self.storage.delete(f"{folder}/{KEEP}")
                self.storage.prune(folder)
            elif max(entry.modified for entry in below.values()) < datetime.now(UTC) - ABANDONED:
                self.storage.delete(folder)
        self.storage.prune(STAGING)

    def tidy(self) -> None:
        """Remove the unfinished files of writers that were killed."""
        for folder in (RESULTS, PICTURES, REPORT, RUNS):
            for entry in list(self.storage.list(folder)) if self.storage.exists(folder) else []:
                parent, _, name = entry.path.rpartition("/")
                is_old = entry.modified < datetime.now(UTC) - ABANDONED
                if parent == self.storage.join(folder) and UNFINISHED.fullmatch(name) and is_old:
                    self.storage.delete(entry.path)

    def move(self, source: str, target: str) -> None:
        """Move a staged file, unless another run has just done the same."""
        try:
            self.storage.rename(source, target)
        except FileNotFoundError:
            if not self.storage.exists(target):
                raise

    def rows(self, files: Iterable[str], within: tuple[str, str] | None = None) -> pa.Table:
        """`ROWS_SCHEMA` of every row in some files, or of those with a path between two; raises as `load` does."""
        files, tables = list(files), []
        read = map_each(partial(self.load, columns=ROWS_SCHEMA.names[:-1]), files, self.storage.concurrent_reads)
        for file, table in zip(files, read, strict=True):
            if within is not None:
                first, last = pc.greater_equal(table["path"], within[0]), pc.less_equal(table["path"], within[1])
                table = table.filter(pc.and_(first, last))
            tables.append(table.append_column("file", pa.array([file] * table.num_rows, pa.string())))
        return pa.concat_tables(tables or [ROWS_SCHEMA.empty_table()])

    def load(self, path: str, columns: list[str] | None = None) -> pa.Table:
        """One file of rows, or some of its columns.

        Raises FileNotFoundError if there is no such file, and StorageError if it is damaged, or not ours.
        """
        file = self._open(path)
        schema = pa.schema([*self._schema, *list(file.schema_arrow)[len(self._schema) :]])
        try:
            rows = file.read(columns, use_threads=False)  # of one task: too few for threads
            return conform(rows, pa.schema([schema.field(name) for name in columns or schema.names]))
        except (OSError, pa.ArrowException) as error:
            raise self._unreadable(path, first_line(error)) from None

    def renew(self, path: str, size: int) -> int:
        """Give a file of an earlier version the columns of today; takes and returns its size in bytes."""
        if self._open(path).schema_arrow.equals(self._schema):
            return size
        return write_table(self.storage, path, self.load(path))

    def strange(self, path: str) -> StorageError:
        """What is raised for a file that is not of this project."""
        place, folder = self.storage.join(path), self.storage.join(path.partition("/")[0])
        remedy = "move it away, or name another --output"
        return StorageError(f"{place} is not of this project, and {folder} is for its results alone; {remedy}")

    def _open(self, path: str) -> pq.ParquetFile:
        """One file of rows; a staged one from where another run has moved it, if it has."""
        try:
            place = path if path == target_of(path) or self.storage.exists(path) else target_of(path)
            # No Python file object: Arrow's threads can outlive the interpreter with one, and abort the process.
            file = pq.ParquetFile(pa.BufferReader(self.storage.read(place)))
        except FileNotFoundError:
            raise
        except pa.ArrowException as error:
            raise self._unreadable(path, first_line(error)) from None
        except OSError as error:
            raise StorageError(explain(error, self.storage.join(path))) from None
        # Those who compact the table may write types of their own, which are cast.
        names, ours = file.schema_arrow.names, self._schema.names
        if self._may_have_more:
            names = names[: len(ours)]
        if names not in (ours, EARLIER_RESULT_SCHEMA.names):
            raise self._unreadable(path, "its columns are others")
        return file

    def _unreadable(self, path: str, why: str) -> StorageError:
        place = self.storage.join(path)
        return StorageError(f"{place} holds no results that can be read ({why}); move it away and run again")

    def _list(self, folder: str, run: str = "") -> tuple[dict[str, Entry], dict[str, Entry]]:
        """The files of rows in one of our folders, and what else may lie there.

        Raises StorageError if anything else is in it.
        """
        start, files, others = f"{folder}/{run}" if run else folder, {}, {}
        try:
            entries = list(self.storage.list(start, directories=True)) if self.storage.exists(start) else []
        except StorageError:
            if self.storage.exists(start):
                raise
            entries = []  # another run has just removed it
        for entry in entries:
            name = entry.path[len(self.storage.join(folder)) + 1 :]
            if not entry.is_directory and FILES[folder].fullmatch(name):
                files[f"{folder}/{name}"] = entry
            elif OTHERS[folder].fullmatch(name) or (entry.is_directory and folder == STAGING and "/" not in name):
                others[f"{folder}/{name}"] = entry
            else:
                raise self.strange(f"{folder}/{name}".rstrip("/"))
        return files, others


def staged_counts(paths: Iterable[str]) -> tuple[int, int]:
    """Images and failed images of tasks' files, from the names that `task` gives them."""
    counts = [name_of(path).removesuffix(".parquet").split("-") for path in paths]
    return sum(int(images) for _, images, _ in counts), sum(int(failed) for *_, failed in counts)


def time_of(run: str) -> int:
    """When a run began, from its name, as a number that counts 2^16 parts of each second; 0 where it tells no time."""
    told = STARTED.match(run)
    return int(told[1] + told[2]) * 2**16 + int(told[3] or "0", 16) if told else 0


def target_of(path: str) -> str:
    """Where a staged file comes to lie in the results."""
    return f"{RESULTS}/{path.removeprefix(f'{STAGING}/').replace('/', '-')}" if path.startswith(STAGING) else path


def run_of(path: str) -> str:
    """The run of a staged file, or of one that was."""
    return _staged(path).split("/")[1]


def name_of(path: str) -> str:
    """The last part of a path, which is what the table calls a file."""
    return path.rpartition("/")[2]


def _staged(path: str) -> str:
    """Where a file of a task in the results was staged."""
    return re.sub(rf"^{RESULTS}/(.+)-(\d+-\d+-\d+\.parquet)$", rf"{STAGING}/\1/\2", path)
