"""New files from Auto Loader as a source.

Only Databricks has it. Here Spark's own stream of files stands in its place, by the name of its format alone. It keeps
a checkpoint too, and unlike Auto Loader never tells of a changed file again. Spark, Delta and the runs are real.
"""

import os
import shutil
import tarfile
from datetime import UTC, datetime
from pathlib import Path

import graphs
import pytest
from delta_spark import session, settings
from deltalake import DeltaTable
from test_sources import NAMES, is_bright, png, write_photos

from helpers import pipeline, temporary
from helpers.errors import ConfigError, HostError, RunError
from helpers.pipeline import arrivals
from helpers.pipeline.arrivals import ARRIVALS, Arrivals, listed_path
from helpers.pipeline.records import read_runs
from helpers.pipeline.results import ResultStore
from helpers.pipeline.runs import Run
from helpers.storage import open_storage
from helpers.storage.interface import Entry

ADLS = "abfss://container@account.dfs.core.windows.net"
ODD_NAMES = ["a b.png", "ä%20.PNG", "x#y.png", "[z]{1}.png", "deep/er/q=1/0.png"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return graphs.brightness(tmp_path_factory.mktemp("brightness")).storage.root


@pytest.fixture
def photos(tmp_path) -> Path:
    return write_photos(tmp_path / "photos")


@pytest.fixture(scope="module")
def finished(delta, model, tmp_path_factory) -> Path:
    """A folder with images in `photos`, and what a run over them has left in `out`."""
    place = tmp_path_factory.mktemp("finished")
    delta(run, write_photos(place / "photos"), model, place / "out")
    shutil.copytree(place / "photos", place / "as they were")
    return place


@pytest.fixture
def begun(finished, tmp_path) -> tuple[Path, Path]:
    """The folder with images as it was, which the results name, and a copy of the output."""
    photos = finished / "photos"
    shutil.rmtree(photos)
    shutil.copytree(finished / "as they were", photos)
    return photos, Path(shutil.copytree(finished / "out", tmp_path / "out"))


# ---------------------------------------------------------------- what runs in the process with Delta


def run(source: Path, model: str, output, **overrides) -> pipeline.RunSummary:
    """A run over what is new, with Spark's own stream of files."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arrivals, "FORMAT", "binaryFile")
        return pipeline.run(session(), f"cloudFiles:{source}", model, str(output), settings(**overrides))


def run_listing(source: Path, model: str, output: Path, **overrides) -> pipeline.RunSummary:
    return pipeline.run(session(), str(source), model, str(output), settings(**overrides))


class Killed(BaseException):
    """The end of a run."""


def run_killed(owner: type, method: str, *arguments) -> None:
    """A run whose driver dies where it would do something."""

    def die(*_, **__):
        raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, method, die)
        with pytest.raises(Killed):
            run(*arguments)


def run_beside_another(*arguments) -> None:
    """A run during which another one's table of arrivals grows."""
    forget = Arrivals.forget

    def grow(self):
        (run,) = self._tables
        rows = session().read.format("delta").load(self._place(run))
        rows.write.format("delta").mode("append").save(self._place(run))
        forget(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Arrivals, "forget", grow)
        run(*arguments)


def run_without_workers(*arguments) -> pipeline.RunSummary:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "_warm_up", lambda _: pytest.fail("there is nothing to do"))
        return run(*arguments)


def run_with_files_taken(*arguments) -> pipeline.RunSummary:
    """A run that does not learn which images have failed, because another one has taken its files."""
    rows = ResultStore.rows

    def take(store, files=None, *others):
        files = list(files)
        if any(file.startswith("_staging/") for file in files):
            patch.setattr(ResultStore, "rows", rows)
            raise FileNotFoundError
        return rows(store, files, *others)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ResultStore, "rows", take)
        return run(*arguments)


def entries(photos: Path, model: str, output: Path, more: list[tuple] = ()) -> list[Entry]:
    """What arrives in a storage that is no file system, beside a table of an earlier run."""
    config = settings()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arrivals, "FORMAT", "binaryFile")
        patch.setattr(arrivals, "LocalStorage", ())
        task = pipeline.make_task(f"cloudFiles:{photos}", model, str(output), config)
        source = Arrivals(session(), task, config)
        if more:
            rows = session().createDataFrame(more, "path string, length long, modified timestamp")
            rows.write.format("delta").save(source._place("20260101T000000-00000000"))
        return list(source.take([]))


