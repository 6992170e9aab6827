import os
import uuid
from collections import Counter
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from cluster import read_results

from helpers.errors import RunError
from helpers.pipeline.folders import staged_counts
from helpers.pipeline.results import ResultStore, Seen, Work
from helpers.pipeline.rows import Statistics, is_in, settled, without
from helpers.pipeline.schemas import EARLIER_RESULT_SCHEMA, KEY_NAMES
from helpers.pipeline.stages import RESULT_SCHEMA
from helpers.pipeline.table import File, Table
from helpers.storage import open_storage
from helpers.storage.parquet import write_table

DAY = datetime(2026, 1, 1, tzinfo=UTC)
CONTRACT = (  # the contract
    "path string, length long, modified timestamp, width int, height int, error string, "
    "predictions array<struct<class_id int, label string, score float, "
    "box struct<x1 float, y1 float, x2 float, y2 float>, mask struct<size array<int>, counts string>, "
    "keypoints array<struct<x float, y float, score float>>>>, embedding array<float>, model string"
)


@pytest.fixture
def store(tmp_path) -> ResultStore:
    return ResultStore(open_storage(str(tmp_path)))


def table(*names: str, version: int = 0, error: str | None = None, model: str = "net@1") -> pa.Table:
    """One result an image; another version is another modification time."""
    prediction = {"class_id": version, "label": "x", "score": 0.5, "box": None, "mask": None}
    rows = [
        {
            "path": name,
            "length": len(name),
            "modified": DAY + timedelta(microseconds=version),
            "error": error,
            "predictions": None if error else [prediction],
            "model": model,
        }
        for name in names
    ]
    return pa.Table.from_pylist(rows, schema=RESULT_SCHEMA)


def read(store: ResultStore) -> pa.Table:
    """All results, with the columns of today."""
    return pa.concat_tables([store.load(file) for file in store.files()] or [RESULT_SCHEMA.empty_table()])


def stage(store: ResultStore, run: str, partition: int, rows: pa.Table) -> str:
    """Leave a file as a task does."""
    failed = rows.num_rows - rows["error"].null_count
    path = f"_staging/{run}/{partition:06d}-{rows.num_rows}-{failed}.parquet"
    store.stage(run)
    write_table(store.storage, path, rows)
    return path


def make_work(store: ResultStore, *staged: str, seen: Seen | None = None, starts_over: bool = False) -> Work:
    """What the run has to commit that has staged some files."""
    if seen is None:
        store.prepare()
    rows = store.rows(staged)
    files = {
        path: File(next(iter(store.storage.list(path))).length, Statistics.of(store.rows([path])).to_json())
        for path in staged
    }
    models = tuple({"net@1", *rows["model"].unique().to_pylist()})
    run = staged[0].split("/")[1] if staged else "run0"
    return Work(run, models, seen or store.look(), rows.select(KEY_NAMES), files, starts_over=starts_over)


def publish(store: ResultStore, *staged: str, starts_over: bool = False) -> list[str]:
    """Commit files as the run that has staged them does, which then ends."""
    work = make_work(store, *staged, starts_over=starts_over)
    published = store.publish(work)
    store.unstage(work.run)
    return published


def as_before(rows: pa.Table) -> pa.Table:
    """The rows as a version without keypoints and embeddings has written them."""
    return pa.Table.from_pylist(rows.to_pylist(), schema=EARLIER_RESULT_SCHEMA)


def keys(store: ResultStore) -> list[tuple[str, int]]:
    """Path and version of every row, as a reader of the table sees them."""
    rows = read_results(store.storage.root).to_pylist()
    return sorted((row["path"], (row["modified"] - DAY).microseconds) for row in rows)


def test_published_files_are_what_readers_see(store):
    published = publish(store, stage(store, "run1", 0, table("a", "b")), stage(store, "run1", 1, table("c")))
    assert keys(store) == [("a", 0), ("b", 0), ("c", 0)]
    assert len(published) == 2 and all(store.storage.exists(path) for path in published)
    assert read(store).sort_by("path").equals(table("a", "b", "c"))
    assert not store.storage.exists("_staging")


def test_staged_rows_are_not_in_the_results(store):
    stage(store, "run1", 0, table("a", "b"))
    assert store.look().rows.num_rows == 0 and read(store).num_rows == 0


