"""A run works on its images in slices, and leaves out what it knows to be unchanged.

How it was checked that each test fails without its protection: one change at a time.

    changed                                                          failed
    listing.py: chunks end after a number of files                   a change changes the digest of its own chunk only
    listing.py: a chunk with a passing error is remembered           a passing error is looked at again
    listing.py: `look` forgets nothing                               what another run has changed meanwhile
    listing.py: models and settings do not count                     another setting
    listing.py: `_slice` leaves the chunks in the list               a slice is held by whoever works on it alone
    rows.py: empty tables are compared like others                   comparing with nothing
    schemas.py: each column of nulls is made                         columns of nulls share their memory
    driver.py: the run does not look whether another has committed   what another run commits between slices
    driver.py: workers start in any case                             nothing new starts no task
    driver.py: every slice counts its partitions from 0              slices give what one pass gives
    driver.py: starting over publishes slice by slice                a reader of a run that starts over
    readers.py: a slice without an image is an error                 archives without images
    results.py: `note` looks at nothing                              no note where another run was faster
    results.py: `look` reads every file                              only files that can hold a range are read
    results.py: the models of all files are read                     resuming reads no file
    results.py: `_remove` takes the rows of a range for all          a row beyond the range
    rows.py: the range ends with the last file's own path            the range of a video or an archive
    table.py: a clean-up is a change                                 a clean-up is no change
"""

import json
import os
import shutil
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pytest
from cluster import read_results
from test_results import keys, publish, stage, table

from helpers import pipeline
from helpers.config import Config, load_config
from helpers.errors import RunError
from helpers.pipeline import RunSummary, listing
from helpers.pipeline.listing import Known, list_images, list_slices
from helpers.pipeline.records import read_runs
from helpers.pipeline.results import ResultStore, Seen, Work
from helpers.pipeline.rows import Statistics, is_among, is_in, path_range, without
from helpers.pipeline.schemas import ASSIGNED_SCHEMA, KEY_NAMES, conform
from helpers.pipeline.table import File
from helpers.storage import LocalStorage, open_storage
from helpers.tracking.watching import show_progress

NAMES = [f"{folder}/{number:03d}.png" for folder in ("a", "b", "b-1", "c") for number in range(25)]


def settings(**overrides) -> Config:
    return load_config("local", **{"spark.master": "local[2]", "pictures": 0, "report": 0, **overrides})


@pytest.fixture
def files(tmp_path) -> LocalStorage:
    """A hundred files with the names of images."""
    storage = open_storage(str(tmp_path / "photos"))
    for name in NAMES:
        storage.write(name, name.encode())
    return storage


@pytest.fixture
def store(tmp_path) -> ResultStore:
    return ResultStore(open_storage(str(tmp_path / "out")))


def slices(storage: LocalStorage, known: object = frozenset(), **overrides) -> list[listing.Listing]:
    return list(list_slices(storage, settings(**overrides), known=known))


# ---------------------------------------------------------------- the listing


@pytest.mark.parametrize("size", [1, 7, 99, 100, 101, 10**6])
def test_a_listing_in_slices_has_every_image_once_and_no_slice_is_too_large(files, size):
    parts = slices(files, **{"partitioning.slice_images": size})
    assert max(part.images.num_rows for part in parts) <= size and len(parts) >= len(NAMES) / size
    assert [part.is_last for part in parts] == [False] * (len(parts) - 1) + [True]
    paths = [path for part in parts for path in part.images["path"].to_pylist()]
    assert paths == sorted(files.join(name) for name in NAMES)
    assert list_images(files, settings()).images["path"].to_pylist() == paths
    assert [path for part in parts for chunk in part.chunks for path in chunk.paths.to_pylist()] == paths


def test_the_first_slice_is_small_so_that_results_appear_early(files, monkeypatch):
    monkeypatch.setattr(listing, "MAX_CHUNK_FILES", 5)
    monkeypatch.setattr(listing, "FIRST_IMAGES", 10)
    sizes = [part.images.num_rows for part in slices(files)]
    assert sizes == [10, len(NAMES) - 10]
    sizes = [part.images.num_rows for part in slices(files, **{"partitioning.slice_images": 20})]
    assert sizes[:2] == [10, 20] and sum(sizes) == len(NAMES)
    sizes = [part.images.num_rows for part in slices(files, **{"partitioning.slice_images": 7})]
    assert max(sizes) <= 7  # as small as any other


