"""A Delta table in a storage: its versions, and commits that add and remove whole files. Of the driver alone.

The library `deltalake` reads and writes the log; the files themselves are read and written by our own storage. Each
commit names one application, with which Delta lets none pass that began at an older version: so what a commit adds and
removes was decided on the version right before it. Errors are explained, and show no credential.

Two commits in the same moment are kept apart by the storage, which lets one file of the log be created once. On the
mounts of Databricks (`/Volumes`, `dbfs:/`) nothing does, and there one run at a time is the user's to see to.
"""

import contextlib
import json
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
from deltalake import CommitProperties, DeltaTable, Schema, Transaction
from deltalake.exceptions import DeltaError, TableNotFoundError
from deltalake.transaction import AddAction, RemoveAction, create_table_with_add_actions

from helpers.errors import StorageError, first_line
from helpers.redaction import redact
from helpers.storage import Storage
from helpers.storage.local import SYSTEM_ERROR

APPLICATION = "spark-vision"
LOG = "_delta_log"
# Databricks' default, instead of the library's 100: a version is read from this many small files at most.
CONFIGURATION = {"delta.checkpointInterval": "10"}
COMMIT = b'{"commitInfo"'  # begins the line of the log on a commit itself
# What is known of the files of a table, and what the library calls it.
TOLD = {"name": "path", "rows": "num_records", "first": "min.path", "last": "max.path"}
TOLD |= {"first_model": "min.model", "last_model": "max.model"}
FILES_SCHEMA = pa.schema([(name, pa.int64() if name == "rows" else pa.string()) for name in TOLD])
COLORS = re.compile(r"\x1b\[\d*m")


class Conflict(Exception):  # noqa: N818 - it is no error: the run looks again
    """Another commit was first."""


class File(NamedTuple):
    """What a commit says of a file that it adds: its size in bytes, and Delta's statistics of its rows as JSON."""

    size: int
    statistics: str


class Version(NamedTuple):
    """One version of the table.

    `files` are those in it (`FILES_SCHEMA`), with what the log says of their rows: how many, the first and the last of
    their paths, or texts before and after these, and the same of the models. Null is what it does not say.
    """

    number: int
    files: pa.Table
    table: DeltaTable | None  # None before there is a table, at version -1

    @property
    def names(self) -> set[str]:
        """Of the files; all lie in the table's folder."""
        return set(self.files["name"].to_pylist())

    def between(self, first: str, last: str) -> pa.Table:
        """The files that may have rows of paths between two."""
        within = pc.and_(pc.less_equal(self.files["first"], last), pc.greater_equal(self.files["last"], first))
        return self.files.filter(within.fill_null(True))

    def removed(self) -> set[str]:
        """Names of files that earlier commits have removed, whether or not they have been deleted."""
        if self.table is None:
            return set()
        names = self.table.vacuum(retention_hours=0, dry_run=True, enforce_retention_duration=False)
        return {name.rpartition("/")[2] for name in names}

    @property
    def schema(self) -> pa.Schema | None:
        """Its columns; None before there is a table."""
        return pa.schema(self.table.schema().to_arrow()) if self.table else None

    def mark(self, name: str) -> int:
        """The last value that a commit has given to a mark; -1 where none has."""
        value = self.table.transaction_version(name) if self.table else None
        return -1 if value is None else value


NONE = Version(-1, FILES_SCHEMA.empty_table(), None)


