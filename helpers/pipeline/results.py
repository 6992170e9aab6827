"""Exactly-once results in a Delta table, on any storage.

    OUTPUT/results/           the table: whole Parquet files, one row per image and model, and Delta's log
    OUTPUT/_staging/RUN/      files of tasks that have ended, not yet in the table
    OUTPUT/runs/              what each run took (`helpers.pipeline.records`)

A task writes its file to its run's staging folder in one step. The driver moves the files of the tasks that Spark
accepted into the table's folder and commits them. The same commit removes the files with rows that the new ones
replace, and adds copies without those rows. So a reader of the table sees each image once at every moment.

Nothing keeps a second run out. Of two that commit, the later one fails at Delta's log. It then looks at the table
again, keeps of its rows those that are still new, and commits these. What a killed run left staged is committed by the
next run, less what is in the table. Nobody can know whether a run is dead or slow: so one may lose its staged files to
another, and then finds their rows in the table. Three rules keep that safe:

- A staged file is deleted only after a commit that has what was new of it.
- A file is moved under a name that follows from its staged name, so that whoever looks for it finds it, and while its
  run's folder has a `.keep`, any run may commit it.
- A file that a commit has removed is added by nobody again, even if it was never in the table.

A run commits each slice of its images, and reads of the table the files that can hold paths of that slice. A run that
starts over replaces the whole table, in one commit at its end: with one per slice, readers would miss the images of the
slices to come. Other runs leave its folder alone (`.alone`), because its rows may equal those in the table and are not
known to be needed.

A plain Parquet reader of the folder never misses an image. It sees the rows of a removed file too, beside those that
replace them, until the file is deleted: after `results.retention_days`, or at the end of the run that removed it if
that is 0. And it sees new rows a moment before the commit.

Only files of these names are ever removed. A run refuses folders that hold anything else before it writes.
"""

import contextlib
import errno
import logging
import os
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from itertools import accumulate
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.compute as pc

from helpers.errors import RunError, StorageError, only_warn
from helpers.pipeline.folders import RESULTS, STARTED_OVER, Folders, name_of, run_of, staged_counts, target_of, time_of
from helpers.pipeline.rows import (
    ROWS_SCHEMA,
    Statistics,
    count_values,
    in_first_file,
    is_among,
    is_in,
    is_new,
    path_range,
    rows_of_later_runs,
    without,
)
from helpers.pipeline.schemas import RESULT_SCHEMA
from helpers.pipeline.table import NONE, Conflict, File, Version
from helpers.pipeline.task import STAGING
from helpers.storage import Storage
from helpers.storage.parquet import write_table

log = logging.getLogger(__name__)

T = TypeVar("T")
TOLD = ("run", "models", "images", "ok", "failed", "seconds")  # by a commit in the table's history
REMEMBERED = 50  # commits that a run is compared with; each is a file of the log
LOOKS = 20  # at files that another run is moving right now


@dataclass(frozen=True)
class Seen:
    """The table as a run found it when it decided what to do; version -1 where there was none.

    `change` is the newest commit that has changed it, and `listed` what that one tells of a listing (`listing.Known`).
    """

    version: int = -1
    rows: pa.Table = field(default_factory=ROWS_SCHEMA.empty_table)  # those in the range that was asked for
    change: int = -1
    listed: str = ""


@dataclass(frozen=True)
class Work:
    """What a run has done, to be committed at once.

    `files` are those of the tasks that Spark accepted, by path, and `todo` the images they are of (`KEY`). `gone` are
    rows of `seen` whose images are no more. A run that `starts_over` replaces the whole table, whatever it has seen.
    `listed` is told by the commit, unless another run has changed the table since `seen`.
    """

    run: str
    models: tuple[str, ...]
    seen: Seen
    todo: pa.Table
    files: dict[str, File]
    gone: pa.Table = field(default_factory=ROWS_SCHEMA.empty_table)
    starts_over: bool = False
    seconds: float | None = None
    listed: str = ""
    told: dict[str, str] = field(default_factory=dict)  # what else its commit tells in the table's history

    def about(self, images: int, failed: int) -> dict[str, Any]:
        """What any commit of a run tells in the table's history (`TOLD`)."""
        return _about(self.run, self.models, images, failed, self.seconds)