def test_slices_count_what_is_left_out_once(files):
    files.write("a/notes.txt", b"")
    files.write("c/notes.txt", b"")
    parts = slices(files, **{"partitioning.slice_images": 10})
    assert len(parts) > 5 and parts[-1].left_out == {"with another suffix": 2}


def test_a_video_or_an_archive_takes_the_place_of_many_images(files):
    for number in range(4):
        files.write(f"d/{number}.mp4", b"")
        files.write(f"d/{number}.zip", b"")
    parts = slices(files, **{"partitioning.slice_images": 2 * listing.CONTAINER_IMAGES})
    assert sum(part.videos.num_rows + part.archives.num_rows for part in parts) == 8
    assert max(part.videos.num_rows + part.archives.num_rows for part in parts) <= 2 or len(parts[-1].chunks) == 1


@pytest.fixture
def pool():
    """Arrow's memory, counted from here on."""
    before = pa.default_memory_pool()
    counted = pa.proxy_memory_pool(before)
    pa.set_memory_pool(counted)
    yield counted
    pa.set_memory_pool(before)


def test_a_slice_is_held_by_whoever_works_on_it_alone(files, pool):
    parts = list_slices(files, settings(**{"partitioning.slice_images": 80}))
    part = next(parts)
    held = pool.bytes_allocated()
    assert part.images.num_rows == 80
    del part
    assert pool.bytes_allocated() < held / 2  # of the 20 files to come


def test_comparing_with_nothing_takes_no_memory(pool):
    images = pa.table({"path": map(str, range(10_000)), "length": range(10_000), "modified": range(10_000)})
    before, nothing = pool.max_memory(), images.slice(0, 0)
    assert without(images, nothing) is images
    assert len(is_among(nothing, images)) == len(is_in(nothing["path"], images["path"])) == 0
    assert is_among(nothing, images).type == is_in(nothing["path"], images["path"]).type == pa.bool_()
    assert pool.max_memory() == before > 0


def test_columns_of_nulls_share_their_memory():
    images = conform(pa.table({"path": ["a"] * 1000}), ASSIGNED_SCHEMA)
    nulls = [images[name].chunk(0).buffers()[1].address for name in ("length", "pts", "seek", "offset", "packed")]
    assert len(set(nulls)) == 1 and images.schema == ASSIGNED_SCHEMA


def digests(storage: LocalStorage) -> list[str]:
    return [chunk.digest for part in slices(storage) for chunk in part.chunks]


def write_new(files: LocalStorage) -> None:
    files.write("b/0005.png", b"")


def touch(files: LocalStorage) -> None:
    os.utime(files.join("b/007.png"), ns=(0, 10**18))


def delete(files: LocalStorage) -> None:
    files.delete("b/007.png")


@pytest.mark.parametrize("change", [write_new, touch, delete])
def test_a_change_changes_the_digest_of_its_own_chunk_only(files, monkeypatch, change):
    monkeypatch.setattr(listing, "CHUNK_FILES", 8)
    before = digests(files)
    assert digests(files) == before and len(before) == len(set(before)) > 5
    change(files)
    assert len(set(before) - set(digests(files))) <= 2  # two where the file that ended one has gone
    assert set(before) != set(digests(files))


def test_known_chunks_are_left_out_and_told(files, monkeypatch):
    monkeypatch.setattr(listing, "CHUNK_FILES", 8)
    known = set(digests(files)[::2])
    (part,) = slices(files, known)
    assert set(part.known) == known and not known & {chunk.digest for chunk in part.chunks}
    assert part.images.num_rows == sum(len(chunk.paths) for chunk in part.chunks) < len(NAMES)
    (nothing,) = slices(files, set(digests(files)))
    assert nothing.images.num_rows == 0 and len(nothing.known) == len(digests(files))


# ---------------------------------------------------------------- what is known


def failures(*rows: tuple[str, str]) -> pa.Table:
    return pa.table([pa.array(column, pa.string()) for column in zip(*rows, strict=True)], names=["path", "error"])


def told(files: LocalStorage, *failed: tuple[str, str], config: Config | None = None) -> Seen:
    """What a commit tells after a run that found such errors."""
    known = Known(Seen(), ["net@1"], config or settings())
    (part,) = slices(files)
    images = pa.concat_tables([part.images, part.archives])
    known.add(part, images, failures(*failed) if failed else failures(("", "")).slice(1))
    return Seen(3, change=3, listed=known.tell("run1"))