def test_rows_have_key_model_and_file(store):
    publish(store, stage(store, "run1", 0, table("a", model="net@7")))
    (row,) = store.look().rows.to_pylist()
    assert (row["path"], row["length"], row["modified"], row["model"]) == ("a", 1, DAY, "net@7")
    assert store.storage.exists(row["file"]) and Path(row["file"]).parent == Path("results")


def test_files_of_two_runs_and_partitions_never_share_a_name(store):
    for run in ("run1", "run2"):
        publish(store, *(stage(store, run, partition, table(f"{run}-{partition}")) for partition in range(3)))
    assert len(keys(store)) == 6


def test_images_in_the_results_are_left_out_of_a_run(store):
    publish(store, stage(store, "run1", 0, table("a", "b", "c")))
    todo = without(pa.concat_tables([table("b", "d"), table("c", version=1), table("a")]), store.look().rows)
    assert [(row["path"], row["modified"]) for row in todo.to_pylist()] == [
        ("d", DAY),
        ("c", DAY + timedelta(microseconds=1)),
    ]


def test_an_image_of_another_length_is_done_again(store):
    publish(store, stage(store, "run1", 0, table("a")))
    longer = table("a").set_column(1, "length", pa.array([99]))
    assert without(longer, store.look().rows).num_rows == 1
    publish(store, stage(store, "run2", 0, longer))
    assert read(store)["length"].to_pylist() == [99]


def test_nothing_is_left_out_where_there_are_no_results(store):
    assert without(table("a", "b"), store.look().rows).num_rows == 2


@pytest.mark.parametrize(
    ("error", "done"),
    [
        (None, True),
        ("the file is empty", True),
        ("the file is not an image; it begins with b'(x'", True),
        ("the image is damaged or cut short", True),
        ("the frame cannot be decoded: the video is damaged here, or cut short", True),
        ("this is a directory, not an image file", True),
        ("the file cannot be read: it is a pipe or a device, not a file", True),
        ("the file cannot be read: permission denied", False),
        ("the file is gone: it was moved", False),
        ("the image has 20 x 20 pixels, more than the 100 that ingest.max_pixels allows", False),
        ("nobody has seen this: the file is empty", False),
    ],
)
def test_only_an_error_of_the_bytes_is_final(store, error, done):
    publish(store, stage(store, "run1", 0, table("a", error=error)))
    assert without(table("a"), settled(store.look().rows)).num_rows == (0 if done else 1)


def test_an_image_that_is_tried_again_replaces_its_error(store):
    publish(store, stage(store, "run1", 0, pa.concat_tables([table("a"), table("b", error="permission denied")])))
    todo = without(table("a", "b"), settled(store.look().rows))
    publish(store, stage(store, "run2", 0, todo))
    assert keys(store) == [("a", 0), ("b", 0)] and read(store)["error"].null_count == 2


def test_what_a_killed_run_tried_again_with_success_is_kept(store):
    publish(store, stage(store, "run1", 0, table("a", "b", error="permission denied")))
    stage(store, "run2", 0, pa.concat_tables([table("a"), table("b", error="permission denied")]))
    assert store.recover() == 1
    assert keys(store) == [("a", 0), ("b", 0)]
    assert dict(zip(*read(store).select(["path", "error"]).columns, strict=True)) == {
        pa.scalar("a"): pa.scalar(None, pa.string()),
        pa.scalar("b"): pa.scalar("permission denied"),
    }


def test_another_attempt_of_a_task_replaces_no_file_of_the_first(store):
    """Both have as many errors, so that their files have one name."""
    bad = table("a", error="permission denied"), table("b", error="permission denied")
    publish(store, stage(store, "run1", 0, pa.concat_tables([bad[0], table("b"), table("c")])))
    stage(store, "run1", 0, pa.concat_tables([table("a"), bad[1], table("c")]))
    assert store.recover() == 1
    assert keys(store) == [("a", 0), ("b", 0), ("c", 0)] and read(store)["error"].null_count == 3


def test_more_paths_than_an_array_holds_are_looked_up():
    """2 GiB are about 20 million images; here a hundred megabytes of long paths are there again and again."""
    paths = pa.array([f"{i:010000d}" for i in range(10_000)])
    many = pa.chunked_array([paths] * 22)
    assert many.nbytes > 2**31
    assert is_in(pa.chunked_array([paths[:1], ["none"]]), many).to_pylist() == [True, False]


