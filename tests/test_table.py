"""The table of results as others see it: its readers, its history, its files; and what is wrong with a table."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import duckdb
import pandas as pd
import polars
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from cluster import read_results
from deltalake import DeltaTable, write_deltalake
from test_results import keys, publish, stage, table

from helpers import pipeline
from helpers.cli import main
from helpers.config import load_config
from helpers.errors import StorageError
from helpers.pipeline.results import ResultStore
from helpers.pipeline.stages import RESULT_SCHEMA
from helpers.storage import LocalStorage, local, open_storage


@pytest.fixture
def store(tmp_path) -> ResultStore:
    return ResultStore(open_storage(str(tmp_path / "out")))


@pytest.fixture
def changed(store) -> ResultStore:
    """Results of two runs; the second has worked on a changed image again, and on a new one."""
    publish(store, stage(store, "run1", 0, table("a", "b")), stage(store, "run1", 1, table("c")))
    rows = pa.concat_tables([table("a", version=1), table("d", error="the file is empty")])
    publish(store, stage(store, "run2", 0, rows))
    return store


ROWS = [("a", 1), ("b", 0), ("c", 0), ("d", 0)]


def versions(rows: pd.DataFrame) -> list[tuple[str, int]]:
    """Path and version of every row of a table that was read by whatever library."""
    return sorted(zip(rows["path"], pd.to_datetime(rows["modified"], utc=True).dt.microsecond, strict=True))


# ---------------------------------------------------------------- readers


def test_every_reader_of_delta_sees_each_image_once(changed):
    uri, folder = Path(changed.location).as_uri(), DeltaTable(Path(changed.location).as_uri())
    assert versions(folder.to_pandas()) == ROWS
    assert versions(polars.read_delta(uri).to_pandas()) == ROWS
    results = folder.to_pyarrow_dataset()  # noqa: F841 - named in the query
    assert versions(duckdb.sql("select path, modified from results").df()) == ROWS


def test_every_reader_of_plain_parquet_sees_each_image_once_when_removed_files_are_deleted(changed, spark):
    assert pd.read_parquet(changed.location)["path"].tolist().count("a") == 2
    changed.vacuum(0)
    assert versions(pd.read_parquet(changed.location)) == ROWS
    assert versions(pq.read_table(changed.location).to_pandas()) == ROWS
    assert versions(polars.read_parquet(f"{changed.location}/*.parquet").to_pandas()) == ROWS
    assert versions(duckdb.sql(f"select * from '{changed.location}/*.parquet'").df()) == ROWS
    assert versions(spark.read.parquet(changed.location).toPandas()) == ROWS


def test_spark_reads_what_the_table_says_whatever_else_is_in_its_folder(changed, spark):
    config, output = load_config("local"), changed.storage.root
    assert versions(pipeline.read_results(spark, output, config).toPandas()) == ROWS
    earlier = pipeline.read_results(spark, output, config, version=1)
    assert versions(earlier.toPandas()) == [("a", 0), ("b", 0), ("c", 0)]
    assert earlier.schema == spark.createDataFrame([], earlier.schema).schema


def test_spark_reads_results_without_rows(store, spark):
    publish(store)
    assert pipeline.read_results(spark, store.storage.root, load_config("local")).count() == 0


# ---------------------------------------------------------------- history


def test_the_history_is_the_list_of_the_runs_that_changed_the_results(changed):
    changed.vacuum(0)  # is in the table's history too, and no run
    second, first = changed.history()
    assert (first["run"], first["images"], first["ok"], first["failed"], first["version"]) == ("run1", 3, 3, 0, 1)
    assert (second["run"], second["images"], second["ok"], second["failed"], second["version"]) == ("run2", 2, 1, 1, 2)
    assert first["models"] == "net@1"
    assert datetime.now(UTC) - timedelta(minutes=5) < first["time"] <= second["time"] <= datetime.now(UTC)


def test_the_command_line_prints_the_history(changed, capsys):
    assert main(["history", changed.storage.root]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == ["time", "run", "models", "images", "ok", "failed", "seconds", "version"]
    assert [(line[-7], line[-5], line[-1]) for line in lines[1:]] == [("run2", "2", "2"), ("run1", "3", "1")]


def test_a_history_that_is_not_there_is_one_line_that_says_so(tmp_path, capsys):
    assert main(["history", str(tmp_path)]) == 2
    assert f"error: no run has results in {tmp_path}/results" in capsys.readouterr().err


def test_an_earlier_version_is_read_until_its_files_are_deleted(changed):
    before = read_results(changed.storage.root, 1).sort_by("path")
    assert before.equals(table("a", "b", "c")) and read_results(changed.storage.root).num_rows == 4
    changed.vacuum(0)
    with pytest.raises(FileNotFoundError):
        read_results(changed.storage.root, 1)
    with pytest.raises(StorageError, match="out/results"):
        changed.files(99)


# ---------------------------------------------------------------- files


@pytest.mark.parametrize("days", [7, 1e-4, 0])
def test_removed_files_stay_as_long_as_they_should(changed, days):
    before = set(Path(changed.location).glob("*.parquet"))
    changed.vacuum(days)
    deleted = before - set(Path(changed.location).glob("*.parquet"))
    assert len(deleted) == (0 if days >= 1 else 1)
    assert keys(changed) == ROWS


def test_nothing_is_committed_where_there_is_nothing_to_delete(changed):
    changed.vacuum(0)
    version = changed.look().version
    changed.vacuum(0)
    assert changed.look().version == version


def test_the_log_says_what_is_in_each_file(changed):
    adds = pa.table(DeltaTable(Path(changed.location).as_uri()).get_add_actions(flatten=True)).to_pylist()
    found = {(add["min.path"], add["max.path"], add["num_records"], add["null_count.error"]) for add in adds}
    assert found == {("b", "b", 1, 1), ("c", "c", 1, 1), ("a", "d", 2, 1)}
    for add in adds:
        assert add["size_bytes"] == Path(changed.location, add["path"]).stat().st_size
        assert pq.read_table(Path(changed.location, add["path"])).num_rows == add["num_records"]


def test_on_a_mount_without_hard_links_the_table_is_written_all_the_same(changed, monkeypatch):
    """Databricks' mounts lack them, and so does this process from here on."""
    root = changed.storage.root
    monkeypatch.setattr(local, "MOUNTS", (f"{root}/",))
    mounted = ResultStore(LocalStorage(root))
    assert mounted.storage.delta_table("results")[1] == {"allow_unsafe_rename": "true"}
    publish(mounted, stage(mounted, "run3", 0, table("a", version=2)))
    assert keys(changed) == [("a", 2), *ROWS[1:]]