@pytest.fixture
def small_chunks(monkeypatch) -> None:
    monkeypatch.setattr(listing, "CHUNK_FILES", 8)


def test_a_run_knows_what_the_one_before_has_told(files, small_chunks):
    damaged = [(files.join(name), "the file is empty; 0 bytes") for name in NAMES[:3]]
    known = Known(told(files, *damaged, damaged[0]), ["net@1"], settings())
    (part,) = slices(files, known)
    assert known.take(part.known) == (100, Counter({"the file is empty": 3})) and part.images.num_rows == 0
    assert not known.has_news


def test_a_chunk_with_a_passing_error_is_looked_at_again(files, small_chunks):
    known = Known(told(files, (files.join("b/007.png"), "permission denied")), ["net@1"], settings())
    (part,) = slices(files, known)
    assert [files.join("b/007.png") in chunk.paths.to_pylist() for chunk in part.chunks] == [True]


def test_an_archive_that_cannot_be_read_is_looked_at_again(files, small_chunks):
    """It may be mended in place, with its length and time as they were."""
    files.write("b/007.zip", b"")
    known = Known(told(files, (files.join("b/007.zip"), "the archive is damaged")), ["net@1"], settings())
    (part,) = slices(files, known)
    assert part.archives.num_rows == 1 and len(part.chunks) == 1


@pytest.mark.parametrize(
    "change", [{"ingest.suffixes": [".png"]}, {"video.every": 2}, {"inference.memory_megabytes": 99}]
)
def test_another_setting_or_model_knows_nothing(files, change):
    seen = told(files)
    assert Known(seen, ["net@1"], settings()) and Known(seen, ["net@1"], settings(pictures=3))
    assert not Known(seen, ["net@1"], settings(**change))
    assert not Known(seen, ["net@2"], settings()) and not Known(seen, ["net@1", "net@2"], settings())


def test_what_another_run_has_changed_meanwhile_is_not_known_any_more(files):
    seen = told(files)
    for later in (Seen(4, change=4), Seen(4, change=4, listed=seen.listed), Seen(3, change=3, listed="{}")):
        known = Known(seen, ["net@1"], settings())
        (part,) = slices(files, known)
        known.take(part.known)
        known.look(seen)
        assert known and known.has_news is False and part.known
        known.look(later)
        assert not known and not known.has_news


def test_no_more_chunks_are_told_than_a_commit_may_have(files, small_chunks, monkeypatch):
    monkeypatch.setattr("helpers.pipeline.listing.MOST_CHUNKS", 3)
    assert len(Known(told(files), ["net@1"], settings())) == 3


def test_a_note_is_made_where_nothing_has_changed_and_no_note_where_another_run_was_faster(store):
    publish(store, stage(store, "run1", 0, table("a")))
    seen = store.look()
    store.note("one", (seen.change, seen.listed))
    after = store.look()
    assert (after.listed, after.version) == ("one", seen.version + 1) and len(store.history()) == 1
    store.note("two", (seen.change, seen.listed))
    assert (store.look().listed, store.look().version) == ("one", after.version)
    publish(store, stage(store, "run2", 0, table("b")))
    store.note("three", (after.change, after.listed))
    assert store.look().listed == "" and keys(store) == [("a", 0), ("b", 0)]


def test_a_clean_up_is_no_change(store):
    publish(store, stage(store, "run1", 0, table("a", "b")))
    publish(store, stage(store, "run2", 0, table("a", version=1)))
    seen = store.look()
    store.note("one", (seen.change, seen.listed))
    noted = store.look()
    store.vacuum(0)
    cleaned = store.look()
    assert cleaned.version > noted.version
    assert (cleaned.change, cleaned.listed) == (noted.change, "one")


# ---------------------------------------------------------------- the table by ranges


class Counting(LocalStorage):
    """Remembers which files of rows are read."""

    def __init__(self, root: str):
        super().__init__(root)
        self.reads: list[str] = []

    def read(self, path: str, limit: int | None = None) -> bytes:
        if path.endswith(".parquet"):
            self.reads.append(path)
        return super().read(path, limit)


