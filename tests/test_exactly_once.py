"""Every image has one row, whoever reads, writes or dies at the same time.

How it was checked that each test fails without its protection: in a copy of the repository, one change at a time.

    changed                                                             failed
    table.py: a commit names no application                             two that replace nothing
    results.py: `_plan_again` ignores which run is later                the later one keeps what is still new
    results.py: a conflict deletes what it wrote, committed or not      the answer is lost
    results.py: a file once removed is added again                      removed as useless
    results.py: what is missing of a run's work is not looked for       nobody has any more
    results.py: `_remove` removes nothing, or copies nothing            death at any step, reader at any step
    folders.py: what was moved and not committed is left                death at any step
    results.py: a staged file is deleted before the commit              keeping a part
    folders.py: `leftovers` sees nothing staged                         staged at a death, history
    folders.py: `leftovers` does not care whose files are its own       files of a run that starts over
    folders.py: what is older than a start over is kept                 staged before a run started over
    results.py: recovery ignores which run is later                     late rows of a dead run
    results.py: a file that is gone is always an error                  deleted while a run reads
    folders.py: `sweep` does nothing                                    staged before a run started over, bear tasks
    folders.py: `unstage` does nothing                                  a run that starts over
"""

import contextlib
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from cluster import Finished, read_results, read_rows, start_run, stopped
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helpers import pipeline
from helpers.config import load_config
from helpers.errors import RunError, StorageError
from helpers.pipeline.listing import assign, list_images, plan
from helpers.pipeline.results import ResultStore, Seen, Work
from helpers.pipeline.rows import Statistics, path_range, without
from helpers.pipeline.schemas import KEY_NAMES
from helpers.pipeline.stages import RESULT_SCHEMA
from helpers.pipeline.table import Conflict, File, Table
from helpers.storage import LocalStorage, open_storage
from studies.cluster import wait_for

DAY = datetime(2026, 1, 1, tzinfo=UTC)
EARLIER, NEW = 12, 48  # images of a first run, and those that come later
SIDE = 900
LONGER, TOUCHED = "005.jpg", "007.jpg"  # images of the first run that change before the second


# ---------------------------------------------------------------- two runs, a reader and changed images, for real


def write_photo(path: Path, seed: int) -> None:
    colors = np.random.default_rng(seed).integers(0, 256, (12, 12, 3), np.uint8)
    cv2.imwrite(str(path), cv2.resize(colors, (SIDE, SIDE), interpolation=cv2.INTER_CUBIC))


class Reader(threading.Thread):
    """Reads the results over and over, as a dashboard does."""

    def __init__(self, output: Path):
        super().__init__(daemon=True)
        self.output, self.ended = output, threading.Event()
        self.seen: list[list[str]] = []
        self.broken: list[str] = []

    def __enter__(self) -> "Reader":
        self.start()
        return self

    def __exit__(self, *details: object) -> None:
        self.ended.set()
        self.join()

    def run(self) -> None:
        while not self.ended.is_set():
            try:
                self.seen.append(read_results(self.output)["path"].to_pylist())
            except Exception as error:  # noqa: BLE001 - whatever a reader meets is the finding
                self.broken.append(repr(error))
            self.ended.wait(0.01)  # else it would keep a core from the runs


@dataclass
class Story:
    """Two runs at once onto earlier results, with a reader watching; one stands still until the other has ended."""

    photos: Path
    before: list[dict]
    other: pipeline.RunSummary
    finished: Finished
    reader: Reader

    def row(self, name: str, rows: list[dict] | None = None) -> dict:
        (found,) = (row for row in rows or self.finished.rows() if row["path"] == str(self.photos / name))
        return found