def rows_in_catalog(name: str) -> int:
    return session().table(name.removeprefix("table:")).count()


def drop_table(name: str) -> None:
    session().sql(f"DROP TABLE {name.removeprefix('table:')}")


# ---------------------------------------------------------------- what a run left


def rows_of(output: Path) -> dict[str, dict]:
    rows = DeltaTable(output / "results").to_pyarrow_table().to_pylist()
    by_path = {row["path"]: row for row in rows}
    assert len(by_path) == len(rows)
    return by_path


def labels(output: Path) -> dict[str, str | None]:
    rows = rows_of(output).items()
    return {Path(path).name: row["predictions"][0]["label"] if row["predictions"] else None for path, row in rows}


def expected(names: list[str] = NAMES) -> dict[str, str]:
    return {name: "bright" if is_bright(name) else "dark" for name in names}


def keys(output: Path) -> set[tuple[str, int, datetime]]:
    return {(row["path"], row["length"], row["modified"]) for row in rows_of(output).values()}


def waiting(output: Path) -> list[Path]:
    """The tables of arrivals that the next run will read."""
    return [path for path in output.glob(f"{ARRIVALS}/*/*") if path.name != "checkpoint"]


def counts(summary: pipeline.RunSummary) -> tuple[int, int, int, int]:
    return summary.images, summary.ok, summary.failed, summary.skipped


# ---------------------------------------------------------------- new files


def test_a_run_works_on_the_files_that_are_new(delta, model, photos, tmp_path):
    output = tmp_path / "out"
    assert counts(delta(run, photos, model, output)) == (8, 8, 0, 0)
    assert labels(output) == expected() and waiting(output) == []

    nothing = delta(run, photos, model, output)
    assert (counts(nothing), nothing.partitions) == ((0, 0, 0, 0), 0)
    assert len(DeltaTable(output / "results").history()) == 2

    (photos / "0.png").unlink()  # whose row stays
    for name in ("8.png", "9.png"):
        (photos / name).write_bytes(png(is_bright(name)))
    assert counts(delta(run, photos, model, output)) == (2, 2, 0, 0)
    assert labels(output) == expected([*NAMES, "8.png", "9.png"]) and waiting(output) == []
    assert read_runs(str(output))["source"].tolist() == [f"cloudFiles:{photos}"] * 2


def test_a_location_without_files_is_nothing_new(delta, model, tmp_path):
    (tmp_path / "empty").mkdir()
    assert counts(delta(run_without_workers, tmp_path / "empty", model, tmp_path / "out")) == (0, 0, 0, 0)
    with pytest.raises(RunError, match="0 images below"):  # instead of an empty table in the place of the results
        delta(run, tmp_path / "empty", model, tmp_path / "out", resume=False)


def test_the_keys_are_those_of_a_listing(delta, model, photos, tmp_path):
    for name in ODD_NAMES:
        (photos / name).parent.mkdir(parents=True, exist_ok=True)
        (photos / name).write_bytes(png(True))
        os.utime(photos / name, ns=(0, 1_600_000_000_123_456_000))
    for name in (".hidden.png", "a.txt", ".folder/a.png"):
        (photos / name).parent.mkdir(exist_ok=True)
        (photos / name).write_bytes(png(True))
    one, other = tmp_path / "one", tmp_path / "other"
    assert counts(delta(run, photos, model, one)) == (13, 13, 0, 0)
    assert counts(delta(run_listing, photos, model, one)) == (13, 0, 0, 13)
    assert counts(delta(run_listing, photos, model, other)) == (13, 13, 0, 0)
    assert counts(delta(run, photos, model, other)) == (13, 0, 0, 13)
    assert keys(one) == keys(other)