@pytest.fixture
def counted(store) -> ResultStore:
    """Results of three slices and one image beyond, as one reads them that counts."""
    for number, names in enumerate(("abc", "mno", "xyz")):
        publish(store, stage(store, "run1", number, table(*names)))
    publish(store, stage(store, "run2", 0, table("b", "y", version=1)))
    return ResultStore(Counting(store.storage.root))


def test_only_files_that_can_hold_a_range_are_read_and_only_its_rows_are_seen(counted):
    assert counted.look(("m", "n")).rows["path"].to_pylist() == ["m", "n"]
    assert len(counted.storage.reads) == 2  # the range of the second run's file is wide
    counted.storage.reads.clear()
    assert counted.look(("0", "9")).rows.num_rows == 0 and counted.storage.reads == []


def test_resuming_reads_no_file(counted):
    counted.resume("net@1")
    assert counted.storage.reads == []


def test_texts_that_others_have_shortened_in_the_log_are_looked_up(store):
    """As those do who compact a table."""
    rows = table("a", model="net-of-a-very-long-name@0123456789ab")
    path = stage(store, "run1", 0, rows)
    bounds = [{"path": "a", "model": text} for text in ("net-of-a-very", "net-of-a-verz")]
    shortened = {"numRecords": 1, "minValues": bounds[0], "maxValues": bounds[1], "nullCount": {}}
    size = next(iter(store.storage.list(path))).length
    (model,) = rows["model"].to_pylist()
    files = {path: File(size, json.dumps(shortened))}
    store.publish(Work("run1", (model,), Seen(), rows.select(KEY_NAMES), files))
    store.resume(model)
    with pytest.raises(RunError, match=f"holds results of {model}"):
        store.resume("net@1")


def test_a_row_beyond_the_range_is_kept_when_its_file_goes(counted):
    """The second run's file has rows in two ranges, and one of them is replaced."""
    seen = counted.look(("a", "c"))
    todo = table("b", version=2)
    path = stage(counted, "run3", 0, todo)
    files = {path: counted_file(counted, path)}
    counted.publish(Work("run3", ("net@1",), seen, todo.select(KEY_NAMES), files))
    assert keys(counted) == [("a", 0), ("b", 2), ("c", 0), *((name, 0) for name in "mno"), ("x", 0), ("y", 1), ("z", 0)]


def counted_file(store: ResultStore, path: str) -> File:
    return File(next(iter(store.storage.list(path))).length, Statistics.of(store.rows([path])).to_json())


def test_the_range_of_a_video_or_an_archive_has_all_that_is_in_it():
    images = table("b.png")
    archives = table("a.tar", "c.tar")
    first, last = path_range(images, images.slice(1), archives)
    assert first == "a.tar"
    assert "c.tar#member=zzz🙂" < last < "c.tarx" and path_range(images.slice(1)) is None


# ---------------------------------------------------------------- runs


PHOTOS = [f"{folder}/{number}.png" for folder in ("a", "b", "c") for number in range(8)]
SLICED = {"partitioning.slice_images": 7, "partitioning.partitions": 2}


def write_photo(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (40, 60, 3), np.uint8)
    path.write_bytes(cv2.imencode(".png", pixels)[1].tobytes())


@pytest.fixture
def photos(tmp_path) -> Path:
    """Good images, a damaged one, and an archive of two."""
    folder = tmp_path / "photos"
    for number, name in enumerate(PHOTOS):
        write_photo(folder / name, number)
    (folder / "b" / "bad.png").write_bytes(b"no image")
    write_archive(folder, 2)
    return folder


def write_archive(folder: Path, members: int) -> None:
    with zipfile.ZipFile(folder / "b" / "some.zip", "w") as archive:
        for number in range(members):
            archive.write(folder / PHOTOS[number], f"{number}.png")


COUNT = len(PHOTOS) + 3
Run = Callable[..., RunSummary]


@pytest.fixture
def run(spark, bundle_uri, photos, tmp_path) -> Run:
    """Run over the photographs, in slices by default, with further settings."""
    return lambda output="out", **changes: pipeline.run(
        spark,
        str(photos),
        bundle_uri,
        str(tmp_path / output),
        settings(**{"paths.runs": str(tmp_path / "runs"), **SLICED, **changes}),
    )


def rows_of(output: Path) -> list[dict]:
    """The results as any reader of the table sees them, by path."""
    return read_results(output).sort_by("path").to_pylist()