@pytest.fixture(scope="module")
def story(spark, bundle_uri, tmp_path_factory) -> Story:
    photos, place = tmp_path_factory.mktemp("photos"), tmp_path_factory.mktemp("once")
    output = place / "out"
    for i in range(EARLIER):
        write_photo(photos / f"{i:03d}.jpg", i)
    config = load_config("local", **{"pictures": 0, "paths.runs": str(place / "runs")})
    pipeline.run(spark, str(photos), bundle_uri, str(output), config)
    before = read_rows(output)

    write_photo(photos / LONGER, 1000)
    shutil.copy(photos / "001.jpg", photos / TOUCHED)
    os.utime(photos / TOUCHED, ns=(0, 10**18))
    for i in range(EARLIER, EARLIER + NEW):
        write_photo(photos / f"{i:03d}.jpg", i)
    with Reader(output) as reader:
        settings = (f"paths.runs={place / 'runs'}", "pictures=0", "spark.master=local[1]", "partitioning.partitions=24")
        run = start_run(photos, bundle_uri, output, place / "first.log", *settings)
        run.wait_until_staged(2)
        with stopped(run.process.popen):  # so that it surely has not ended when the other one comes
            other = pipeline.run(spark, str(photos), bundle_uri, str(output), config)
        finished = run.finish()
    return Story(photos, before, other, finished, reader)


def test_two_runs_at_the_same_time_share_the_images_and_leave_each_once(story):
    assert story.finished.code == 0, story.finished.errors
    assert story.finished.summary["images"] == story.other.images == EARLIER + NEW
    assert story.finished.summary["failed"] == story.other.failed == 0
    names = [f"{i:03d}.jpg" for i in range(EARLIER + NEW)]
    assert [row["path"] for row in story.finished.rows()] == [str(story.photos / name) for name in names]
    assert all(row["error"] is None for row in story.finished.rows())
    # The second has kept what the first had finished when it came; the first has done all that it had listed.
    assert EARLIER - 2 < story.other.skipped <= EARLIER + NEW
    assert story.finished.summary["skipped"] == EARLIER - 2
    assert "another run has changed" in story.finished.errors


def test_two_runs_at_the_same_time_leave_no_traces_of_work(story):
    assert {path.name for path in story.finished.output.iterdir()} == {"report", "results", "runs"}


def test_a_reader_never_sees_a_broken_file_or_an_image_twice(story):
    assert len(story.reader.seen) > 20
    assert story.reader.broken == []
    assert all(len(paths) == len(set(paths)) for paths in story.reader.seen)
    assert len(story.reader.seen[0]) == EARLIER


def test_a_reader_never_misses_an_image(story):
    before = {row["path"] for row in story.before}
    assert len(before) == EARLIER
    assert all(before <= set(paths) for paths in story.reader.seen)


def test_a_longer_image_replaces_its_row(story):
    old, new = story.row(LONGER, story.before), story.row(LONGER)
    assert new["length"] == (story.photos / LONGER).stat().st_size != old["length"]
    assert new["predictions"] != old["predictions"]


def test_an_image_with_another_modification_time_replaces_its_row(story):
    old, new = story.row(TOUCHED, story.before), story.row(TOUCHED)
    assert new["modified"] == datetime.fromtimestamp(10**9, UTC) != old["modified"]
    assert new["predictions"] == story.row("001.jpg")["predictions"]


def test_an_image_that_has_not_changed_keeps_its_row(story):
    changed = {str(story.photos / name) for name in (LONGER, TOUCHED)}
    kept = [row for row in story.before if row["path"] not in changed]
    assert [row for row in story.finished.rows() if row["path"] in {r["path"] for r in kept}] == kept


# ---------------------------------------------------------------- death at every step


class Death(BaseException):
    """The driver is no more."""