@dataclass
class _Change:
    """A commit in the making; paths relative to the output."""

    run: str = ""  # begins the names of files that are written for it
    adds: dict[str, File] = field(default_factory=dict)
    removes: set[str] = field(default_factory=set)
    moves: dict[str, str] = field(default_factory=dict)  # staged path -> path in the results
    written: list[str] = field(default_factory=list)  # for this change alone
    spent: list[str] = field(default_factory=list)  # staged files that are of no use after it
    about: dict[str, Any] = field(default_factory=dict)
    marks: dict[str, int] = field(default_factory=dict)


class ResultStore(Folders):
    """The results below one output location; a damaged table, file or log is a StorageError of every method.

    `kept` are the user's columns that a run adds to them; None for those who only look, whatever there is.
    """

    def __init__(self, storage: Storage, kept: pa.Schema | None = None):
        super().__init__(storage, pa.schema([*RESULT_SCHEMA, *(kept or [])]), may_have_more=kept is None)

    @property
    def location(self) -> str:
        """Where readers find the results."""
        return self.storage.join(RESULTS)

    @property
    def output(self) -> str:
        """What a run calls it."""
        return self.location.removesuffix(f"/{RESULTS}")

    def check(self) -> None:
        """Find out before Spark starts whether a run can write here.

        Raises:
            StorageError: something that is not ours lies in our folders, or nothing can be written.
        """
        self.result_files()
        self.leftovers(self._table.open())
        self.check_writing()

    def prepare(self) -> None:
        """Tidy up, and make a table of the results of an earlier version, which were plain Parquet.

        Raises:
            StorageError: something that is not ours lies in our folders.
        """
        with only_warn("what killed runs have left could not be removed"):
            self.tidy()
        self.result_files()
        self.leftovers(self._take_over(self._table.open()))

    def resume(self, *models: str) -> None:
        """Prepare for a run of some models, and bring in what killed runs of them have left staged.

        Raises:
            RunError: the results are another model's, or what is staged is.
            StorageError: as for `prepare`.
        """
        self.prepare()
        self._newest(partial(self._check_version, models))
        self.recover(*models)

    def look(self, within: tuple[str, str] | None = None) -> Seen:
        """The table as it is now, with its rows; with those of which the path is between two, if these are given.

        Only files that may hold such rows are read.
        """

        def see(version: Version) -> Seen:
            change, about = self._table.last_change(version)
            return Seen(version.number, self._rows_of(version, within), change, about.get("listed", ""))

        return self._newest(see)

    def files(self, number: int | None = None) -> list[str]:
        """The files of the newest version of the table, or of an earlier one, as `rows` takes them.

        Raises:
            StorageError: there is no such version.
        """
        version = self._table.open(number)
        paths = self.result_files() if version is NONE else [f"{RESULTS}/{name}" for name in version.names]
        return sorted(paths)

    @contextlib.contextmanager
    def as_files(self, most_rows: int | None = None) -> Iterator[tuple[list[str], bool]]:
        """The results as files, paths as of `files`, for the length of a block, and whether these are all results.

        With `most_rows` they are the files of the last runs, as many as it takes to have so many rows.
        """
        if most_rows is None:
            yield self.files(), True
            return
        files = self._table.open().files.sort_by([("name", "descending")])  # which begins with the time of the run
        names = files["name"].to_pylist()
        before = accumulate(files["rows"].fill_null(0).to_pylist(), initial=0)
        newest = [f"{RESULTS}/{name}" for name, earlier in zip(names, before, strict=False) if earlier < most_rows]
        yield sorted(newest), len(newest) == len(names)

    def schema(self, number: int | None = None) -> pa.Schema:
        """The columns of a version: `RESULT_SCHEMA`, and what else its runs have kept of their sources.

        Raises:
            StorageError: there is no such version.
        """
        return self._table.open(number).schema or self._schema

    def history(self) -> list[dict[str, Any]]:
        """The runs that have changed the table, the newest first: time, what each told (`TOLD`), and version.

        A run is there with each slice of its images, and the seconds that this took.
        """
        return [
            {
                "time": datetime.fromtimestamp(commit["timestamp"] // 1000, UTC),
                **{name: commit.get(name) for name in TOLD},
                "version": commit["version"],
            }
            for commit in self._table.history()
            if "run" in commit
        ]

    def told(self, name: str) -> list[str]:
        """What the table's last commits tell under a name (`Work.told`), the newest first."""
        return [commit[name] for commit in self._table.history(REMEMBERED) if name in commit]

    def is_empty(self) -> bool:
        """Whether no image has results."""
        return not self._table.open().files.num_rows

    def progress(self, run: str) -> tuple[int, int]:
        """Images and failed images that a run's tasks have finished so far."""
        return staged_counts(self.staged(run))

    def recover(self, *models: str) -> int:
        """Commit what other runs, killed or slow ones, have left staged, and return how many images that were.

        Raises:
            RunError: it is another model's than those given; without any, all may be of one.
        """
        images = 0
        if any(self.leftovers(self._table.open())):
            images = self._commit(partial(self._plan_recovery, models)).about["images"]
        self.sweep()
        if images:
            log.info("kept the results of %d images of an earlier run that did not end", images)
        return images

    def publish(self, work: Work) -> list[str]:
        """Commit a run's work, and return the files with it.

        Raises:
            RunError: another run has taken what this one had finished and lost it, or the results are another model's.
            StorageError: the table cannot be written.
        """
        if not work.files and not work.gone.num_rows and not work.starts_over:
            if self._table.open() is NONE:
                self._table.create()  # without rows, so that readers find the columns
            return []
        self.stage(work.run, work.starts_over)
        return sorted(self._commit(partial(self._plan_work, work)).adds)

    def note(self, listed: str, commit: tuple[int, str]) -> None:
        """Commit what a run has listed and nothing else, where the newest change is a commit (`Seen`) still."""
        version = self._table.open()
        change, about = self._table.last_change(version)
        if version is not NONE and (change, about.get("listed", "")) == commit:
            with contextlib.suppress(Conflict):
                self._table.commit(version, {}, [], {"listed": listed}, {})

    def vacuum(self, days: float) -> None:
        """Delete the files that commits have removed so many days ago."""
        self._table.vacuum(24 * days, map(name_of, self.result_files()))

    def _commit(self, plan: Callable[[Version, _Change], None]) -> _Change:
        """Plan a change of the newest version and commit it; again, where another run was first."""
        version, looks = self._table.open(), 0
        while True:
            change = _Change()
            try:
                plan(version, change)
                if version is NONE:
                    version = self._table.create()
                    if version.number or version.files.num_rows:
                        raise Conflict
                for source, target in change.moves.items():
                    self.move(source, target)
                if change.adds or change.removes:
                    adds = {name_of(path): file for path, file in change.adds.items()}
                    removes = sorted(map(name_of, change.removes))
                    self._table.commit(version, adds, removes, change.about, change.marks)
                break
            except (Conflict, FileNotFoundError) as error:
                newer = self._table.open()
                names = newer.names
                for path in change.written:
                    if name_of(path) not in names:  # it is, where only the answer to the commit was lost
                        self.storage.delete(path)
                if newer.number > version.number:
                    version, looks = newer, 0
                elif looks < LOOKS:  # another run is moving a file right now
                    looks += 1
                    time.sleep(0.05 * looks)
                else:
                    self._check_newer(version, error)
        for path in change.spent:
            self.storage.delete(path)
        return change

    def _plan_work(self, work: Work, version: Version, change: _Change) -> None:
        """What a run's work changes in the version that the run saw, or in any if it starts over."""
        change.run = work.run
        if not work.starts_over and max(version.number, 0) != max(work.seen.version, 0):
            self._plan_again(work, version, change)
            return
        staged, names = self.staged(work.run), version.names
        for path, file in work.files.items():
            target = target_of(path)
            if path in staged:
                change.moves[path] = target
            elif not self.storage.exists(target):
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), self.storage.join(path))
            if name_of(target) not in names:
                change.adds[target] = file
        change.about = work.about(*staged_counts(work.files)) | work.told
        change.about |= {"listed": work.listed} if work.listed else {}
        if work.starts_over:
            change.marks = {STARTED_OVER: time_of(work.run)}
            change.removes = {f"{RESULTS}/{name}" for name in names} - set(map(target_of, work.files))
        else:
            self._remove(change, version, work.seen.rows, _paths(work.todo, work.gone))

    def _plan_again(self, work: Work, version: Version, change: _Change) -> None:
        """What of a run's work is new still in a table that another run has changed.

        A row is not, if it is in the table, or if a run that began later has worked on its image meanwhile.
        """
        log.info("another run has changed %s; looking again at what is new", self.location)
        staged, results, names = self.staged(work.run), self.result_files(), version.names
        files = {}
        for path, file in work.files.items():
            place = path if path in staged else target_of(path)
            if path in staged or (place in results and name_of(place) not in names):
                files[place] = file.size
        own = self.rows(files)
        rows = self._rows_of(version, path_range(own, work.todo, work.gone))
        self._check_models(rows["model"].unique().to_pylist(), work.models)
        others = rows.filter(pc.invert(is_among(rows, work.seen.rows)))
        late = is_in(own["path"], rows_of_later_runs(others, work.run)["path"])
        fresh = self._bring(change, version, own, pc.and_(is_new(own, rows, len(work.models)), pc.invert(late)), files)
        left = without(without(work.todo, own), rows)
        left = left.filter(pc.invert(is_in(left["path"], others["path"])))
        if left.num_rows:
            raise RunError(
                f"another run has taken the results of {left.num_rows} images from {self.storage.join(STAGING)} and "
                "lost them; run again, all others are kept"
            )
        change.about = work.about(*_counts(fresh)) | work.told
        self._remove(change, version, rows, _paths(fresh, rows.filter(is_among(rows, work.gone))))

    def _plan_recovery(self, models: tuple[str, ...], version: Version, change: _Change) -> None:
        """What is new in files that other runs have left; those without anything new are removed."""
        files, useless = self.leftovers(version)
        change.removes = {path for path in useless if path.startswith(f"{RESULTS}/")}
        change.spent = sorted(useless - change.removes)
        files = {path: self.renew(path, size) for path, size in files.items()}
        own = self.rows(files)
        if models:
            self._check_models(own["model"].unique().to_pylist(), models)
        rows = self._rows_of(version, path_range(own)) if own.num_rows else ROWS_SCHEMA.empty_table()
        runs = list(dict.fromkeys(map(run_of, files)))
        new = is_new(own, rows, len(models) or 1)
        for run in runs:
            # A task that outlived its driver may have ended after a later run, which saw the image as it is now.
            late = is_in(own["path"], rows_of_later_runs(rows, run)["path"])
            of_run = is_in(own["file"], pa.chunked_array([[path for path in files if run_of(path) == run]]))
            new = pc.and_(new, pc.invert(pc.and_(of_run, late)))
        change.run = runs[0] if runs else ""
        fresh = self._bring(change, version, own, new, files)
        change.about = _about(", ".join(reversed(runs)), models or fresh["model"].unique().to_pylist(), *_counts(fresh))
        self._remove(change, version, rows, fresh["path"])

    def _bring(
        self, change: _Change, version: Version, own: pa.Table, new: pa.ChunkedArray, files: dict[str, int]
    ) -> pa.Table:
        """Add to a change what is new in some files, and return these rows.

        A file, staged or moved and never committed, is moved where all of it is new; else its new rows are written to
        another one. Of an image that is in several, the first has the rows. `files` have their sizes in bytes, `own`
        are their rows (`ROWS_SCHEMA`), and `new` says whether each is new. The rows of an image, one per model, stay
        together: if one is, all are.
        """
        fresh = in_first_file(own.filter(is_in(own["path"], own.filter(new)["path"])), files)
        counts, removed, results = count_values(own["file"]), version.removed(), self.result_files()
        for path, size in files.items():
            target, rows = target_of(path), fresh.filter(pc.equal(fresh["file"], path))
            is_taken = name_of(target) in removed or (path != target and target in results)
            if rows.num_rows == counts.get(path) and not is_taken:
                change.adds[target] = File(size, Statistics.of(rows).to_json())
                change.moves |= {path: target} if path != target else {}
                continue
            if rows.num_rows:
                table = self.load(path)
                self._write(change, table.filter(is_in(table["path"], rows["path"])))
            if path != target:
                change.spent.append(path)
            elif name_of(path) not in removed:
                change.removes.add(path)
        return fresh

    def _remove(self, change: _Change, version: Version, rows: pa.Table, paths: pa.ChunkedArray) -> None:
        """Add to a change that the table's rows of some paths go: their files, with copies of what else is in them.

        `rows` are rows of the version, those of these paths at least.
        """
        doomed = rows.filter(is_in(rows["path"], paths))
        if not doomed.num_rows:
            return
        all_rows = dict(zip(version.files["name"].to_pylist(), version.files["rows"].to_pylist(), strict=True))
        for file, number in count_values(doomed["file"]).items():
            if number != all_rows[name_of(file)]:
                table = self.load(file)
                rest = table.filter(pc.invert(is_in(table["path"], paths)))
                if rest.num_rows:
                    self._write(change, rest)
            change.removes.add(file)

    def _write(self, change: _Change, rows: pa.Table) -> None:
        path = f"{RESULTS}/{change.run}-{uuid.uuid4().hex[:8]}.parquet"
        change.written.append(path)
        change.adds[path] = File(write_table(self.storage, path, rows), Statistics.of(rows).to_json())

    def _newest(self, read: Callable[[Version], T]) -> T:
        """What is read of the newest version, whose files another run may delete meanwhile."""
        while True:
            version = self._table.open()
            try:
                return read(version)
            except FileNotFoundError as error:
                self._check_newer(version, error)

    def _check_version(self, models: Sequence[str], version: Version) -> None:
        """Raise RunError if a version has rows of other models; by the log, and by files of which that says too little.

        Those who compact a table shorten long texts in the log. What lies between a file's first and last model is
        checked when its rows are looked at.
        """
        ends, ours = (version.files[name] for name in ("first_model", "last_model")), pa.array(models, pa.string())
        are_ours = pc.and_(*(pc.is_in(end, ours) for end in ends))
        for name in sorted(version.files["name"].filter(pc.invert(are_ours)).to_pylist()):
            self._check_models(self.rows([f"{RESULTS}/{name}"])["model"].unique().to_pylist(), models)

    def _check_newer(self, version: Version, error: Exception) -> None:
        """Raise StorageError unless a file is gone because the table has a newer version."""
        if self._table.open().number == version.number:
            place = getattr(error, "filename", None) or self.location
            raise StorageError(
                f"{place} is gone, and the results need it; restore it from a copy, or replace all results with --set "
                "resume=false"
            ) from None

    def _check_models(self, present: Iterable[str], models: Sequence[str]) -> None:
        others = sorted(set(present) - set(models))
        if others:
            raise RunError(
                f"{self.storage.root} holds results of {others[0]}, and this run is of {' and '.join(models)}; name "
                "another --output, or replace them with --set resume=false"
            )

    def _take_over(self, version: Version) -> Version:
        """Make a table of results of an earlier version of this project, which were plain Parquet files."""
        entries = self.result_files() if version is NONE else {}
        if not entries:
            return version
        files, models, counts = {}, set(), Counter[str]()
        for path, entry in entries.items():
            size = self.renew(path, entry.length)
            rows = self.load(path, ROWS_SCHEMA.names[:-1])
            files[name_of(path)] = File(size, Statistics.of(rows).to_json())
            models |= set(rows["model"].unique().to_pylist())
            counts.update(dict(zip(("images", "failed"), _counts(rows), strict=True)))
        about = _about("an earlier version's", sorted(models), counts["images"], counts["failed"])
        version = self._table.create(files, about)
        log.info("the %d Parquet files of an earlier version in %s are a Delta table now", len(files), self.location)
        return version

    def _rows_of(self, version: Version, within: tuple[str, str] | None) -> pa.Table:
        """The rows of a version, or those in a range of paths."""
        files = version.files if within is None else version.between(*within)
        return self.rows((f"{RESULTS}/{name}" for name in sorted(files["name"].to_pylist())), within)


def _paths(*tables: pa.Table) -> pa.ChunkedArray:
    return pa.chunked_array(
        [chunk for table in tables for chunk in table["path"].cast(pa.large_string()).chunks], pa.large_string()
    )


def _counts(rows: pa.Table) -> tuple[int, int]:
    """Images and failed images of some rows."""
    failed = rows.filter(rows["error"].is_valid())
    return pc.count_distinct(rows["path"]).as_py(), pc.count_distinct(failed["path"]).as_py()


def _about(run: str, models: Iterable[str], images: int, failed: int, seconds: float | None = None) -> dict[str, Any]:
    """What a commit tells in the table's history."""
    return dict(zip(TOLD, (run, " and ".join(models), images, images - failed, failed, seconds), strict=True))