def names_of(output: Path) -> list[str]:
    return [row["path"].rpartition("photos/")[2] for row in rows_of(output)]


def counts(summary: RunSummary) -> tuple[int, int, int, int]:
    return summary.images, summary.ok, summary.failed, summary.skipped


def test_slices_give_what_one_pass_gives(run, tmp_path):
    sliced, whole = run(), run("whole", **{"partitioning.slice_images": 1000})
    assert counts(sliced) == counts(whole) == (COUNT, COUNT - 1, 1, 0)
    assert rows_of(tmp_path / "out") == rows_of(tmp_path / "whole") and len(rows_of(tmp_path / "out")) == COUNT
    history = [ResultStore(open_storage(str(tmp_path / name))).history() for name in ("out", "whole")]
    assert len(history[0]) >= COUNT / 7 and len(history[1]) == 1
    assert sum(commit["images"] for commit in history[0]) == COUNT
    partitions = [record["partition"] for record in sliced.records]
    assert len(partitions) == len(set(partitions)) == sliced.partitions > 4
    (record,) = read_runs(str(tmp_path / "out")).to_dict("records")
    assert (record["images"], record["failed"], record["partitions"]) == (COUNT, 1, sliced.partitions)


def test_results_appear_slice_by_slice_and_pictures_are_of_all_slices(run, tmp_path, monkeypatch):
    publish_really, seen = ResultStore.publish, []

    def and_read(*given) -> list[str]:
        published = publish_really(*given)
        seen.append(names_of(tmp_path / "out"))
        return published

    monkeypatch.setattr(ResultStore, "publish", and_read)
    run(pictures=100)
    assert len(seen) > 3 and [len(names) for names in seen] == sorted({len(names) for names in seen})
    assert all(seen[-1][: len(names)] == names for names in seen)  # slices come in the order of paths
    assert len(list((tmp_path / "out" / "pictures").iterdir())) == COUNT - 1


@pytest.mark.spark
def test_a_run_with_nothing_new_starts_no_task_and_reads_no_row(spark, run, tmp_path, monkeypatch):
    first = run()
    read = LocalStorage.read

    def read_no_rows(self: LocalStorage, path: str, limit: int | None = None) -> bytes:
        assert not path.endswith(".parquet")
        return read(self, path, limit)

    monkeypatch.setattr(LocalStorage, "read", read_no_rows)
    jobs, version = job_count(spark), ResultStore(open_storage(str(tmp_path / "out"))).look(("", "")).version
    again = run()
    assert job_count(spark) == jobs
    assert counts(again) == (COUNT, 0, 0, COUNT)
    assert (again.reasons(), again.failed_of_all) == (first.reasons(), first.failed_of_all)
    assert ResultStore(open_storage(str(tmp_path / "out"))).look(("", "")).version == version


def job_count(spark) -> int:
    return len(spark.sparkContext.statusTracker().getJobIdsForGroup())


def test_only_what_has_changed_is_worked_on(run, photos, tmp_path):
    run()
    write_photo(photos / "b" / "new.png", 100)
    write_photo(photos / "c" / "3.png", 101)
    os.utime(photos / "c" / "3.png", ns=(0, 10**18))
    write_archive(photos, 1)
    again = run()
    assert counts(again) == (COUNT, 3, 0, COUNT - 3)
    assert names_of(tmp_path / "out") == sorted(
        [*PHOTOS, "b/bad.png", "b/new.png", "b/some.zip#member=0.png"], key=str.encode
    )
    assert counts(run()) == (COUNT, 0, 0, COUNT)


@pytest.mark.parametrize("die_at", [1, 2, 4])
def test_a_run_that_is_killed_between_slices_is_ended_by_the_next(run, tmp_path, monkeypatch, die_at):
    publish_really, published = ResultStore.publish, []

    def die(*given) -> list[str]:
        if len(published) + 1 == die_at:
            raise KeyboardInterrupt
        published.append(publish_really(*given))
        return published[-1]

    with monkeypatch.context() as killed:
        killed.setattr(ResultStore, "publish", die)
        with pytest.raises(KeyboardInterrupt):
            run()
    assert len(published) == die_at - 1
    again = run()
    assert again.images == COUNT and again.skipped > 0
    assert (again.ok > 0) == (die_at < 4)  # of the last slice all was staged
    assert len(set(names_of(tmp_path / "out"))) == len(names_of(tmp_path / "out")) == COUNT
    assert counts(run()) == (COUNT, 0, 0, COUNT)
    assert not (tmp_path / "out" / "_staging").exists()