class Mortal(LocalStorage):
    """Dies in the middle of its nth change, and calls a witness in and after every one before."""

    def __init__(self, root: str, changes: int = 10**9, witness: Callable[[], None] = lambda: None):
        super().__init__(root)
        self.left, self.witness = changes, witness

    @contextlib.contextmanager
    def _change(self) -> Iterator[bool]:
        """Says whether this is the last."""
        self.left -= 1
        yield self.left < 0
        if self.left < 0:
            raise Death
        self.witness()

    @contextlib.contextmanager
    def create(self, path: str) -> Iterator[Any]:
        with self._change() as last, super().create(path) as file:
            yield Halves(self, file, last)

    def rename(self, source: str, target: str) -> None:
        self.change(super().rename, source, target)

    def prune(self, path: str) -> None:
        self.change(super().prune, path)

    def change(self, act: Callable[..., Any], *given: Any) -> Any:
        """Do what is done at once or not at all."""
        with self._change() as last:
            return None if last else act(*given)

    def delete(self, path: str) -> None:
        with self._change() as last:
            target = Path(self.join(path))
            if not last:
                super().delete(path)
            elif target.is_dir():  # half a folder is gone
                files = sorted(file for file in target.rglob("*") if file.is_file())
                for file in files[: len(files) // 2]:
                    file.unlink()


@dataclass
class Halves:
    """A file that is written in two steps, with a look in between."""

    storage: Mortal
    file: Any
    last: bool

    def write(self, data: bytes) -> None:
        self.file.write(data[: len(data) // 2])
        self.file.flush()
        self.storage.witness()
        if self.last:
            # What a killed writer leaves: `create` itself would still tidy up.
            name = Path(self.file.name)
            (name.parent / ".0123456789.tmp").write_bytes(name.read_bytes())
            raise Death
        self.file.write(data[len(data) // 2 :])


Images = dict[str, int]  # path -> version


def table_of(images: Images) -> pa.Table:
    """Results of images; another version is another modification time and another prediction."""
    rows = [
        {
            "path": path,
            "length": 1,
            "modified": DAY + timedelta(seconds=version),
            "predictions": [{"class_id": version}],
            "model": "net@1",
        }
        for path, version in images.items()
    ]
    return pa.Table.from_pylist(rows, schema=RESULT_SCHEMA)


def results_of(root: Path) -> Images:
    """What a reader has; fails where an image is twice or its prediction is of another version."""
    if not (root / "results" / "_delta_log").exists():
        return {}
    rows = read_results(root).to_pylist()
    images = {row["path"]: (row["modified"] - DAY).seconds for row in rows}
    assert len(images) == len(rows), "an image is twice"
    assert all(row["predictions"][0]["class_id"] == images[row["path"]] for row in rows)
    return images


def content_of(rows: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(rows, sink)
    return sink.getvalue().to_pybytes()


def file_of(rows: pa.Table) -> File:
    return File(len(content_of(rows)), Statistics.of(rows).to_json())


def stage(store: ResultStore, run: str, partition: int, rows: pa.Table) -> str:
    """Leave a file as a task does, in a process of its own: a driver's death is not its."""
    path = f"_staging/{run}/{partition:06d}-{rows.num_rows}-0.parquet"
    LocalStorage(store.storage.root).write(path, content_of(rows))
    return path


def open_store(storage: LocalStorage) -> ResultStore:
    """With a table that counts its commits as changes of the storage."""
    store = ResultStore(storage)
    if isinstance(storage, Mortal):
        for name in ("create", "commit", "vacuum"):
            setattr(store._table, name, partial(storage.change, getattr(store._table, name)))
    return store


def drive(
    storage: LocalStorage,
    run: str,
    images: Images,
    tasks: int,
    resume: bool = True,
    days: int = 0,
    at: Callable[[str], None] = lambda step: None,
) -> None:
    """What `pipeline.run` does with its store, with tasks that end at once."""
    store, listed = open_store(storage), table_of(images)
    if resume:
        store.resume("net@1")
    else:
        store.prepare()
    seen = store.look(path_range(listed)) if resume else Seen()
    todo = without(listed, seen.rows)
    store.stage(run, not resume)
    parts = [todo.take(pa.array(range(task, todo.num_rows, tasks), pa.int64())) for task in range(tasks)]
    files = {stage(store, run, task, rows): file_of(rows) for task, rows in enumerate(parts) if rows.num_rows}
    if parts[0].num_rows:  # an attempt that Spark gave up on had written all the same
        stage(store, run, 99, parts[0])
    at("staged")
    store.publish(Work(run, ("net@1",), seen, todo.select(KEY_NAMES), files, starts_over=not resume))
    store.unstage(run)
    if resume:
        store.recover("net@1")
    store.vacuum(days)


def count_changes(root: Path, run: str, images: Images, tasks: int) -> int:
    storage = Mortal(str(root))
    drive(storage, run, images, tasks)
    return 10**9 - storage.left


FIRST = {"a": 0, "b": 0, "c": 0, "d": 0, "e": 0}
SECOND = {"a": 1, "b": 0, "c": 1, "d": 0, "e": 0, "f": 1, "g": 1}


def test_a_death_at_any_step_of_a_run_loses_and_doubles_nothing(tmp_path):
    """The next run, which may die at any step too, sets it right."""
    drive(LocalStorage(str(tmp_path / "start")), "run1", FIRST, tasks=2)
    shutil.copytree(tmp_path / "start", tmp_path / "whole")
    steps = count_changes(tmp_path / "whole", "run2", SECOND, tasks=2)
    assert steps >= 10 and results_of(tmp_path / "whole") == SECOND
    for step in range(steps):
        root = tmp_path / f"died{step}"
        shutil.copytree(tmp_path / "start", root)
        with pytest.raises(Death):
            drive(Mortal(str(root), step), "run2", SECOND, tasks=2)
        assert results_of(root) in (FIRST, SECOND), f"half a commit at step {step}"
        for again in range(100):
            copy = tmp_path / f"died{step}again{again}"
            shutil.copytree(root, copy)
            storage = Mortal(str(copy), again)
            try:
                drive(storage, "run3", SECOND, tasks=1)
                assert results_of(copy) == SECOND, f"died at step {step}"
                break
            except Death:
                drive(LocalStorage(str(copy)), "run4", SECOND, tasks=1)
                assert results_of(copy) == SECOND, f"died at step {step}, then at {again}"
        else:
            pytest.fail("the run after the death never ended")


def test_a_death_at_any_step_of_starting_over_loses_and_doubles_nothing(tmp_path):
    """A reader has all old results or all new ones."""
    old = {**FIRST, "gone": 0}
    drive(LocalStorage(str(tmp_path / "start")), "run1", old, tasks=2)
    for step in range(100):
        root = tmp_path / f"died{step}"
        shutil.copytree(tmp_path / "start", root)
        try:
            drive(Mortal(str(root), step), "run2", SECOND, tasks=2, resume=False)
            break
        except Death:
            assert results_of(root) in (old, SECOND), f"half a commit at step {step}"
        drive(LocalStorage(str(root)), "run3", SECOND, tasks=1)
        assert results_of(root) in ({**old, **SECOND}, SECOND), f"died at step {step}"
    assert step >= 4 and results_of(root) == SECOND


def test_a_death_at_any_step_of_keeping_a_part_of_what_was_staged_loses_nothing(tmp_path):
    drive(LocalStorage(str(tmp_path / "start")), "run1", {"a": 0, "b": 0}, tasks=1)
    dead = ResultStore(LocalStorage(str(tmp_path / "start")))
    stage(dead, "20260102T000000-0123abcd", 0, table_of({"b": 0, "c": 0}))
    for step in range(100):
        root = tmp_path / f"died{step}"
        shutil.copytree(tmp_path / "start", root)
        try:
            open_store(Mortal(str(root), step)).recover("net@1")
            break
        except Death:
            open_store(LocalStorage(str(root))).recover("net@1")
            assert results_of(root) == {"a": 0, "b": 0, "c": 0}, f"died at step {step}"
    assert step >= 4 and results_of(root) == {"a": 0, "b": 0, "c": 0}


def test_what_was_staged_at_a_death_is_kept_and_not_done_again(tmp_path):
    store = ResultStore(LocalStorage(str(tmp_path)))
    drive(store.storage, "run1", {"a": 0}, tasks=1)
    stage(store, "run2", 0, table_of({"b": 0, "c": 0}))
    assert store.recover() == 2
    assert results_of(tmp_path) == {"a": 0, "b": 0, "c": 0}


def test_a_reader_never_sees_a_broken_file_or_an_image_twice_at_any_step(tmp_path):
    drive(LocalStorage(str(tmp_path)), "run1", FIRST, tasks=2)
    witnessed = []
    storage = Mortal(str(tmp_path), witness=lambda: witnessed.append(results_of(tmp_path)))
    drive(storage, "run2", SECOND, tasks=2)
    assert len(witnessed) >= 10 and witnessed[0] == FIRST and witnessed[-1] == SECOND
    assert all(images in (FIRST, SECOND) for images in witnessed)


IMAGES = st.dictionaries(st.sampled_from("abcdef"), st.integers(0, 2), min_size=1)
RUNS = st.lists(st.tuples(IMAGES, st.integers(1, 3), st.integers(0, 12)), min_size=1, max_size=5)


@given(RUNS, IMAGES)
@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_history_of_runs_and_deaths_ends_with_each_image_once(tmp_path_factory, history, last):
    root = tmp_path_factory.mktemp("history")
    for number, (images, tasks, changes) in enumerate(history):
        with contextlib.suppress(Death):
            drive(Mortal(str(root), changes), f"run{number}", images, tasks)
        results_of(root)
    drive(LocalStorage(str(root)), "run9", last, tasks=2)
    assert last.items() <= results_of(root).items()
    assert not list(root.glob("_staging/*/*.parquet"))


# ---------------------------------------------------------------- two runs at once


@pytest.mark.parametrize("resume", [True, False], ids=["resume", "one starts over"])
def test_runs_that_start_together_leave_each_image_once_and_a_reader_misses_none(tmp_path, resume):
    drive(LocalStorage(str(tmp_path)), "20260101T000000", FIRST, tasks=2)
    with Reader(tmp_path) as reader:
        for number in range(1, 11):
            images = results_of(tmp_path) | dict.fromkeys("abc", number)
            images |= {f"{number}-{i}": number for i in range(9)}
            names = [f"20260102T0000{number:02d}-0000000{i}" for i in range(3)]
            with ThreadPoolExecutor(3) as pool:
                runs = [
                    pool.submit(drive, LocalStorage(str(tmp_path)), name, images, 3, resume or name != names[0], 7)
                    for name in names
                ]
            assert [run.result() for run in runs] == [None] * 3
            assert results_of(tmp_path) == images
            assert not (tmp_path / "_staging").exists()
    assert reader.broken == [] and len(reader.seen) >= 10
    assert all(len(set(paths)) == len(paths) and FIRST.keys() <= set(paths) for paths in reader.seen)
    counts = [len(paths) for paths in reader.seen]
    assert counts == sorted(counts)


def drive_with_another(root: Path, other: Callable[[], None], monkeypatch: pytest.MonkeyPatch, **given: Any) -> None:
    """A run, and in the moment right before its commit another one."""
    commit = Table.commit

    def commit_after_another(*arguments: Any) -> None:
        monkeypatch.setattr(Table, "commit", commit)
        other()
        commit(*arguments)

    monkeypatch.setattr(Table, "commit", commit_after_another)
    drive(LocalStorage(str(root)), "20260102T000000-late", given.pop("images", SECOND), tasks=2, days=7, **given)


@pytest.mark.parametrize("other", [{"a": 1, "h": 1}, SECOND, {"x": 0}, {"a": 2, "b": 0}], ids=str)
def test_of_two_runs_the_later_one_keeps_what_is_still_new(tmp_path, monkeypatch, other):
    drive(LocalStorage(str(tmp_path)), "20260101T000000-old", FIRST, tasks=2)
    another = partial(drive, LocalStorage(str(tmp_path)), "20260103T000000-else", other, tasks=1, days=7)
    drive_with_another(tmp_path, another, monkeypatch)
    assert results_of(tmp_path) == {**SECOND, **other}
    assert not (tmp_path / "_staging").exists()


def test_of_two_runs_that_replace_nothing_the_later_one_doubles_nothing(tmp_path, monkeypatch):
    images = {**FIRST, "f": 0, "g": 0}
    drive(LocalStorage(str(tmp_path)), "20260101T000000-old", FIRST, tasks=2)
    another = partial(drive, LocalStorage(str(tmp_path)), "20260103T000000-else", images, tasks=1, days=7)
    drive_with_another(tmp_path, another, monkeypatch, images=images)
    assert results_of(tmp_path) == images


def test_a_run_that_starts_over_replaces_what_another_has_committed_meanwhile(tmp_path, monkeypatch):
    drive(LocalStorage(str(tmp_path)), "20260101T000000-old", FIRST, tasks=2)
    another = partial(drive, LocalStorage(str(tmp_path)), "20260103T000000-else", {"x": 0, "a": 2}, tasks=1, days=7)
    drive_with_another(tmp_path, another, monkeypatch, resume=False)
    assert results_of(tmp_path) == SECOND and not (tmp_path / "_staging").exists()


def test_a_commit_whose_answer_is_lost_is_not_made_twice(tmp_path, monkeypatch):
    drive(LocalStorage(str(tmp_path)), "20260101T000000-old", FIRST, tasks=2)
    commit, commits = Table.commit, []

    def commit_without_answer(*arguments: Any) -> None:
        commits.append(arguments)
        commit(*arguments)
        if len(commits) == 1:
            raise Conflict

    monkeypatch.setattr(Table, "commit", commit_without_answer)
    drive(LocalStorage(str(tmp_path)), "20260102T000000-new", SECOND, tasks=2, days=7)
    assert results_of(tmp_path) == SECOND and len(commits) == 1


@pytest.mark.parametrize("ends", ["after its commit", "before its commit"])
def test_a_slow_run_whose_finished_files_another_takes_finds_their_rows(tmp_path, ends):
    """The other cannot know that it is not dead; and may die itself when it has moved them."""

    def take(step: str) -> None:
        other = Mortal(str(tmp_path), 10**9)
        store = open_store(other)
        if ends == "before its commit":
            other.change = lambda act, *given: die() if "commit" in repr(act) else Mortal.change(other, act, *given)
        with contextlib.suppress(Death):
            store.recover("net@1")

    def die() -> None:
        raise Death

    drive(LocalStorage(str(tmp_path)), "20260101T000000-old", FIRST, tasks=2)
    drive(LocalStorage(str(tmp_path)), "20260102T000000-slow", SECOND, tasks=2, at=take)
    assert results_of(tmp_path) == SECOND
    assert not (tmp_path / "_staging").exists()


def test_a_file_that_another_run_has_removed_as_useless_is_not_added_but_its_rows_are(tmp_path, monkeypatch):
    """Moved and not yet committed, it looks like what a run has left that died long ago."""
    run = "20260102T000000-0123abcd"
    drive(LocalStorage(str(tmp_path)), "20260101T000000-old", FIRST, tasks=2)
    commit = Table.commit

    def remove_first(*arguments: Any) -> None:
        monkeypatch.setattr(Table, "commit", commit)
        (tmp_path / "_staging" / run / ".keep").unlink()
        next(tmp_path.glob("_staging/*/000099-*.parquet")).unlink()
        ResultStore(LocalStorage(str(tmp_path))).recover("net@1")
        commit(*arguments)

    monkeypatch.setattr(Table, "commit", remove_first)
    drive(LocalStorage(str(tmp_path)), run, SECOND, tasks=1, days=7)
    assert results_of(tmp_path) == SECOND
    assert f"{run}-000000-4-0.parquet" not in {path.name for path in live_files(tmp_path)}


def test_finished_files_that_nobody_has_any_more_are_an_error_and_what_is_left_is_committed_by_the_next(tmp_path):
    def lose(step: str) -> None:
        for attempt in ("000000", "000099"):
            next(tmp_path.glob(f"_staging/*/{attempt}-*.parquet")).unlink()
        drive(LocalStorage(str(tmp_path)), "20260103T000000-else", {"x": 0}, tasks=1)

    with pytest.raises(RunError, match="taken the results of .* images .*run again"):
        drive(LocalStorage(str(tmp_path)), "20260102T000000-slow", SECOND, tasks=2, at=lose)
    drive(LocalStorage(str(tmp_path)), "20260104T000000-last", SECOND, tasks=2)
    assert results_of(tmp_path) == {**SECOND, "x": 0}


def test_the_finished_files_of_a_run_that_starts_over_are_its_own(tmp_path):
    """Their rows equal those in the results, and another run would take them for useless."""

    def come(step: str) -> None:
        drive(LocalStorage(str(tmp_path)), "20260103T000000-else", {**FIRST, "x": 0}, tasks=1, days=7)

    drive(LocalStorage(str(tmp_path)), "20260101T000000-old", FIRST, tasks=2)
    drive(LocalStorage(str(tmp_path)), "20260102T000000-over", FIRST, tasks=2, resume=False, at=come)
    assert results_of(tmp_path) == FIRST
    assert {path.name[:20] for path in live_files(tmp_path)} == {"20260102T000000-over"}


def live_files(root: Path) -> set[Path]:
    return {root / path for path in ResultStore(LocalStorage(str(root))).files()}


@pytest.mark.parametrize("began", ["20260102T000000-0123abcd", "20260103T000000-7fffabcd"], ids=["day", "half second"])
def test_what_was_staged_before_a_run_started_over_is_not_kept_after_it(tmp_path, began):
    drive(LocalStorage(str(tmp_path)), "20260101T000000-old", FIRST, tasks=2)
    dead = ResultStore(LocalStorage(str(tmp_path)))
    stage(dead, began, 0, table_of({"gone": 0}))
    drive(LocalStorage(str(tmp_path)), "20260103T000000-80001234", SECOND, tasks=2, resume=False)
    drive(LocalStorage(str(tmp_path)), "20260104T000000-last", SECOND, tasks=2)
    assert results_of(tmp_path) == SECOND and not (tmp_path / "_staging").exists()


def test_files_that_are_deleted_while_a_run_reads_the_table_are_no_error_where_the_table_has_gone_on(tmp_path):
    drive(LocalStorage(str(tmp_path)), "20260101T000000-old", FIRST, tasks=2)

    class Slow(LocalStorage):
        waiting = True

        def read(self, path: str, limit: int | None = None) -> bytes:
            if self.waiting and path.endswith(".parquet"):
                self.waiting = False
                drive(LocalStorage(str(tmp_path)), "20260102T000000-new", SECOND, tasks=2)
            return super().read(path, limit)

    assert ResultStore(Slow(str(tmp_path))).look().rows.num_rows == len(SECOND)


def test_a_file_of_the_table_that_is_gone_is_one_clear_error_and_starting_over_helps(tmp_path):
    drive(LocalStorage(str(tmp_path)), "20260101T000000-old", FIRST, tasks=2)
    victim = next(iter(live_files(tmp_path)))
    victim.unlink()
    with pytest.raises(StorageError, match=f"{victim} is gone.*restore it.*resume=false"):
        drive(LocalStorage(str(tmp_path)), "20260102T000000-next", SECOND, tasks=2)
    drive(LocalStorage(str(tmp_path)), "20260103T000000-over", SECOND, tasks=2, resume=False)
    assert results_of(tmp_path) == SECOND


# ---------------------------------------------------------------- tasks that outlive their driver


@dataclass
class Orphan:
    """A real task of a run that is dead, which can end at any time."""

    folder: Path
    bundle: str
    config: Any
    photos: Path = field(init=False)

    def __post_init__(self) -> None:
        self.photos = self.folder / "photos"
        self.photos.mkdir()
        for i in range(3):
            write_photo(self.photos / f"{i}.jpg", i)
        self.output = self.folder / "out"
        self.task, self.images = self._prepare()
        self.store = ResultStore(self.task.output)
        self.store.stage(self.task.run)

    def _prepare(self):
        task = pipeline.make_task(str(self.photos), self.bundle, str(self.output), self.config)
        images = list_images(task.source, self.config).images
        return task, assign(images, plan(images, 1, self.config))

    def end(self) -> None:
        """Finish after all."""
        list(self.task(self.images.to_batches()))

    def rerun(self, at: Callable[[str], None] = lambda step: None) -> None:
        """The run that comes after the dead one."""
        task, images = self._prepare()
        store = ResultStore(task.output)
        at("before recovery")
        store.recover()
        at("after recovery")
        seen = store.look()
        todo = without(images, seen.rows)
        store.stage(task.run)
        records = [row for batch in task(todo.to_batches()) for row in batch.to_pylist()]
        files = {record["file"]: File(record["file_bytes"], record["statistics"]) for record in records}
        at("before publication")
        models = tuple(model.identity for model in task.models)
        store.publish(Work(task.run, models, seen, todo.select(KEY_NAMES), files))
        at("after publication")
        store.unstage(task.run)
        store.recover()
        at("after the end")

    def names(self) -> list[str]:
        rows = read_results(self.output).sort_by("path").to_pylist()
        return [Path(row["path"]).name for row in rows]


@pytest.fixture
def orphan(tmp_path, bundle_uri, config) -> Orphan:
    return Orphan(tmp_path, bundle_uri, config)


STEPS = ["before recovery", "after recovery", "before publication", "after publication", "after the end"]


@pytest.mark.parametrize("moment", STEPS)
def test_a_task_that_ends_after_its_driver_died_doubles_nothing(orphan, moment):
    orphan.rerun(lambda step: orphan.end() if step == moment else None)
    assert orphan.names() == ["0.jpg", "1.jpg", "2.jpg"]
    orphan.rerun()
    assert orphan.names() == ["0.jpg", "1.jpg", "2.jpg"]


def test_what_a_dead_run_wrote_late_never_replaces_newer_results(tmp_path):
    storage = LocalStorage(str(tmp_path))
    drive(storage, "20260101T000000-dead", {"a": 0}, tasks=1)
    drive(storage, "20260102T000000-live", {"a": 1}, tasks=1)
    late = ResultStore(storage)
    stage(late, "20260101T000000-dead", 7, table_of({"a": 0, "b": 0}))
    late.recover()
    assert results_of(tmp_path) == {"a": 1, "b": 0}


def test_looking_for_files_bears_tasks_that_rename_theirs_meanwhile(tmp_path):
    """Progress is counted twice a second in the folder that tasks write to."""
    storage = open_storage(str(tmp_path))
    for name in ("0.tmp", "1.tmp", "2.tmp", "folder/3.tmp"):
        storage.write(name, b"")
    entries = storage.list()
    first = next(entries)
    for path in tmp_path.iterdir():
        if str(path) != first.path:
            storage.delete(str(path))
    assert list(entries) == []


def test_recovery_and_tidying_up_bear_tasks_that_write_meanwhile(tmp_path):
    """An executor sees only after a while that its driver is gone."""
    store = ResultStore(open_storage(str(tmp_path)))
    rows = table_of({"a": 0})

    def write(run: str, thread: int) -> None:
        for partition in range(30):
            stage(store, run, 100 * thread + partition, rows)

    for attempt in range(10):
        store.stage(f"run{attempt}")
        orphans = [threading.Thread(target=write, args=[f"run{attempt}", number], daemon=True) for number in range(2)]
        for thread in orphans:
            thread.start()
        wait_for("a task's file", lambda folder=tmp_path / "_staging": any(folder.glob("*/*.parquet")))
        while any(thread.is_alive() for thread in orphans):
            store.recover()
        store.recover()
        assert results_of(tmp_path) == {"a": 0}
        assert not (tmp_path / "_staging").exists()