def test_spark_tells_each_file_in_the_order_of_paths_with_its_time(delta, model, photos, tmp_path):
    old = [
        (f"file:{photos}/0.png", 1, datetime(2020, 1, 1, tzinfo=UTC)),
        (f"{photos}/-1.png", 1, datetime(2020, 1, 1, tzinfo=UTC)),
    ]
    first, *others = delta(entries, photos, model, tmp_path / "out", old)
    assert first == Entry(f"{photos}/-1.png", 1, datetime(2020, 1, 1, tzinfo=UTC))
    assert [entry.path for entry in others] == [str(photos / name) for name in NAMES]
    for entry in others:
        status = os.stat(entry.path)
        assert entry.length == status.st_size
        assert entry.modified.timestamp() == pytest.approx(status.st_mtime_ns // 10**6 / 1e3, abs=1e-6)


@pytest.mark.parametrize(
    ("source", "path", "listed"),
    [
        ("/Volumes/a/b/c", "dbfs:/Volumes/a/b/c/d e.png", "/Volumes/a/b/c/d e.png"),
        ("dbfs:/a", "dbfs:/a/b.png", "/dbfs/a/b.png"),
        ("dbfs:/a", "/dbfs/a/b.png", "/dbfs/a/b.png"),
        ("/", "file:/b.png", "/b.png"),
        ("s3://bucket/a/", "s3://bucket/a/%20.png", "s3://bucket/a/%20.png"),
        (ADLS, f"{ADLS}/b.png", f"{ADLS}/b.png"),
        (f"{ADLS}/a", f"{ADLS}/a/b c.png", f"{ADLS}/a/b c.png"),
    ],
)
def test_a_file_has_the_path_that_its_storage_lists(source, path, listed):
    assert listed_path(path, open_storage(source, settings())) == listed


def test_a_file_of_another_location_is_one_clear_error():
    with pytest.raises(RunError, match="tells of /ab/c.png, which is not below /a/; name another --source"):
        listed_path("file:/ab/c.png", open_storage("/a"))


def test_spark_is_told_databricks_names_of_places():
    places = [arrivals._spark_path(open_storage(uri), name) for uri in ("dbfs:/a", "/Volumes/a") for name in ("", "b")]
    assert places == ["dbfs:/a", "dbfs:/a/b", "/Volumes/a", "/Volumes/a/b"]


def test_all_rows_have_come_before_the_first_is_taken():
    rows = iter([(number, "a") for number in range(25_000)])
    taken = temporary.on_disk(rows)
    assert next(rows, None) is None
    assert list(taken) == [(number, "a") for number in range(25_000)]


def test_an_output_below_the_source_is_none_of_it(delta, model, photos):
    output = photos / "out"
    assert counts(delta(run, photos, model, output, pictures=3)) == (8, 8, 0, 0)
    assert len(list((output / "pictures").iterdir())) == 3
    assert counts(delta(run, photos, model, output)) == (0, 0, 0, 0)


def test_members_of_archives_are_images(delta, model, photos, tmp_path):
    with tarfile.open(photos / "a.tar", "w") as archive:
        for name in ("1.png", "2.png"):
            archive.add(photos / name, name)
    assert counts(delta(run, photos, model, tmp_path / "out")) == (10, 10, 0, 0)
    assert counts(delta(run, photos, model, tmp_path / "out")) == (0, 0, 0, 0)


def test_files_come_in_slices(delta, model, photos, tmp_path):
    assert counts(delta(run, photos, model, tmp_path / "out", **{"partitioning.slice_images": 3})) == (8, 8, 0, 0)
    assert labels(tmp_path / "out") == expected()
    commits = DeltaTable(tmp_path / "out/results").history()
    assert [commit["images"] for commit in commits if "images" in commit] == [2, 3, 3]


def test_options_reach_the_stream(delta, model, photos, tmp_path):
    options = {"source.options.pathGlobFilter": "[0-2].png"}
    assert counts(delta(run, photos, model, tmp_path / "out", **options)) == (3, 3, 0, 0)


def test_a_table_of_the_catalog_gets_the_results(delta, model, photos, tmp_path):
    name, staging = "table:arrived", tmp_path / "staging"
    options = {"results.staging": str(staging)}
    assert counts(delta(run, photos, model, name, **options)) == (8, 8, 0, 0)
    (photos / "8.png").write_bytes(png(False))
    assert counts(delta(run, photos, model, name, **options)) == (1, 1, 0, 0)
    assert (delta(rows_in_catalog, name), waiting(staging)) == (9, [])
    assert list(staging.glob(f"{ARRIVALS}/*/checkpoint"))
    # In a new table is nothing of what the checkpoint says has arrived.
    delta(drop_table, name)
    assert counts(delta(run, photos, model, name, **options)) == (9, 9, 0, 0)


# ---------------------------------------------------------------- what has arrived, and is not settled


@pytest.mark.parametrize(("owner", "method"), [(Arrivals, "_present"), (ResultStore, "publish"), (Arrivals, "forget")])
def test_what_has_arrived_for_a_killed_run_is_done_by_the_next(delta, model, begun, owner, method):
    photos, output = begun
    (photos / "8.png").write_bytes(png(False))
    delta(run_killed, owner, method, photos, model, output)
    assert len(waiting(output)) == 1
    (photos / "9.png").write_bytes(png(True))
    done = 1 if method == "_present" else 0  # what else was finished before the end is found
    again = delta(run, photos, model, output)
    assert (again.images, again.ok) == (2, 1 + done)
    assert labels(output) == expected([*NAMES, "8.png", "9.png"]) and waiting(output) == []


def test_a_file_whose_error_may_pass_is_looked_at_again(delta, model, photos, tmp_path):
    output, long = tmp_path / "out", photos / "8.png"
    long.write_bytes(png(False) + b" " * 1000)
    (photos / "9.png").write_bytes(b"no image")
    with tarfile.open(photos / "a.tar", "w") as archive:
        archive.add(long, "long.png")
    limit = {"ingest.max_bytes": 1000}
    assert counts(delta(run, photos, model, output, **limit)) == (11, 8, 3, 0)
    assert counts(delta(run, photos, model, output, **limit)) == (2, 0, 2, 0)
    assert counts(delta(run, photos, model, output)) == (2, 2, 0, 0)
    assert counts(delta(run, photos, model, output)) == (0, 0, 0, 0) and waiting(output) == []
    assert labels(output) == {**expected([*NAMES, "8.png"]), "a.tar#member=long.png": "dark", "9.png": None}


def test_what_arrives_again_beside_what_is_left_is_worked_on_once(delta, model, photos, tmp_path):
    output = tmp_path / "out"
    (photos / "8.png").write_bytes(png(False) + b" " * 1000)
    delta(run, photos, model, output, **{"ingest.max_bytes": 1000})
    for checkpoint in output.glob(f"{ARRIVALS}/*/checkpoint"):
        shutil.rmtree(checkpoint)
    assert counts(delta(run, photos, model, output)) == (9, 1, 0, 8)
    assert labels(output) == expected([*NAMES, "8.png"])


def test_files_of_which_nobody_knows_how_they_went_are_looked_at_again(delta, model, photos, tmp_path):
    output = tmp_path / "out"
    (photos / "8.png").write_bytes(b"no image")
    assert counts(delta(run_with_files_taken, photos, model, output)) == (9, 8, 1, 0)
    assert counts(delta(run, photos, model, output)) == (9, 0, 0, 9) and waiting(output) == []


def test_a_file_that_is_gone_is_not_looked_at_again(delta, model, begun):
    photos, output = begun
    (photos / "8.png").write_bytes(png(False))
    delta(run_killed, Arrivals, "_present", photos, model, output)
    (photos / "8.png").unlink()
    assert counts(delta(run, photos, model, output)) == (1, 0, 1, 0)
    assert "the file is gone" in rows_of(output)[str(photos / "8.png")]["error"] and waiting(output) == []


def test_a_file_that_arrives_again_is_worked_on_if_it_has_changed(delta, model, begun):
    photos, output = begun
    (photos / "0.png").write_bytes(png(True) + b" ")
    shutil.rmtree(output / ARRIVALS)  # as an administrator may, and then everything arrives again
    assert counts(delta(run, photos, model, output)) == (8, 1, 0, 7)
    assert labels(output) == {**expected(), "0.png": "bright"}


def test_a_table_that_grows_meanwhile_stays_for_the_next_run(delta, model, begun):
    photos, output = begun
    (photos / "8.png").write_bytes(png(False))
    delta(run_killed, Arrivals, "forget", photos, model, output)
    delta(run_beside_another, photos, model, output)
    assert len(waiting(output)) == 1
    assert counts(delta(run, photos, model, output)) == (1, 0, 0, 1)
    assert waiting(output) == []


def test_a_table_in_the_making_is_left_alone_for_a_day(delta, model, begun):
    photos, output = begun
    (table,) = (place.with_name("20260101T000000-00000000") for place in output.glob(f"{ARRIVALS}/*/checkpoint"))
    table.mkdir()
    (table / "part-0.parquet").write_bytes(b"")
    assert counts(delta(run, photos, model, output)) == (0, 0, 0, 0) and waiting(output) == [table]
    os.utime(table / "part-0.parquet", (0, 0))
    assert counts(delta(run, photos, model, output)) == (0, 0, 0, 0) and waiting(output) == []


@pytest.mark.parametrize("start", [run, run_listing])
def test_after_a_run_that_starts_over_everything_may_arrive_again(delta, model, begun, start):
    photos, output = begun
    assert counts(delta(start, photos, model, output, resume=False)) == (8, 8, 0, 0)
    assert labels(output) == expected()
    assert bool(list(output.glob(f"{ARRIVALS}/*/checkpoint"))) == (start is run)


def test_without_results_everything_arrives_again(delta, model, begun):
    photos, output = begun
    shutil.rmtree(output / "results")
    assert counts(delta(run, photos, model, output)) == (8, 8, 0, 0)


def test_two_locations_of_one_output_have_a_checkpoint_each(delta, model, begun, tmp_path):
    (photos, output), others = begun, tmp_path / "others"
    others.mkdir()
    (others / "10.png").write_bytes(png(False))
    assert counts(delta(run, others, model, output)) == (1, 1, 0, 0)
    assert counts(delta(run, photos, model, output)) == (0, 0, 0, 0)
    assert labels(output) == expected([*NAMES, "10.png"])


# ---------------------------------------------------------------- what is wrong


def test_a_spark_without_auto_loader_is_one_clear_error(spark, model, photos, tmp_path):
    with pytest.raises(HostError, match=rf"only Databricks has .*NOT_FOUND.*; name {photos} itself"):
        pipeline.run(spark, f"cloudFiles:{photos}", model, str(tmp_path / "out"), settings())
    assert not (tmp_path / "out").exists()


def test_a_table_of_arrivals_that_is_damaged_is_one_clear_error(delta, model, begun):
    photos, output = begun
    (photos / "8.png").write_bytes(png(False))
    delta(run_killed, ResultStore, "publish", photos, model, output)
    (table,) = waiting(output)
    for part in table.glob("*.parquet"):
        part.unlink()
    with pytest.raises(RunError, match=rf"{output}/{ARRIVALS}. If you delete the latter, all files arrive again"):
        delta(run, photos, model, output)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"source.path": "uri"}, "source.path is for tables"),
        ({"source.options.cloudFiles.clientSecret": "abc"}, "options.cloudFiles.clientSecret is a secret.*Unity"),
        ({"source.options.cloudFiles.connectionString": "abc"}, "connectionString is a secret"),
    ],
)
def test_settings_that_do_not_fit_are_told_before_spark_starts(model, photos, tmp_path, values, message):
    with pytest.raises(ConfigError, match=message) as caught:
        pipeline.make_task(f"cloudFiles:{photos}", model, str(tmp_path / "out"), settings(**values))
    assert "abc" not in str(caught.value)


def test_options_are_of_auto_loader_alone(model, photos, tmp_path):
    values = {"source.options": {"cloudFiles.useNotifications": True}}
    assert settings(**values).source.options == {"cloudFiles.useNotifications": "true"}
    with pytest.raises(ConfigError, match="source.options are for Auto Loader: name a source cloudFiles:URI"):
        pipeline.make_task(str(photos), model, str(tmp_path / "out"), settings(**values))
