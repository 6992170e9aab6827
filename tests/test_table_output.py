"""Results in a table of Spark's catalog: the real Delta Lake, with the session's catalog in Unity Catalog's place."""

import csv
import json
import os
import re
import shutil
import tarfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import graphs
import pyarrow as pa
import pytest
from cluster import call
from delta_spark import session, settings
from deltalake import DeltaTable
from test_report import data_of
from test_sources import NAMES, contents, is_bright, png, write_photos

from helpers import pipeline
from helpers.errors import ConfigError, RunError, StorageError
from helpers.pipeline.catalog import CatalogStore, open_output, open_results
from helpers.pipeline.records import read_runs
from helpers.pipeline.results import ResultStore


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return graphs.brightness(tmp_path_factory.mktemp("brightness")).storage.root


@pytest.fixture
def photos(tmp_path) -> Path:
    return write_photos(tmp_path / "photos")


@pytest.fixture
def name(request) -> str:
    """A table of the test's own."""
    return "table:" + re.sub(r"\W+", "_", request.node.name)[-60:]


# ---------------------------------------------------------------- what runs in the process with Delta


def run(source: Path, model: str, output: str, staging: Path, **overrides) -> pipeline.RunSummary:
    config = settings(**{"results.staging": str(staging), **overrides})
    return pipeline.run(session(), str(source), model, output, config)


def run_while_the_table_is_made(source: Path, model: str, output: str, staging: Path) -> pipeline.RunSummary:
    """For a second the table's folder has a file and no log, as while another run makes the table."""
    begun = place_of(output)
    begun.mkdir()
    (begun / "unfinished").touch()
    threading.Timer(1, shutil.rmtree, [begun]).start()
    return run(source, model, output, staging)


def rows_of(output: str, version: int | None = None) -> list[tuple]:
    """As of `Table`, by Spark."""
    return labeled(pipeline.read_results(session(), output, settings(), version).toArrow())


def place_of(output: str) -> Path:
    """Where a table lies."""
    warehouse = session().conf.get("spark.sql.warehouse.dir").removeprefix("file:")
    return Path(warehouse, output.removeprefix("table:").lower())


def run_frame(model: str, output: str, staging: Path) -> pipeline.RunSummary:
    config = settings(**{"results.staging": str(staging), "source.content": "bytes", "source.key": "id"})
    config = config.model_copy(update={"source": config.source.model_copy(update={"keep": ("number",)})})
    return pipeline.run_frame(session().createDataFrame(contents()), model, output, config)


def delete_row(output: str, file: str) -> None:
    session().sql(f"DELETE FROM {output.removeprefix('table:')} WHERE path LIKE '%/{file}'")


def copy(output: str, staging: Path) -> None:
    """A copy of the table whose reader dies."""
    store = open_results(session(), output, settings(**{"results.staging": str(staging)}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ResultStore, "unstage", lambda *_: None)
        with store.as_files():
            pass


class Killed(BaseException):
    """The end of a run."""


def run_killed(when: str, *arguments) -> None:
    """A run whose driver dies before or after it has merged its results."""
    publish = CatalogStore.publish

    def die(store, work):
        if when == "after":
            publish(store, work)
        raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CatalogStore, "publish", die)
        patch.setattr(ResultStore, "unstage", die)
        with pytest.raises(Killed):
            run(*arguments)


def run_at_once(sources: list[Path], *arguments) -> list[pipeline.RunSummary | Exception]:
    """Runs that find the same table when they begin, and merge in the same moment."""
    begun, done = threading.Barrier(len(sources)), threading.Barrier(len(sources))
    resume, publish, results = CatalogStore.resume, CatalogStore.publish, []

    def resume_together(store, *models):
        resume(store, *models)
        begun.wait(100)

    def publish_together(store, work):
        done.wait(100)
        return publish(store, work)

    def start(source: Path):
        try:
            results.append(run(source, *arguments))
        except Exception as error:
            results.append(error)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CatalogStore, "resume", resume_together)
        patch.setattr(CatalogStore, "publish", publish_together)
        threads = [threading.Thread(target=start, args=(source,)) for source in sources]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return results


def make_table(output: str, columns: str, using: str) -> None:
    session().sql(f"CREATE TABLE {output.removeprefix('table:')} ({columns}) USING {using}")


def copy_table(source: str, output: str) -> None:
    place = shutil.copytree(place_of(source), place_of(output))
    session().sql(f"CREATE TABLE {output.removeprefix('table:')} USING DELTA LOCATION '{place}'")