def test_a_table_that_its_owner_has_compacted_is_read_and_changed_as_before(changed):
    DeltaTable(Path(changed.location).as_uri()).optimize.compact()
    changed.resume("net@1")
    assert changed.look().rows.num_rows == 4 and len(changed.files()) == 1
    publish(changed, stage(changed, "run3", 0, table("c", version=3)))
    assert keys(changed) == [("a", 1), ("b", 0), ("c", 3), ("d", 0)]
    changed.vacuum(0)
    assert versions(pd.read_parquet(changed.location)) == [("a", 1), ("b", 0), ("c", 3), ("d", 0)]


@pytest.mark.parametrize("name", ["a%20b", "a\\b"])
def test_a_folder_that_the_library_takes_for_another_is_one_clear_error(tmp_path, name):
    with pytest.raises(StorageError, match="a table cannot lie below.*name another location"):
        ResultStore(open_storage(str(tmp_path / name))).check()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["with space", "100%", "hash#1", "question?", "grün 日本 🙂", "*star[1]"])
def test_a_table_may_lie_in_folders_of_any_other_name(tmp_path, name):
    store = ResultStore(open_storage(str(tmp_path / name)))
    publish(store, stage(store, "run1", 0, table("a")))
    assert keys(store) == [("a", 0)] and {path.name for path in (tmp_path / name).iterdir()} == {"results"}


# ---------------------------------------------------------------- what is wrong with a table


def damage(log: Path) -> None:
    (log / "00000000000000000001.json").write_text("{ half")


def lose_a_commit(log: Path) -> None:
    (log / "00000000000000000001.json").unlink()


@pytest.mark.parametrize("harm", [damage, lose_a_commit])
def test_a_damaged_log_is_one_clear_error(changed, harm):
    harm(Path(changed.location, "_delta_log"))
    for action in (changed.look, changed.check, changed.history, changed.files):
        with pytest.raises(StorageError, match="out/results: its log cannot be read; restore _delta_log") as error:
            action()
        assert "\n" not in str(error.value)


def test_a_table_of_other_columns_is_one_clear_error_and_stays(store):
    theirs = pa.table({"name": ["thesis"]})
    write_deltalake(Path(store.location).as_uri(), theirs)
    with pytest.raises(StorageError, match=r"is a table of other columns \(name\).*another --output"):
        store.look()
    assert DeltaTable(Path(store.location).as_uri()).to_pyarrow_table().equals(theirs)


def test_the_columns_of_the_table_are_the_contracts(store):
    publish(store)
    assert pa.schema(DeltaTable(Path(store.location).as_uri()).schema().to_arrow()).equals(RESULT_SCHEMA)