def test_what_writers_that_were_killed_left_is_removed_and_nothing_else(store):
    publish(store, stage(store, "run1", 0, table("a")))
    left = [f"{folder}/.{uuid.uuid4().hex}.tmp" for folder in ("results", "pictures", "report", "runs")]
    others = ["results/.DS_Store", "pictures/notes.tmp", "runs/.notes.tmp", f"notes/.{uuid.uuid4().hex}.tmp"]
    others += [f"runs/below/.{uuid.uuid4().hex}.tmp", f".{uuid.uuid4().hex}.tmp"]
    for path in (*left, *others):
        store.storage.write(path, b"half")
    store.prepare()  # another run may be writing them right now
    assert all(map(store.storage.exists, left))
    for path in (*left, *others):
        os.utime(store.storage.join(path), (0, 0))
    store.prepare()
    assert [path for path in left if store.storage.exists(path)] == []
    assert [path for path in others if not store.storage.exists(path)] == []


def test_folders_that_were_half_deleted_are_removed_and_nothing_else(store):
    doomed, others = f".{uuid.uuid4().hex}.deleted", ["photos.deleted/a", ".old.deleted/a"]
    for path in (f"{doomed}/run1/.keep", *others):
        store.storage.write(path, b"")
    store.storage.write("run2/a", b"")
    store.storage.delete("run2")
    assert not store.storage.exists(doomed) and all(map(store.storage.exists, others))


def test_changed_images_replace_their_rows(store):
    publish(store, stage(store, "run1", 0, table("a", "b")), stage(store, "run1", 1, table("c")))
    todo = table("a", "c", version=1)
    publish(store, stage(store, "run2", 0, todo))
    assert keys(store) == [("a", 1), ("b", 0), ("c", 1)]


def test_what_a_killed_run_left_is_recovered(store):
    publish(store, stage(store, "run1", 0, table("a")))
    stage(store, "run2", 0, table("b", "c"))
    stage(store, "run2", 1, table("d", error="bad"))
    assert store.recover() == 3
    assert keys(store) == [("a", 0), ("b", 0), ("c", 0), ("d", 0)]
    assert store.recover() == 0 and not store.storage.exists("_staging")


def test_rows_staged_twice_or_published_already_come_once(store):
    publish(store, stage(store, "run1", 0, table("a", "b")))
    stage(store, "run2", 0, table("b", "c"))  # b is published
    stage(store, "run2", 1, table("c", "d"))  # c is in another staged file, of another attempt
    stage(store, "run3", 0, table("d", "e"))
    assert store.recover() == 3
    assert keys(store) == [(name, 0) for name in "abcde"]


def test_a_recovered_newer_row_replaces_the_older(store):
    publish(store, stage(store, "run1", 0, table("a", "b")))
    stage(store, "run2", 0, table("a", version=1))
    assert store.recover() == 1
    assert keys(store) == [("a", 1), ("b", 0)]


def test_progress_counts_the_files_of_one_run(store):
    assert store.progress("run1") == (0, 0)
    stage(store, "run1", 0, table("a", "b"))
    stage(store, "run1", 1, pa.concat_tables([table("c"), table("d", error="bad")]))
    stage(store, "run2", 0, table("e"))
    assert store.progress("run1") == (4, 1)


def test_a_staged_files_name_tells_its_counts():
    assert staged_counts(["/x-y/_staging/20260101T000000-abc/000003-1000-12.parquet"]) == (1000, 12)


def test_results_without_rows_can_be_read(store):
    publish(store)
    assert read_results(store.storage.root).schema.equals(RESULT_SCHEMA)
    assert read(store).num_rows == 0 and read(store).schema.equals(RESULT_SCHEMA)


def test_reading_before_any_run_gives_no_rows(store):
    assert read(store).schema.equals(RESULT_SCHEMA) and read(store).num_rows == 0


def test_spark_reads_exactly_the_contracts_schema(store, spark):
    publish(store, stage(store, "run1", 0, table("a", "b")))
    frame = spark.read.parquet(store.location)
    assert frame.schema.simpleString() == spark.createDataFrame([], CONTRACT).schema.simpleString()
    assert {(row.path, row.predictions[0].box) for row in frame.collect()} == {("a", None), ("b", None)}


# ---------------------------------------------------------------- results of an earlier version


@pytest.fixture
def earlier(store) -> ResultStore:
    """Plain Parquet files, one of them without keypoints and embeddings."""
    write_table(store.storage, "results/run1-000000-2-0.parquet", as_before(table("a", "b")))
    write_table(store.storage, "results/run2-000000-1-0.parquet", table("c"))
    return store