def test_a_reader_of_a_run_that_starts_over_has_all_old_results_or_all_new_ones(run, tmp_path, monkeypatch):
    run()
    before, seen, stage_really = rows_of(tmp_path / "out"), [], ResultStore.stage
    store = ResultStore(open_storage(str(tmp_path / "out")))
    old, commits = set(store.files()), len(store.history())

    def and_read(*given) -> None:
        seen.append(rows_of(tmp_path / "out"))
        stage_really(*given)

    monkeypatch.setattr(ResultStore, "stage", and_read)
    again = run(resume=False)
    assert counts(again) == (COUNT, COUNT - 1, 1, 0)
    assert len(seen) > 3 and all(rows == before for rows in seen)
    assert rows_of(tmp_path / "out") == before and not old & set(store.files())
    assert len(store.history()) == commits + 1
    assert counts(run()) == (COUNT, 0, 0, COUNT)


def test_what_another_run_commits_between_slices_is_kept_and_nothing_is_believed_of_before(
    run, photos, tmp_path, monkeypatch
):
    """The other one has seen a new version of an image of the first slice, which is as it was when the next looks."""
    publish_really, output = ResultStore.publish, str(tmp_path / "out")
    times: list[int] = []

    def and_another(store: ResultStore, work: Work) -> list[str]:
        published = publish_really(store, work)
        if not times:
            times.append((photos / "a" / "0.png").stat().st_mtime_ns)
            os.utime(photos / "a" / "0.png", ns=(0, 10**18))
            with monkeypatch.context() as other:
                other.setattr(ResultStore, "publish", publish_really)
                assert run(**{"partitioning.slice_images": 1000}).ok > 0
            write_photo(photos / "c" / "later.png", 100)  # so that there is something to commit after the other one
            os.utime(photos / "a" / "0.png", ns=(times[0], times[0]))
        return published

    with monkeypatch.context() as first:
        first.setattr(ResultStore, "publish", and_another)
        assert counts(run())[0] == COUNT + 1
    (row,) = [row for row in rows_of(Path(output)) if row["path"].endswith("a/0.png")]
    assert row["modified"].timestamp() == 10**9
    assert counts(run()) == (COUNT + 1, 1, 0, COUNT)
    assert len(set(names_of(Path(output)))) == len(names_of(Path(output))) == COUNT + 1


def test_an_image_with_a_passing_error_is_tried_again_by_each_run(run):
    for _ in range(2):
        again = run(**{"ingest.max_pixels": 100})
        assert again.failed >= COUNT - 1 and again.images == COUNT
    assert counts(run()) == (COUNT, COUNT - 1, 0, 1)


def test_what_the_driver_reads_in_several_slices_is_all_in_the_results(run, photos, tmp_path):
    hidden = ["a/_9.png", "c/_9.png"]  # which Spark's reader passes over
    for name in hidden:
        write_photo(photos / name, 9)
    assert counts(run(reader="spark", **{"partitioning.slice_images": 15})) == (COUNT + 2, COUNT + 1, 1, 0)
    assert {*hidden} < {*names_of(tmp_path / "out")} and len(names_of(tmp_path / "out")) == COUNT + 2


def test_archives_without_images_are_an_error_only_where_there_is_nothing_else(run, photos):
    for number in range(3):
        with zipfile.ZipFile(photos / f"{number}.zip", "w") as archive:
            archive.writestr("notes.txt", "")
    assert run().images == COUNT
    for folder in ("a", "b", "c"):
        shutil.rmtree(photos / folder)
    with pytest.raises(RunError, match="3 archives.*none of the archives has an image"):
        run("other")


def test_the_progress_of_a_later_slice_counts_the_earlier_ones(caplog, monkeypatch):
    caplog.set_level("INFO", "helpers")
    monkeypatch.setattr("helpers.tracking.watching.LOG_SECONDS", 0.0)
    monkeypatch.setattr("helpers.tracking.watching.POLL_SECONDS", 0.01)
    with show_progress(30, lambda: (20, 1), done=10, is_whole=False):
        pass
    assert "20 of 30 images listed so far, 1 failed" in caplog.text and "s left" in caplog.text