class Table:
    """The table in a folder of a storage; rows have the columns of a schema, or begin with them."""

    def __init__(self, storage: Storage, folder: str, schema: pa.Schema, may_have_more: bool = False):
        self.storage, self.folder, self.schema, self.may_have_more = storage, folder, schema, may_have_more

    def open(self, number: int | None = None) -> Version:
        """A version of the table, by default the newest; `NONE` where there is no table.

        Raises:
            StorageError: the log is damaged or cannot be read, the table has other columns, or no such version.
        """
        uri, options = self.storage.delta_table(self.folder)
        with self._explained(f"its log cannot be read; restore {LOG} from a copy, or move {self.folder} away"):
            try:
                table = DeltaTable(uri, version=number, storage_options=options)
            except TableNotFoundError as error:
                if SYSTEM_ERROR.search(str(error)) and "code: 2," not in str(error):
                    raise
                return NONE
            columns = pa.schema(table.schema().to_arrow())
            first = pa.schema(list(columns)[: len(self.schema)]) if self.may_have_more else columns
            if not first.equals(self.schema):
                raise StorageError(
                    f"{self.storage.join(self.folder)} is a table of other columns ({', '.join(columns.names)}); name "
                    "another --output, or move it away"
                )
            return Version(table.version(), _files(pa.table(table.get_add_actions(flatten=True))), table)

    def create(self, files: Mapping[str, File] | None = None, about: Mapping[str, Any] | None = None) -> Version:
        """Make the table, of files that lie there, unless another process has just made it; return its newest version.

        Raises:
            StorageError: the storage cannot be written.
        """
        uri, options = self.storage.delta_table(self.folder)
        adds = [_added(name, file) for name, file in (files or {}).items()]
        properties = CommitProperties(custom_metadata=dict(about or {}), app_transactions=[Transaction(APPLICATION, 0)])
        with self._explained("its log cannot be written"):
            try:
                create_table_with_add_actions(
                    uri, Schema.from_arrow(self.schema), adds, configuration=CONFIGURATION, storage_options=options,
                    commit_properties=properties,
                )  # fmt: skip
            except DeltaError:
                if self.open() is NONE:
                    raise
        return self.open()

    def commit(
        self,
        version: Version,
        adds: Mapping[str, File],
        removes: Iterable[str],
        about: Mapping[str, Any],
        marks: Mapping[str, int],
    ) -> None:
        """Add and remove files in one step, after which readers see all of it.

        Args:
            version: on which this was decided.
            adds: by name.
            removes: names; of files that are not in the table too, so that nobody adds them any more.
            about: goes into the table's history.
            marks: values that every later version has, whatever becomes of the history.

        Raises:
            Conflict: the table has a newer version, which may be this very commit if its answer was lost.
            StorageError: the storage cannot be written.
        """
        now = _milliseconds()
        actions = [_added(name, file) for name, file in adds.items()]
        gone = [RemoveAction(path=name, data_change=True, deletion_timestamp=now) for name in removes]
        transactions = [Transaction(APPLICATION, version.number), *(Transaction(*mark) for mark in marks.items())]
        assert version.table is not None
        with self._explained("its log cannot be written"):
            try:
                version.table.create_write_transaction(
                    [*actions, *gone], "append", Schema.from_arrow(self.schema), partition_by=[],
                    commit_properties=CommitProperties(custom_metadata=dict(about), app_transactions=transactions),
                )  # fmt: skip
            except (DeltaError, OSError) as error:
                if self.open().number > version.number:
                    raise Conflict from error
                raise

    def vacuum(self, hours: float, present: Iterable[str]) -> int:
        """Delete files that were removed so many hours ago, and return how many.

        0 deletes them even while readers of an older version may be at work. Nothing is done where none of the removed
        is among the names of files that are `present`.

        Raises:
            StorageError: the storage cannot be written.
        """
        table = self.open().table
        if table is None:
            return 0
        settings: dict[str, Any] = {"retention_hours": round(hours), "enforce_retention_duration": False}
        with self._explained("removed files cannot be deleted"):
            names = {name.rpartition("/")[2] for name in table.vacuum(dry_run=True, **settings)}
            doomed = names.intersection(present)
            if doomed:
                table.vacuum(dry_run=False, **settings)
        return len(doomed)

    def history(self, limit: int | None = None) -> list[dict[str, Any]]:
        """What commits, or the last of them, tell of themselves, the newest first.

        `version` and `timestamp` (milliseconds) are among it.
        """
        table = self.open().table
        with self._explained("its log cannot be read"):
            return table.history(limit) if table else []

    def last_change(self, version: Version) -> tuple[int, dict[str, Any]]:
        """The number of the newest commit up to a version that was no clean-up, and what it tells of itself.

        It is looked up in the log itself, because the library's history of a version that is not the newest any more
        has other numbers. (-1, {}) where the log does not go back so far.
        """
        with self._explained("its log cannot be read"):
            for number in range(version.number, -1, -1):
                try:
                    lines = self.storage.read(f"{self.folder}/{LOG}/{number:020}.json").splitlines()
                except FileNotFoundError:
                    break
                about: dict[str, Any] = next(
                    (json.loads(line)["commitInfo"] for line in lines if line.startswith(COMMIT)), {}
                )
                if not str(about.get("operation")).startswith("VACUUM"):
                    return number, about
        return -1, {}

    @contextlib.contextmanager
    def _explained(self, otherwise: str) -> Iterator[None]:
        """Turn the library's errors, which may show addresses with a SAS token, into ours."""
        try:
            yield
        except (DeltaError, OSError, ValueError) as error:
            shown = COLORS.sub("", redact(str(error)))
            lines = [line.strip(" ↳") for line in shown.splitlines() if line.strip(" ↳")]
            why = ": ".join([lines[0], lines[-1]] if "Generic" in lines[0] else lines[:1])
            told = StorageError(f"{self.storage.join(self.folder)}: {otherwise} ({first_line(why)})")
            raise self.storage.table_error(self.folder, ": ".join(lines)) or told from None


def _files(adds: pa.Table) -> pa.Table:
    """What the library says of the files in a table, without all that nobody asks for: there may be many."""
    columns = [
        adds[told].cast(column.type) if told in adds.column_names else pa.nulls(adds.num_rows, column.type)
        for column, told in zip(FILES_SCHEMA, TOLD.values(), strict=True)
    ]
    return pa.table(columns, schema=FILES_SCHEMA)


def _added(name: str, file: File) -> AddAction:
    return AddAction(name, file.size, {}, _milliseconds(), True, file.statistics)


def _milliseconds() -> int:
    return int(time.time() * 1000)