# ---------------------------------------------------------------- what a run left


def labeled(rows: pa.Table) -> list[tuple]:
    """File name, label and error of every row."""
    found = rows.select(["path", "predictions", "error"]).to_pylist()
    label = [row["predictions"][0]["label"] if row["predictions"] else None for row in found]
    return sorted((Path(row["path"]).name, of, row["error"]) for row, of in zip(found, label, strict=True))


@dataclass(frozen=True)
class Table:
    """The test's table as Delta's own library has it, in a fraction of Spark's time."""

    place: Path

    def rows(self) -> list[tuple]:
        return labeled(DeltaTable(self.place).to_pyarrow_table())

    def versions(self) -> list[str]:
        """What has changed the table, the first first."""
        return [version["operation"] for version in DeltaTable(self.place).history()][::-1]


@pytest.fixture
def table(delta, name) -> Table:
    return Table(delta(place_of, name))


@pytest.fixture(scope="module")
def left(delta, model, tmp_path_factory) -> Path:
    """Images in `photos`, and what is beside the tables of two runs over them: one has finished, one was killed."""
    place = tmp_path_factory.mktemp("left")
    photos = write_photos(place / "photos")
    shutil.copytree(photos, place / "as they were")
    delta(run, photos, model, "table:finished", place / "finished")
    delta(run_killed, "before", photos, model, "table:killed", place / "killed")
    return place


@pytest.fixture
def after(delta, left, tmp_path, name) -> Callable[[str], tuple[Path, Path]]:
    """Has the test's table as one of these runs has left it; returns the images and the staging location."""

    def begin(state: str) -> tuple[Path, Path]:
        delta(copy_table, f"table:{state}", name)
        shutil.rmtree(left / "photos")
        photos = shutil.copytree(left / "as they were", left / "photos")
        return photos, shutil.copytree(left / state, tmp_path / "staging")

    return begin


# ---------------------------------------------------------------- a run


LABELS = [(name, "bright" if is_bright(name) else "dark", None) for name in NAMES]


def test_a_run_makes_a_table_and_the_next_one_changes_what_is_new(delta, model, photos, tmp_path, name, table):
    staging = tmp_path / "staging"
    first = delta(run, photos, model, name, staging, pictures=3)
    assert (first.images, first.ok, first.failed, first.results) == (8, 8, 0, name)
    assert delta(rows_of, name) == table.rows() == LABELS
    assert table.versions() == ["CREATE TABLE", "MERGE"]

    # Beside the table: no copy of its rows, and all else that a run leaves.
    assert {path.name for path in staging.iterdir()} == {"pictures", "report", "runs"}
    assert len(list((staging / "pictures").iterdir())) == 3
    assert read_runs(str(staging))["images"].tolist() == [8]

    nothing = delta(run, photos, model, name, staging)
    assert (nothing.skipped, nothing.partitions, len(table.versions())) == (8, 0, 2)

    (photos / "0.png").write_bytes(png(True) + b" ")
    (photos / "8.png").write_bytes(b"no image")
    again = delta(run, photos, model, name, staging)
    assert (again.ok, again.failed, again.skipped) == (1, 1, 7)
    rows = delta(rows_of, name)
    assert [row[:2] for row in rows] == [("0.png", "bright"), *(row[:2] for row in LABELS[1:]), ("8.png", None)]
    assert "not an image" in rows[-1][2] and table.versions()[2:] == ["MERGE"]
    assert delta(rows_of, name, 1) == LABELS

    answer = delta(call, "history", name)
    assert answer.returncode == 0
    lines = [line.split() for line in answer.stdout.splitlines()]
    assert [(line[-5:-2], line[-1]) for line in lines[1:]] == [(["2", "1", "1"], "2"), (["8", "8", "0"], "1")]


def test_the_table_has_the_kept_columns_of_a_dataframe(delta, model, tmp_path, name, table):
    name = name.replace("table:", "table:spark_catalog.default.")
    assert delta(run_frame, model, name, tmp_path).ok == 8
    rows = DeltaTable(table.place).to_pyarrow_table().to_pylist()
    assert {row["path"]: row["number"] for row in rows} == {n: number for number, n in enumerate(NAMES)}
    assert delta(run_frame, model, name, tmp_path).skipped == 8


