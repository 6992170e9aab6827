"""Exactly-once results in plain Parquet, on any storage.

    OUTPUT/results/           what readers see: whole files, one row per image and model
    OUTPUT/_staging/RUN/      files of tasks that have ended, not yet published
    OUTPUT/runs/              what each run took (`helpers.pipeline.records`)
    OUTPUT/_lock              held by the one run that may write

A task writes its file to its run's staging folder in one step. The driver publishes by renaming the files of the tasks
that Spark accepted, after it has taken the rows that they replace out of older files. The next run publishes what a
killed run left staged, less what is in the results already: a row can neither be lost nor come twice. After a kill in
the middle of publishing, a changed image has no row until that next run, which needs no Spark for it. An executor that
outlives its driver writes to a staging folder that is gone, or that nobody will take from twice.

Only files of these names are ever removed. A run refuses folders that hold anything else before it writes.
"""

import contextlib
import logging
import re
import uuid
from collections.abc import Iterator
from functools import partial
from itertools import chain

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from helpers.errors import RunError, StorageError, explain, first_line, only_warn
from helpers.pipeline.records import RUNS
from helpers.pipeline.rows import (
    ROWS_SCHEMA,
    count_values,
    is_among,
    is_in,
    older_rows,
    replaced,
    rows_of_later_runs,
    settled,
)
from helpers.pipeline.schemas import EARLIER_RESULT_SCHEMA, RESULT_SCHEMA, conform
from helpers.pipeline.task import STAGING, staged_counts, staging
from helpers.storage import Storage
from helpers.storage.interface import UNFINISHED
from helpers.storage.parquet import write_table
from helpers.storage.prefetch import map_groups

log = logging.getLogger(__name__)

RESULTS = "results"
PICTURES = "pictures"
# Files of rows in our folders, and what else may lie there: in the results hidden files, which no reader takes.
FILES = {RESULTS: re.compile(r"[^._/][^/]*\.parquet"), STAGING: re.compile(r"[\w-]+/\d{6,}-\d+-\d+\.parquet")}
OTHERS = {RESULTS: re.compile(r"\.[^/]*"), STAGING: re.compile(rf"[\w-]+/(\.keep|{UNFINISHED.pattern})")}