def test_results_of_an_earlier_version_become_a_table_in_one_commit_with_a_line_that_says_so(earlier, caplog):
    caplog.set_level("INFO", "helpers")
    earlier.resume("net@1")
    assert earlier.look().rows.num_rows == 3
    assert read_results(earlier.storage.root).sort_by("path").equals(read(earlier).sort_by("path"))
    assert [(run["version"], run["images"], run["models"]) for run in earlier.history()] == [(0, 3, "net@1")]
    (line,) = caplog.messages
    assert "2 Parquet files of an earlier version" in line and earlier.location in line
    caplog.clear()
    earlier.resume("net@1")
    assert earlier.look().version == 0 and caplog.messages == []


def test_results_of_an_earlier_version_are_read_before_and_after_with_nulls_for_what_they_lack(earlier):
    for _ in range(2):
        rows = read(earlier).sort_by("path")
        assert rows.equals(table("a", "b", "c"))
        assert [row["predictions"][0]["keypoints"] for row in rows.to_pylist()] == [None] * 3
        earlier.prepare()
    assert pq.read_table(earlier.location).sort_by("path").equals(rows)


def test_images_of_an_earlier_version_are_left_out_of_a_run(earlier):
    earlier.resume("net@1")
    assert without(table("a", "b", "c", "d"), settled(earlier.look().rows))["path"].to_pylist() == ["d"]


def test_rows_of_an_earlier_version_are_replaced(earlier):
    publish(earlier, stage(earlier, "run3", 0, table("a", version=1)))
    assert keys(earlier) == [("a", 1), ("b", 0), ("c", 0)]


def test_two_runs_may_take_over_results_of_an_earlier_version_at_once(earlier, monkeypatch):
    create, other = Table.create, ResultStore(open_storage(earlier.storage.root))

    def after_another(table: Table, *given):
        monkeypatch.setattr(Table, "create", create)
        other.prepare()
        return create(table, *given)

    monkeypatch.setattr(Table, "create", after_another)
    earlier.prepare()
    assert earlier.look().rows.num_rows == other.look().rows.num_rows == 3
    assert earlier.look().version == 0


def test_what_a_killed_run_of_an_earlier_version_left_is_recovered(store):
    publish(store, stage(store, "run1", 0, table("a")))
    stage(store, "run2", 0, as_before(table("a", "b")))
    assert store.recover() == 1
    assert read(store).sort_by("path").equals(table("a", "b"))


# ---------------------------------------------------------------- results of several models


def both(*names: str, errors: tuple[str | None, str | None] = (None, None)) -> pa.Table:
    """A row per image and model."""
    return pa.concat_tables([table(*names, error=errors[0]), table(*names, error=errors[1], model="net@2")])


def test_an_image_is_done_when_it_has_a_settled_row_of_each_model(store):
    rows = [
        both("a"),
        table("b"),
        both("c", errors=(None, "permission denied")),
        both("d", errors=(None, "the file is empty")),
    ]
    publish(store, *(stage(store, "run1", number, part) for number, part in enumerate(rows)))
    todo = without(table("a", "b", "c", "d", "e"), settled(store.look().rows, 2))
    assert todo["path"].to_pylist() == ["b", "c", "e"]


def test_rows_of_two_models_are_no_doubles(store):
    publish(store, stage(store, "run1", 0, both("a", "b")))
    store.resume("net@2", "net@1")
    assert store.look().rows.num_rows == 4


def test_what_a_killed_run_left_replaces_all_rows_of_an_image_or_none(store):
    publish(store, stage(store, "run1", 0, both("a", "b", errors=("permission denied", "permission denied"))))
    stage(store, "run2", 0, pa.concat_tables([both("a", errors=(None, "permission denied")), both("c")]))
    assert store.recover("net@1", "net@2") == 2
    errors = Counter((row["path"], row["error"]) for row in read(store).to_pylist())
    assert errors == {("a", None): 1, ("a", "permission denied"): 1, ("b", "permission denied"): 2, ("c", None): 2}


def test_results_may_have_fewer_models_than_a_run_but_no_other(store):
    publish(store, stage(store, "run1", 0, table("a")))
    store.resume("net@1", "net@2")
    assert store.look().rows.num_rows == 1
    with pytest.raises(RunError, match="holds results of net@1, and this run is of net@2 and net@3"):
        store.resume("net@2", "net@3")