def test_the_page_of_a_run_is_of_its_images_and_the_commands_read_the_whole_table(delta, model, after, tmp_path, name):
    photos, staging = after("finished")
    (photos / "8.png").write_bytes(png(True))
    delta(run, photos, model, name, staging)
    page, place = staging / "report" / "index.html", ("--set", f"results.staging={staging}")
    data = data_of(page)
    assert data["title"] == name and data["counted"].startswith("The newest 1 ")

    answer = delta(call, "report", name, *place)
    assert answer.returncode == 0 and json.loads(answer.stdout) == {"report": str(page)}
    data = data_of(page)
    assert data["counted"].startswith("All 9 images") and dict(data["tiles"][:1]) == {"images": 9}
    assert all(item["thumbnail"] for item in data["sample"]["items"]) and len(data["runs"]) == 2

    answer = delta(call, "results", name, "--format", "csv", "--to", str(tmp_path / "all.csv"), *place)
    assert answer.returncode == 0 and json.loads(answer.stdout)["predictions"] == 9
    with (tmp_path / "all.csv").open(newline="") as file:
        lines = {Path(line["path"]).name: line["label"] for line in csv.DictReader(file)}
    assert lines == {**{name: label for name, label, _ in LABELS}, "8.png": "bright"}
    assert not list(staging.glob("_staging/*"))  # the copies that both have read


def test_a_copy_that_was_left_is_no_result_and_is_deleted_a_day_later(delta, model, after, name, table):
    photos, staging = after("finished")
    delta(copy, name, staging)
    (photos / "0.png").unlink()
    delta(delete_row, name, "0.png")
    assert delta(run, photos, model, name, staging).skipped == 7
    assert table.rows() == LABELS[1:]
    files = list(staging.glob("_staging/*/*"))
    assert len(files) > 1
    yesterday = (datetime.now(UTC) - timedelta(days=1.1)).timestamp()
    for file in files:
        os.utime(file, (yesterday, yesterday))
    delta(run, photos, model, name, staging)
    assert not list(staging.glob("_staging/*/*"))


@pytest.mark.parametrize("words", [["report"], ["results", "--format", "csv", "--to", "all.csv"]])
def test_a_table_that_is_not_there_is_one_clear_error(delta, tmp_path, name, words):
    answer = delta(call, words[0], name, *words[1:], "--set", f"results.staging={tmp_path}")
    assert answer.returncode == 2 and len(answer.stderr.splitlines()) == 1
    assert f"Spark cannot use the table {name}" in answer.stderr
    assert not list(tmp_path.glob("_staging/*"))


def test_rows_of_members_that_are_gone_go_in_the_same_commit(delta, model, photos, tmp_path, name, table):
    def pack(names: list[str]) -> None:
        with tarfile.open(photos / "a.tar", "w") as archive:
            for member in names:
                archive.add(photos / "1.png", member)

    pack(["x.png", "y.png"])
    assert delta(run, photos, model, name, tmp_path / "staging").ok == 10
    pack(["y.png", "z.png", "zz.png"])
    assert delta(run, photos, model, name, tmp_path / "staging").ok == 3
    members = [path for path, *_ in table.rows() if "member" in path]
    assert members == [f"a.tar#member={member}.png" for member in ("y", "z", "zz")]
    assert table.versions() == ["CREATE TABLE", "MERGE", "MERGE"]


# ---------------------------------------------------------------- runs that die, start over, or meet


@pytest.mark.parametrize("when", ["before", "after"])
def test_what_a_killed_run_has_finished_is_kept_and_nothing_is_doubled(
    delta, model, photos, tmp_path, name, when, table
):
    staging = tmp_path / "staging"
    delta(run_killed, when, photos, model, name, staging)
    assert len(table.rows()) == (8 if when == "after" else 0)
    assert len(list(staging.glob("_staging/*/*.parquet"))) > 0
    (photos / "9.png").write_bytes(png(True))
    again = delta(run, photos, model, name, staging)
    assert (again.ok, again.skipped) == (1, 8)
    assert table.rows() == [*LABELS, ("9.png", "bright", None)]
    # The rows that are there already are merged no second time.
    assert table.versions() == ["CREATE TABLE", "MERGE", "MERGE"]