class ResultStore:
    """The results below one output location."""

    def __init__(self, storage: Storage):
        self.storage = storage

    @property
    def location(self) -> str:
        """Where readers find the results."""
        return self.storage.join(RESULTS)

    @property
    def folders(self) -> list[str]:
        """What is below the output of ours, and is no source of images."""
        return [self.storage.join(name) for name in (RESULTS, PICTURES, RUNS, STAGING)]

    @contextlib.contextmanager
    def exclusive(self) -> Iterator[None]:
        """Be the one run that writes here.

        Raises:
            RunError: another run is at work in this output.
            StorageError: something that is not ours lies in our folders, or nothing can be written here.
        """
        for folder in FILES:
            self._files(folder)
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(self.storage.lock("_lock"))
            except BlockingIOError:
                raise RunError(
                    f"another run is writing to {self.storage.root}; wait for it, or name another --output"
                ) from None
            with only_warn("what killed runs have left could not be removed"):
                self._tidy()
            yield

    def rows(self, files: list[str] | None = None) -> pa.Table:
        """Path, length, modification time, error, model and file of every row in some files, by default all results.

        Raises:
            StorageError: a file is damaged, or not ours.
        """
        files = self._files(RESULTS) if files is None else files
        width = self.storage.concurrent_reads
        groups = (files[start : start + width] for start in range(0, len(files), width))
        read = map_groups(partial(self._load, columns=ROWS_SCHEMA.names[:-1]), groups, width)
        tables = [
            table.append_column("file", pa.array([file] * table.num_rows, pa.string()))
            for file, table in zip(files, chain.from_iterable(read), strict=True)
        ]
        return pa.concat_tables(tables or [ROWS_SCHEMA.empty_table()])

    def read(self) -> pa.Table:
        """All results in this process's memory; with millions of images, read the location with Spark instead."""
        tables = [self._load(file) for file in self._files(RESULTS)]
        return pa.concat_tables(tables or [RESULT_SCHEMA.empty_table()])

    def resume(self, *models: str) -> pa.Table:
        """What earlier runs of some models have left: repaired, with what killed ones left staged; returns its `rows`.

        Raises:
            RunError: the results are another model's, or what is staged is.
            StorageError: a file is damaged, or not ours.
        """
        rows = self.rows()
        self._check_models(rows, models)
        repaired = self._repair(rows)
        return self.rows() if self.recover(*models) or repaired else rows

    def stage(self, run: str) -> None:
        """Make a run's staging folder."""
        self.storage.write(f"{staging(run)}/.keep", b"")

    def unstage(self) -> None:
        """Remove what is staged; only the one run that writes here has anything there."""
        self._files(STAGING)  # somebody may have put something there meanwhile
        self.storage.delete(STAGING)

    def progress(self, run: str) -> tuple[int, int]:
        """Images and failed images that a run's tasks have finished so far."""
        counts = [staged_counts(path) for path in self._files(staging(run))]
        return sum(images for images, _ in counts), sum(failed for _, failed in counts)

    def recover(self, *models: str) -> int:
        """Publish what earlier, killed runs left staged, and return how many rows that were.

        Args:
            models: what this run is of; by default one, which may be any.

        Raises:
            RunError: it is another model's than those given.
            StorageError: a file is damaged, or not ours.
        """
        files, recovered = sorted(self._files(STAGING)), 0
        rows = self.rows() if files else ROWS_SCHEMA.empty_table()
        for path in files:
            staged = self._load(path)
            if models:
                self._check_models(staged, models)
            done = settled(rows, len(models) or 1)
            # An image that failed for want of something is done only once it has been tried with success.
            known = pc.if_else(pc.is_null(staged["error"]), is_among(staged, done), is_among(staged, rows))
            # A task that outlived its driver may have ended after a later run, which saw the image as it is now.
            late = is_in(staged["path"], rows_of_later_runs(rows, path.split("/")[-2])["path"])
            fresh = staged.filter(pc.invert(pc.or_(known, late)))
            # The rows of an image, one per model, stay together: they replace all that it has.
            fresh = staged.filter(is_in(staged["path"], fresh["path"]))
            if fresh.num_rows:
                if fresh.num_rows < staged.num_rows:
                    write_table(self.storage, path, fresh)
                published = self.publish([path], replaced(fresh, rows))
                others = rows.filter(pc.invert(is_in(rows["path"], fresh["path"])))
                rows, recovered = pa.concat_tables([others, self.rows(published)]), recovered + fresh.num_rows
        self.unstage()
        if recovered:
            log.info("kept %d results of an earlier run that did not end", recovered)
        return recovered

    def publish(self, staged: list[str], replacing: pa.ChunkedArray | None = None) -> list[str]:
        """Move staged files to the results, in place of earlier rows of the given paths; return where they are."""
        if replacing is not None and len(replacing):
            rows = self.rows()
            self._remove(rows, rows.filter(is_in(rows["path"], replacing)))
        published = []
        for path in staged:
            run, name = path.split("/")[-2:]
            target = f"{RESULTS}/{run}-{name}"
            if self.storage.exists(target):  # of another attempt of the task, which finished other images
                target = f"{RESULTS}/{run}-{uuid.uuid4().hex[:8]}-{name}"
            self.storage.rename(path, target)
            published.append(target)
        if not self.storage.exists(RESULTS):
            # Nothing was new and there are no earlier results: readers still find the schema.
            write_table(self.storage, f"{RESULTS}/none.parquet", RESULT_SCHEMA.empty_table())
        return published

    def _check_models(self, rows: pa.Table, models: tuple[str, ...]) -> None:
        others = sorted(set(rows["model"].unique().to_pylist()) - set(models))
        if others:
            raise RunError(
                f"{self.storage.root} holds results of {others[0]}, and this run is of {' and '.join(models)}; name "
                "another --output, or replace them with --set resume=false"
            )

    def _repair(self, rows: pa.Table) -> bool:
        """Take out the older of two rows of a path, which a writer that had lost its lock may have left."""
        older = older_rows(rows)
        self._remove(rows, older)
        if older.num_rows:
            log.warning("%d images had two rows; the older ones were removed", older.num_rows)
        return older.num_rows > 0

    def _remove(self, rows: pa.Table, doomed: pa.Table) -> None:
        """Take some of the results' rows out, one file at a time, each replaced in one step."""
        counts = count_values(rows["file"])
        for file, number in count_values(doomed["file"]).items():
            if number == counts[file]:
                self.storage.delete(file)
            else:
                table, paths = self._load(file), doomed.filter(pc.equal(doomed["file"], file))["path"]
                write_table(self.storage, file, table.filter(pc.invert(is_in(table["path"], paths))))

    def _load(self, path: str, columns: list[str] | None = None) -> pa.Table:
        """One file of rows, or some of its columns."""
        try:
            # No Python file object: Arrow's threads can outlive the interpreter with one, and abort the process.
            content = pa.BufferReader(self.storage.read(path))
        except OSError as error:
            raise StorageError(explain(error, path)) from None
        try:
            file = pq.ParquetFile(content)
            if any(file.schema_arrow.equals(schema) for schema in (RESULT_SCHEMA, EARLIER_RESULT_SCHEMA)):
                names = columns or RESULT_SCHEMA.names
                return conform(file.read(columns), pa.schema([RESULT_SCHEMA.field(name) for name in names]))
            why = "its columns are others"
        except (OSError, pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            why = first_line(error)
        raise StorageError(f"{path} holds no results that can be read ({why}); move it away and run again")

    def _files(self, folder: str) -> list[str]:
        """The files of rows in one of our folders; raises StorageError where anything else is in it."""
        if not self.storage.exists(folder):
            return []
        top, files = folder.partition("/")[0], []
        for entry in self.storage.list(folder, directories=True):
            name = entry.path.rpartition(f"/{top}/")[2]
            if not entry.is_directory and FILES[top].fullmatch(name):
                files.append(entry.path)
            elif not (OTHERS[top].fullmatch(name) or (entry.is_directory and top == STAGING and "/" not in name)):
                raise StorageError(
                    f"{entry.path} is not of this project, and {self.storage.join(top)} is for its results alone; move "
                    "it away, or name another --output"
                )
        return files

    def _tidy(self) -> None:
        """Remove the unfinished files of writers that were killed."""
        for folder in (RESULTS, PICTURES, RUNS):
            for entry in list(self.storage.list(folder)) if self.storage.exists(folder) else []:
                parent, _, name = entry.path.rpartition("/")
                if parent == self.storage.join(folder) and UNFINISHED.fullmatch(name):
                    self.storage.delete(entry.path)
