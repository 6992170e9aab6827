"""Exactly-once results in plain Parquet, on any storage.

    OUTPUT/results/           what readers see: whole files, one row an image
    OUTPUT/_staging/RUN/      files of tasks that have ended, not yet published
    OUTPUT/runs/              what each run took (`helpers.pipeline.records`)
    OUTPUT/_lock              held by the one run that may write

A task writes its file to its run's staging folder in one step. The driver publishes by renaming the files of the tasks
that Spark accepted, after it has taken the rows that they replace out of older files. What a killed run left staged is
published by the next one, less what is in the results already: a row can neither be lost nor come twice. An executor
that outlives its driver writes to a staging folder that is gone, or that nobody will take from twice.
"""

import contextlib
import logging
from collections.abc import Iterator
from functools import partial
from itertools import chain

import pyarrow as pa
import pyarrow.compute as pc

from helpers.errors import RunError
from helpers.images.video import split_paths
from helpers.pipeline.records import RUNS
from helpers.pipeline.schemas import KEY, KEY_NAMES, RESULT_SCHEMA
from helpers.pipeline.task import STAGING, staged_counts, staging
from helpers.storage import Storage
from helpers.storage.parquet import read_table, write_table
from helpers.storage.prefetch import map_groups

log = logging.getLogger(__name__)

RESULTS = "results"
PICTURES = "pictures"
ROWS_SCHEMA = pa.schema([*KEY, pa.field("model", pa.string()), pa.field("file", pa.string())])


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
        """
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(self.storage.lock("_lock"))
            except BlockingIOError:
                raise RunError(
                    f"another run is writing to {self.storage.root}; wait for it, or name another --output"
                ) from None
            yield

    def rows(self, files: list[str] | None = None) -> pa.Table:
        """Path, length, modification time, model and file of every row in some files, by default all results."""
        files = self._files(RESULTS) if files is None else files
        width = self.storage.concurrent_reads
        groups = (files[start : start + width] for start in range(0, len(files), width))
        read = map_groups(partial(read_table, self.storage, columns=[*KEY_NAMES, "model"]), groups, width)
        tables = [
            table.append_column("file", pa.array([file] * table.num_rows, pa.string()))
            for file, table in zip(files, chain.from_iterable(read), strict=True)
        ]
        return pa.concat_tables(tables or [ROWS_SCHEMA.empty_table()])

    def read(self) -> pa.Table:
        """All results in this process's memory; with millions of images, read the location with Spark instead."""
        tables = [read_table(self.storage, file) for file in self._files(RESULTS)]
        return pa.concat_tables(tables or [RESULT_SCHEMA.empty_table()])

    def clear(self) -> None:
        """Remove all results, staged ones included."""
        self.storage.delete(STAGING)
        self.storage.delete(RESULTS)

    def stage(self, run: str) -> None:
        """Make a run's staging folder."""
        self.storage.write(f"{staging(run)}/.keep", b"")

    def unstage(self) -> None:
        """Remove what is staged; only the one run that writes here has anything there."""
        self.storage.delete(STAGING)

    def progress(self, run: str) -> tuple[int, int]:
        """Images and failed images that a run's tasks have finished so far."""
        counts = [staged_counts(path) for path in self._files(staging(run))]
        return sum(images for images, _ in counts), sum(failed for _, failed in counts)

    def recover(self) -> int:
        """Publish what earlier, killed runs left staged, and return how many rows that were."""
        files, recovered = sorted(self._files(STAGING)), 0
        rows = self.rows() if files else ROWS_SCHEMA.empty_table()
        for path in files:
            staged = read_table(self.storage, path)
            fresh = staged.filter(pc.invert(_is_among(staged, rows)))
            # A task that outlived its driver may have ended after a later run, which saw the image as it is now.
            fresh = fresh.filter(pc.invert(_is_in(fresh["path"], _of_later_runs(rows, path.split("/")[-2])["path"])))
            if fresh.num_rows:
                if fresh.num_rows < staged.num_rows:
                    write_table(self.storage, path, fresh)
                published = self.publish([path], replaced(fresh, rows))
                kept = rows.filter(pc.invert(_is_in(rows["path"], fresh["path"])))
                rows, recovered = pa.concat_tables([kept, self.rows(published)]), recovered + fresh.num_rows
        self.storage.delete(STAGING)
        if recovered:
            log.info("kept %d results of an earlier run that did not end", recovered)
        return recovered

    def publish(self, staged: list[str], replacing: pa.ChunkedArray | None = None) -> list[str]:
        """Move staged files to the results, in place of earlier rows of the given paths; return where they are."""
        if replacing is not None and len(replacing):
            self._remove(replacing)
        published = []
        for path in staged:
            run, name = path.split("/")[-2:]
            published.append(f"{RESULTS}/{run}-{name}")
            self.storage.rename(path, published[-1])
        if not self.storage.exists(RESULTS):
            # Nothing was new and there are no earlier results: readers still find the schema.
            write_table(self.storage, f"{RESULTS}/none.parquet", RESULT_SCHEMA.empty_table())
        return published

    def _remove(self, paths: pa.ChunkedArray) -> None:
        """Take the rows of these paths out of the results, one file at a time, each replaced in one step."""
        rows = self.rows()
        for file in rows.filter(_is_in(rows["path"], paths))["file"].unique().to_pylist():
            table = read_table(self.storage, file)
            kept = table.filter(pc.invert(_is_in(table["path"], paths)))
            if kept.num_rows:
                write_table(self.storage, file, kept)
            else:
                self.storage.delete(file)

    def _files(self, folder: str) -> list[str]:
        if not self.storage.exists(folder):
            return []
        return [entry.path for entry in self.storage.list(folder) if entry.path.endswith(".parquet")]