def test_an_old_result_that_a_slow_run_leaves_replaces_no_newer_one(delta, model, after, tmp_path, name, table):
    photos, staging = after("killed")
    late = tmp_path / "late"
    (staging / "_staging").rename(late)  # a task that has not ended yet
    (photos / "0.png").write_bytes(png(True) + b" ")
    delta(run, photos, model, name, staging)
    late.rename(staging / "_staging")
    again = delta(run, photos, model, name, staging)
    assert (again.ok, again.skipped) == (0, 8)
    assert table.rows() == [("0.png", "bright", None), *LABELS[1:]]
    assert table.versions() == ["CREATE TABLE", "MERGE"]


def test_what_a_killed_run_has_left_is_deleted_a_day_later(delta, model, after, name):
    photos, staging = after("killed")
    delta(run, photos, model, name, staging)
    files = list(staging.glob("_staging/*/*"))
    assert files
    yesterday = (datetime.now(UTC) - timedelta(days=1.1)).timestamp()
    for file in files:
        os.utime(file, (yesterday, yesterday))
    delta(run, photos, model, name, staging)
    assert not list(staging.glob("_staging/*/*"))


def test_a_run_that_starts_over_replaces_the_whole_table_in_one_commit(delta, model, after, name, table):
    photos, staging = after("finished")
    (photos / "8.png").write_bytes(png(True))
    delta(run_killed, "before", photos, model, name, staging)
    for gone in ("0.png", "1.png", "8.png"):
        (photos / gone).unlink()
    over = delta(run, photos, model, name, staging, resume=False)
    assert (over.ok, over.skipped) == (6, 0)
    assert table.rows() == LABELS[2:]
    assert table.versions() == ["CREATE TABLE", "MERGE", "MERGE"]
    assert delta(run, photos, model, name, staging).skipped == 6
    assert table.rows() == LABELS[2:]  # what the killed run had staged does not come back


def test_of_two_runs_that_merge_at_once_each_image_has_one_row(delta, model, photos, tmp_path, name, table):
    summaries = delta(run_at_once, [photos] * 2, model, name, tmp_path / "staging")
    assert [getattr(summary, "ok", summary) for summary in summaries] == [8, 8]
    assert table.rows() == LABELS


def test_a_table_that_another_run_is_making_is_waited_for(delta, model, photos, tmp_path, name, table):
    assert delta(run_while_the_table_is_made, photos, model, name, tmp_path / "staging").ok == 8
    assert table.rows() == LABELS


# ---------------------------------------------------------------- what is wrong with a table


def test_results_of_another_model_are_refused(delta, bundle_uri, after, name):
    photos, staging = after("finished")
    with pytest.raises(RunError, match="holds results of brightness@.*another --output"):
        delta(run, photos, bundle_uri, name, staging)


def test_a_table_of_other_columns_is_one_clear_error(delta, model, photos, tmp_path, name):
    delta(make_table, name, "path string, thesis string", "delta")
    with pytest.raises(RunError, match=r"is a table of other columns \(path, thesis\).*another --output"):
        delta(run, photos, model, name, tmp_path / "staging")


def test_a_spark_without_delta_is_one_clear_error_before_the_work(spark, model, photos, tmp_path):
    with pytest.raises(RunError, match="Spark cannot use the table table:results: .*it needs Delta Lake"):
        run_here(spark, photos, model, tmp_path)
    assert not list(tmp_path.glob("staging/_staging/*/*.parquet"))


def run_here(spark, photos: Path, model: str, tmp_path: Path) -> pipeline.RunSummary:
    config = settings(**{"results.staging": str(tmp_path / "staging")})
    return pipeline.run(spark, str(photos), model, "table:results", config)


@pytest.mark.parametrize("name", ["", "a.b.c.d", "a b", "a;drop table b", "`{rows}`", "a..b"])
def test_a_name_that_is_none_is_one_clear_error(name):
    with pytest.raises(ConfigError, match="names no table: write table:NAME"):
        open_output(f"table:{name}", settings())


def test_staging_is_below_the_results_unless_it_is_set(tmp_path):
    assert open_output("table:main.a.`b c`", settings(**{"paths.results": "/x"})).root == "/x/main.a.b c"
    assert open_output("table:a", settings(**{"results.staging": "/y"})).root == "/y"
    assert isinstance(open_results(None, str(tmp_path), settings()), ResultStore)


def test_a_staged_file_that_is_damaged_is_one_clear_error(delta, model, after, name):
    photos, staging = after("killed")
    next(staging.glob("_staging/*/*.parquet")).write_bytes(b"PAR1")
    with pytest.raises(StorageError, match="holds no results that can be read"):
        delta(run, photos, model, name, staging)