def without(images: pa.Table, rows: pa.Table) -> pa.Table:
    """The images whose path, length and modification time are not among the rows."""
    return images.filter(pc.invert(_is_among(images, rows)))


def replaced(images: pa.Table, rows: pa.Table) -> pa.ChunkedArray:
    """Paths of the images that have a row, of an earlier length or modification time."""
    return images.filter(_is_in(images["path"], rows["path"]))["path"]


def outdated(rows: pa.Table, images: pa.Table, videos: pa.Table) -> pa.ChunkedArray:
    """Paths of results of videos that have changed: the new version may have fewer frames, or none.

    Args:
        rows: the results.
        images: what is listed now, the videos' frames among it.
        videos: the video files listed now.
    """
    if not videos.num_rows:
        return rows["path"].slice(0, 0)
    files, numbers = split_paths(rows["path"])
    now = rows.select(KEY_NAMES).set_column(0, "path", files)
    changed = pc.and_(_is_in(files, videos["path"]), pc.invert(_is_among(now, videos)))
    # The other way round, a video without any frame that can be read now.
    mended = pc.and_(pc.and_(pc.is_null(numbers), _is_among(now, videos)), pc.invert(_is_among(now, images)))
    return rows.filter(pc.or_(changed, mended))["path"]


def _of_later_runs(rows: pa.Table, run: str) -> pa.Table:
    """The rows in files of runs that began after one; names begin with that time."""
    names = [file.rpartition("/")[2][: len(run)] for file in rows["file"].to_pylist()]
    return rows.filter(pa.array([name > run for name in names], pa.bool_()))


def _is_among(table: pa.Table, rows: pa.Table) -> pa.ChunkedArray:
    positions = table.select(KEY_NAMES).append_column("position", pa.array(range(table.num_rows), pa.int64()))
    found = positions.join(rows.select(KEY_NAMES), keys=KEY_NAMES, join_type="left semi")["position"]
    return _is_in(positions["position"], found)


def _is_in(values: pa.ChunkedArray, among: pa.ChunkedArray) -> pa.ChunkedArray:
    return pc.is_in(values, value_set=among.combine_chunks())
