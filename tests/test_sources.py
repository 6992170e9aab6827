"""Sources that are tables: of the catalog, at a location, or a DataFrame; paths or bytes, and the columns kept."""

import json
import subprocess
import sys
import tarfile
from datetime import UTC, date, datetime
from decimal import Decimal
from pathlib import Path

import cv2
import graphs
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from cluster import read_results
from deltalake import DeltaTable, write_deltalake

from helpers import pipeline
from helpers.cli import main
from helpers.config import PROJECT, Config, load_config
from helpers.errors import ConfigError, RunError, StorageError
from helpers.options import StorageOptions
from helpers.pipeline.reading import read_parquet
from helpers.pipeline.records import read_runs
from helpers.pipeline.results import ResultStore
from helpers.pipeline.sources import _delta_files, open_files
from helpers.pipeline.task import KeptColumns
from helpers.storage import open_storage
from helpers.storage.uris import UriStorage

NAMES = [f"{number}.png" for number in range(8)]
DAY = datetime(2026, 1, 1, tzinfo=UTC)


def settings(**overrides) -> Config:
    values = {"spark.master": "local[2]", "pictures": 0, "report": 0, "postprocess.top_k": 1}
    return load_config("local", **{**values, **overrides})


def png(is_bright: bool) -> bytes:
    return cv2.imencode(".png", np.full((9, 12, 3), 220 if is_bright else 20, np.uint8))[1].tobytes()


def is_bright(name: str) -> bool:
    """Every second image is."""
    return int(Path(name).stem) % 2 == 1


def write_photos(folder: Path) -> Path:
    """A folder with the images."""
    folder.mkdir()
    for name in NAMES:
        (folder / name).write_bytes(png(is_bright(name)))
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return graphs.brightness(tmp_path_factory.mktemp("brightness")).storage.root


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder with images and, beside them, a Parquet file that names them."""
    for name in NAMES:
        place = tmp_path / "set" / "images" / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(png(is_bright(name)))
    write_names(tmp_path / "set", [f"images/{name}" for name in NAMES])
    return tmp_path / "set"


def write_names(folder: Path, paths: list[str | None]) -> None:
    numbers = list(range(len(paths)))
    pq.write_table(pa.table({"uri": paths, "number": numbers, "label": list(map(str, numbers))}), folder / "a.parquet")


def contents(names: list[str] = NAMES, **columns) -> pa.Table:
    """A table of bytes."""
    values = {"id": names, "bytes": [png(is_bright(name)) for name in names], "number": range(len(names))}
    return pa.table({**values, **columns})


BYTES = {"source.content": "bytes", "source.key": "id", "source.keep": ["number"]}


def rows_of(output: Path) -> dict[str, dict]:
    rows = read_results(output).to_pylist()
    by_path = {row["path"]: row for row in rows}
    assert len(by_path) == len(rows)
    return by_path


def labels(rows: dict[str, dict]) -> dict[str, bool | None]:
    """Whether each image is bright, by the model."""
    return {path: row["predictions"] and row["predictions"][0]["label"] == "bright" for path, row in rows.items()}


# ---------------------------------------------------------------- rows that name files


def test_a_parquet_file_names_images_whose_rows_keep_what_they_are_told_to(spark, model, folder, tmp_path):
    config = settings(**{"source.path": "uri", "source.keep": ["number", "label"]})
    summary = pipeline.run(spark, str(folder / "a.parquet"), model, str(tmp_path / "out"), config)
    assert (summary.images, summary.ok, summary.failed, summary.skipped) == (8, 8, 0, 0)
    rows = rows_of(tmp_path / "out")
    assert labels(rows) == {f"images/{name}": is_bright(name) for name in NAMES}
    for name in NAMES:
        row, file = rows[f"images/{name}"], (folder / "images" / name).stat()
        assert (row["number"], row["label"]) == (int(Path(name).stem), Path(name).stem)
        assert (row["length"], row["width"], row["height"]) == (file.st_size, 12, 9)
        assert row["modified"].timestamp() == pytest.approx(file.st_mtime, abs=1e-5)
    results = pipeline.read_results(spark, str(tmp_path / "out"), config)
    assert results.columns[-3:] == ["model", "number", "label"] and results.where("number = 3").count() == 1

    # A file that has changed, one that is new, and nothing else.
    (folder / "images/2.png").write_bytes(png(True) + b" ")
    (folder / "images/9.png").write_bytes(png(True))
    write_names(folder, [f"images/{name}" for name in [*NAMES, "9.png"]])
    again = pipeline.run(spark, str(folder / "a.parquet"), model, str(tmp_path / "out"), config)
    assert (again.images, again.ok, again.skipped) == (9, 2, 7)
    rows = rows_of(tmp_path / "out")
    assert labels(rows) == {f"images/{n}": is_bright(n) or n == "2.png" for n in [*NAMES, "9.png"]}
    assert rows["images/9.png"]["number"] == 8 and rows["images/2.png"]["number"] == 2

    other = settings(**{"source.path": "uri", "source.keep": ["label"]})
    with pytest.raises(StorageError, match=r"a table of other columns.*number, label.*another --output"):
        pipeline.run(spark, str(folder / "a.parquet"), model, str(tmp_path / "out"), other)


def test_a_row_that_names_no_image_is_an_error_row_with_its_kept_columns(spark, model, folder, tmp_path):
    good, away = "images/1.png", str(folder / "images/3.png")
    bad = {"images/none.png": "the file is gone", "ftp://host/a.png": "ftp: locations cannot be opened"}
    bad |= {"http://nowhere.invalid/a.png": "there is no such host", str(folder): "this is a directory"}
    write_names(folder, [good, None, *bad, None, away, f"file://{folder}/images/5.png"])
    config = settings(**{"source.path": "uri", "source.keep": ["number"]})
    summary = pipeline.run(spark, str(folder), model, str(tmp_path / "out"), config)
    assert (summary.images, summary.ok, summary.failed) == (9, 3, 6)
    rows = rows_of(tmp_path / "out")
    assert all(rows[path]["error"] is None for path in (good, away, f"file://{folder}/images/5.png"))
    for path, why in bad.items():
        assert why in rows[path]["error"], rows[path]["error"]
    nameless = [rows["#null=1"], rows["#null=2"]]
    assert {row["error"] for row in nameless} == {"the row has no path"}
    assert {row["number"] for row in nameless} == {1, 6}
    assert [rows[path]["number"] for path in (good, *bad, away)] == [0, 2, 3, 4, 5, 7]


def test_a_relative_path_without_a_place_to_begin_is_an_error_row(spark, model, folder, tmp_path):
    frame = spark.createDataFrame(pa.table({"uri": ["images/1.png", str(folder / "images/2.png")]}))
    pipeline.run_frame(frame, model, str(tmp_path / "out"), settings(**{"source.path": "uri"}))
    rows = rows_of(tmp_path / "out")
    assert "source.root" in rows["images/1.png"]["error"] and rows[str(folder / "images/2.png")]["error"] is None
    rooted = settings(**{"source.path": "uri", "source.root": str(folder)})
    again = pipeline.run_frame(frame, model, str(tmp_path / "out"), rooted)
    assert (again.ok, again.failed, again.skipped) == (1, 0, 1)
    assert rows_of(tmp_path / "out")["images/1.png"]["error"] is None


def test_the_members_of_an_archive_that_a_row_names_have_the_rows_kept_columns(spark, model, folder, tmp_path):
    with tarfile.open(folder / "shard.tar", "w") as archive:
        for name in NAMES[:3]:
            archive.add(folder / "images" / name, name)
    write_names(folder, ["images/7.png", "shard.tar"])
    config = settings(**{"source.path": "uri", "source.keep": ["label"]})
    summary = pipeline.run(spark, str(folder / "a.parquet"), model, str(tmp_path / "out"), config)
    assert (summary.images, summary.ok) == (4, 4)
    found = {path: row["label"] for path, row in rows_of(tmp_path / "out").items()}
    assert found == {"images/7.png": "0", **{f"shard.tar#member={name}": "1" for name in NAMES[:3]}}


def test_images_that_spark_reads_have_their_kept_columns_too(spark, model, folder, tmp_path):
    """One of them is hidden to Spark's reader, and the driver reads it."""
    paths = [str(folder / "images" / name) for name in ["_8.png", *NAMES]]
    Path(paths[0]).write_bytes(png(True))
    write_names(folder, paths)
    config = settings(reader="spark", **{"source.path": "uri", "source.keep": ["number"]})
    summary = pipeline.run(spark, str(folder / "a.parquet"), model, str(tmp_path / "out"), config)
    assert (summary.images, summary.ok) == (9, 9)
    assert {path: row["number"] for path, row in rows_of(tmp_path / "out").items()} == dict(
        zip(paths, range(9), strict=True)
    )


@pytest.mark.spark
def test_one_table_names_files_of_several_storages(here, model, folder, tmp_path, s3_settings, s3_root):
    open_storage(s3_root, settings(**s3_settings)).write("far.png", png(True))
    local = str(folder / "images/2.png")
    write_names(folder, [f"{s3_root}/far.png", local, f"{s3_root}/none.png"])
    config = settings(**{"source.path": "uri"}, **s3_settings)
    summary = pipeline.run(here, str(folder), model, str(tmp_path / "out"), config)
    assert (summary.ok, summary.failed) == (2, 1)
    rows = rows_of(tmp_path / "out")
    assert labels(rows) == {f"{s3_root}/far.png": True, local: False, f"{s3_root}/none.png": None}
    assert "the file is gone" in rows[f"{s3_root}/none.png"]["error"]


# ---------------------------------------------------------------- rows that hold bytes


def test_a_dataframe_of_bytes_is_a_source(spark, model, tmp_path):
    summary = pipeline.run_frame(spark.createDataFrame(contents()), model, str(tmp_path), settings(**BYTES))
    assert (summary.images, summary.ok, summary.failed) == (8, 8, 0)
    rows = rows_of(tmp_path)
    assert labels(rows) == {name: is_bright(name) for name in NAMES}
    assert all(rows[name]["number"] == number for number, name in enumerate(NAMES))
    assert all(row["length"] == len(png(is_bright(name))) for name, row in rows.items())
    (run,) = read_runs(str(tmp_path)).to_dict("records")
    assert run["images"] == 8 and run["config"]["source"]["content"] == "bytes"
    assert run["source"] == "a DataFrame"

    # What has a row is not asked for again, whatever its bytes are now.
    more = contents([*NAMES, "8.png", "9.png"])
    again = pipeline.run_frame(spark.createDataFrame(more), model, str(tmp_path), settings(**BYTES))
    assert (again.images, again.ok, again.skipped) == (10, 2, 8)
    assert labels(rows_of(tmp_path)) == {name: is_bright(name) for name in [*NAMES, "8.png", "9.png"]}
    nothing = pipeline.run_frame(spark.createDataFrame(more), model, str(tmp_path), settings(**BYTES))
    assert (nothing.images, nothing.skipped, nothing.partitions) == (10, 10, 0)

    # A run that starts over has all of them.
    over = pipeline.run_frame(spark.createDataFrame(more), model, str(tmp_path), settings(resume=False, **BYTES))
    assert over.ok == 10 and len(rows_of(tmp_path)) == 10


def test_bytes_whose_time_has_changed_are_worked_on_again(spark, model, tmp_path):
    times = [DAY] * 8
    config = settings(**BYTES, **{"source.modified": "time"})
    before = contents(time=pa.array(times, pa.timestamp("us", tz="UTC")))
    pipeline.run_frame(spark.createDataFrame(before), model, str(tmp_path), config)
    times[4] = datetime(2026, 2, 1, tzinfo=UTC)
    after = contents(time=pa.array(times, pa.timestamp("us", tz="UTC")))
    after = after.set_column(1, "bytes", pa.array([png(True)] * 8))
    again = pipeline.run_frame(spark.createDataFrame(after), model, str(tmp_path), config)
    assert (again.ok, again.skipped) == (1, 7)
    rows = rows_of(tmp_path)
    assert labels(rows) == {name: is_bright(name) or name == "4.png" for name in NAMES}
    assert rows["4.png"]["modified"] == times[4]


def test_bytes_whose_run_meets_another_one_are_published_once(spark, model, tmp_path, monkeypatch):
    publish = ResultStore.publish

    def meet(store, work):
        monkeypatch.setattr(ResultStore, "publish", publish)
        pipeline.run_frame(spark.createDataFrame(contents(["7.png", "8.png"])), model, str(tmp_path), settings(**BYTES))
        return publish(store, work)

    monkeypatch.setattr(ResultStore, "publish", meet)
    pipeline.run_frame(spark.createDataFrame(contents()), model, str(tmp_path), settings(**BYTES))
    assert labels(rows_of(tmp_path)) == {name: is_bright(name) for name in [*NAMES, "8.png"]}


def test_a_row_without_bytes_or_key_is_an_error_row_with_its_kept_columns(spark, model, tmp_path):
    table = contents(
        ["1", "2", "3", "4", "5", "6"],
        id=["good", None, "empty", "none", "long", None],
        bytes=[png(True), png(True), b"", None, png(True) + bytes(20_000), png(False)],
    )
    config = settings(**BYTES, **{"ingest.max_bytes": 10_000})
    summary = pipeline.run_frame(spark.createDataFrame(table).repartition(3), model, str(tmp_path), config)
    assert (summary.images, summary.ok, summary.failed) == (6, 1, 5)
    rows = rows_of(tmp_path)
    errors = {path: row["error"] for path, row in rows.items()}
    assert errors["good"] is None and errors["none"] == "the row has no bytes" and "empty" in errors["empty"]
    assert errors["#null=1"] == errors["#null=2"] == "the row has no key" and "ingest.max_bytes" in errors["long"]
    numbers = {path: row["number"] for path, row in rows.items()}
    assert {numbers.pop("#null=1"), numbers.pop("#null=2")} == {1, 5}
    assert numbers == {"good": 0, "empty": 2, "none": 3, "long": 4}


def test_bytes_may_be_a_field_and_a_key_a_number(spark, model, tmp_path):
    images = [{"bytes": png(is_bright(name)), "path": None} for name in NAMES]
    frame = spark.createDataFrame(pa.table({"image": images, "id": range(8)}))
    config = settings(**{"source.content": "image.bytes", "source.key": "id"})
    assert pipeline.run_frame(frame, model, str(tmp_path), config).ok == 8
    assert labels(rows_of(tmp_path)) == {str(number): number % 2 == 1 for number in range(8)}


def test_two_models_keep_the_columns_of_every_image(spark, model, bundle_uri, tmp_path):
    pipeline.run_frame(spark.createDataFrame(contents()), [model, bundle_uri], str(tmp_path), settings(**BYTES))
    rows = read_results(tmp_path).to_pylist()
    assert len(rows) == 16 and all(row["number"] == int(Path(row["path"]).stem) for row in rows)


# ---------------------------------------------------------------- tables by name and place


def test_a_table_of_the_catalog_is_a_source(spark, model, tmp_path):
    spark.createDataFrame(contents()).createOrReplaceTempView("pictures_of_a_test")
    config = settings(**BYTES)
    assert pipeline.run(spark, "table:pictures_of_a_test", model, str(tmp_path / "out"), config).ok == 8
    with pytest.raises(RunError, match="table:no_such.*cannot be read as a table.*no_such"):
        pipeline.run(spark, "table:no_such", model, str(tmp_path / "other"), config)
    with pytest.raises(RunError, match="without rows"):
        pipeline.run_frame(spark.table("pictures_of_a_test").limit(0), model, str(tmp_path / "other"), config)


def test_the_newest_version_of_a_delta_table_is_a_source_with_its_partitions(spark, model, tmp_path):
    place = tmp_path / "a table"
    write_deltalake(place, contents(part=["x y"] * 4 + ["ü/1"] * 4), partition_by=["part"])
    DeltaTable(place).delete("number >= 6")
    config = settings(**{**BYTES, "source.keep": ["part"]})
    summary = pipeline.run(spark, str(place), model, str(tmp_path / "out"), config)
    assert (summary.images, summary.ok) == (6, 6)
    found = {path: row["part"] for path, row in rows_of(tmp_path / "out").items()}
    assert found == dict(zip(NAMES[:6], ["x y"] * 4 + ["ü/1"] * 2, strict=True))


def test_tasks_read_the_columns_that_are_wanted_and_those_that_the_log_tells(tmp_path):
    write_deltalake(tmp_path / "t", contents(part=["x y"] * 4 + ["ü/1"] * 4), partition_by=["part"])
    write_deltalake(tmp_path / "t", contents(["8.png"], part=["z"], new=[1]), mode="append", schema_mode="merge")
    DeltaTable(tmp_path / "t").delete("number in (6, 7)")
    storage = open_storage(str(tmp_path / "t"))
    schema, files = _delta_files(storage)
    wanted = pa.schema([schema.field(name) for name in ("part", "id", "new")])
    rows = pa.Table.from_batches(read_parquet(files.to_batches(), storage, wanted), wanted).sort_by("id").to_pylist()
    parts = ["x y"] * 4 + ["ü/1"] * 2 + ["z"]
    assert [(row["id"], row["part"]) for row in rows] == list(zip([*NAMES[:6], "8.png"], parts, strict=True))
    assert [row["new"] for row in rows] == [None] * 6 + [1]


@pytest.mark.spark
@pytest.mark.parametrize("form", ["delta", "parquet"])
def test_a_table_on_object_storage_is_read_by_tasks(here, model, tmp_path, s3_settings, s3_root, form):
    bucket = open_storage(s3_root, settings(**s3_settings))
    place = tmp_path / "table"
    if form == "delta":
        write_deltalake(place, contents(part=["x y"] * 4 + ["ü/1"] * 4), partition_by=["part"])
        DeltaTable(place).delete("number >= 6")
    else:
        (place / "_hidden").mkdir(parents=True)
        pq.write_table(contents(NAMES[:4], part=["x y"] * 4), place / "a.parquet", row_group_size=3)
        pq.write_table(contents(NAMES[4:6], part=["ü/1"] * 2), place / "b.parquet")
        (place / "_hidden" / "c.parquet").write_bytes(b"no table")
    for file in (path for path in place.rglob("*") if path.is_file()):
        bucket.write(f"table/{file.relative_to(place)}", file.read_bytes())
    config = settings(**{"source.key": "id", "source.content": "bytes", "source.keep": ["part"]}, **s3_settings)
    for ok, skipped in ((6, 0), (0, 6)):
        run = pipeline.run(here, bucket.join("table"), model, str(tmp_path / "out"), config)
        assert (run.ok, run.skipped) == (ok, skipped)
    rows = rows_of(tmp_path / "out")
    assert labels(rows) == {name: is_bright(name) for name in NAMES[:6]}
    assert [rows[name]["part"] for name in NAMES[:6]] == ["x y"] * 4 + ["ü/1"] * 2


def test_a_delta_table_that_plain_files_do_not_tell_is_refused(spark, model, tmp_path):
    write_deltalake(tmp_path / "t", contents(), configuration={"delta.enableDeletionVectors": "true"})
    with pytest.raises(RunError, match="deletionVectors, which only a Spark with Delta reads"):
        pipeline.run(spark, str(tmp_path / "t"), model, str(tmp_path / "out"), settings(**BYTES))


def test_the_command_line_takes_a_table(model, folder, tmp_path, capfd):
    arguments = ["run", "--source", str(folder), "--model", model, "--output", str(tmp_path / "out")]
    arguments += ["--set", "spark.master=local[2]", "--set", "source.path=uri", "--set", "source.keep=[number]"]
    assert main(arguments) == 0
    assert json.loads(capfd.readouterr().out.splitlines()[-1])["ok"] == 8
    assert main([*arguments, "--set", "source.key=number"]) == 2
    assert "source.key is for source.content" in capfd.readouterr().err


OVER_CONNECT = """
import sys
import pyarrow.parquet as pq
from helpers import pipeline
from helpers.config import load_config
from helpers.session import get_spark

model, table, output = sys.argv[1:]
config = load_config("local", spark={"mode": "connect", "master": "local[2]"}, source={
    "content": "bytes", "key": "id", "keep": ["number"]})
spark = get_spark(config)
frame = spark.createDataFrame(pq.read_table(table).to_pandas())
print(pipeline.run_frame(frame, model, output, config).to_json())
print(pipeline.run_frame(frame, model, output, config).to_json())
"""


def test_a_dataframe_of_spark_connect_is_a_source(model, tmp_path):
    pq.write_table(contents(id=[None, *NAMES[1:]]), tmp_path / "table.parquet")
    command = [sys.executable, "-c", OVER_CONNECT, model, str(tmp_path / "table.parquet"), str(tmp_path / "out")]
    answer = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=300, check=False)
    assert answer.returncode == 0, answer.stderr
    first, second = map(json.loads, answer.stdout.splitlines()[-2:])
    assert (first["ok"], first["failed"], second["failed"], second["skipped"]) == (7, 1, 1, 7)
    assert {row["number"] for row in rows_of(tmp_path / "out").values()} == set(range(8))


# ---------------------------------------------------------------- columns


def test_every_type_that_a_table_can_have_is_kept(spark, model, tmp_path):
    frame = spark.createDataFrame(contents(["1.png"])).selectExpr(
        "*", "cast(1 as tinyint) a_tinyint", "true a_boolean", "cast(2.5 as decimal(5,2)) a_decimal", "1.5f a_float",
        "date'2026-01-01' a_date", "timestamp'2026-01-01 00:00:00' a_time", "timestamp_ntz'2026-01-01 00:00:00' a_ntz",
        "X'00ff' a_binary", "array(1, 2) an_array", "map('a', array(1L)) a_map",
        "named_struct('x', 1, 'y', array(named_struct('z', 'w'))) a_struct",
    )  # fmt: skip
    kept = frame.columns[3:]
    pipeline.run_frame(frame, model, str(tmp_path), settings(**{**BYTES, "source.keep": kept}))
    (row,) = read_results(tmp_path).select(kept).to_pylist()
    expected = [1, True, Decimal("2.50"), 1.5, date(2026, 1, 1), DAY, DAY.replace(tzinfo=None), b"\x00\xff", [1, 2]]
    assert list(row.values()) == [*expected, [("a", [1])], {"x": 1, "y": [{"z": "w"}]}]
    schema = pipeline.read_results(spark, str(tmp_path), settings()).select(kept).schema
    assert schema == frame.select(kept).schema.toNullable()


def test_two_rows_of_one_image_stop_the_run_before_it_begins(spark, model, tmp_path):
    frame = spark.createDataFrame(contents(["1.png", "2.png", "3.png"], id=["a", "b", "a"]))
    with pytest.raises(RunError, match="1 images are named by several rows of the source, such as a by 2"):
        pipeline.run_frame(frame, model, str(tmp_path / "out"), settings(**BYTES))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"source.content": "byte"}, r"source.content: the source has no column byte; did you mean bytes\?"),
        ({"source.key": "zzz"}, "source.key: the source has no column zzz; it has id, bytes, number"),
        ({"source.content": "id"}, "the column id has the type string, and should have binary"),
        ({"source.modified": "number"}, "the column number has the type bigint, and should have timestamp"),
        ({"source.keep": ["numbr"]}, r"source.keep: the source has no column numbr; did you mean number\?"),
        ({"source.keep": ["Model"]}, "the results have a column Model of their own"),
        ({"source.keep": ["number", "number"]}, "a column number of their own, or twice"),
        ({"source.keep": ["an_interval"]}, "cannot have the type of the column an_interval, interval day"),
    ],
)
def test_a_column_that_cannot_be_used_is_one_clear_error(spark, model, tmp_path, changed, message):
    frame = spark.createDataFrame(contents(Model=NAMES))
    if "an_interval" in str(changed):
        frame = frame.selectExpr("*", "interval '1' day an_interval")
    elif "Model" not in str(changed):
        frame = frame.drop("Model")
    with pytest.raises(ConfigError, match=message):
        pipeline.run_frame(frame, model, str(tmp_path / "out"), settings(**{**BYTES, **changed}))


@pytest.mark.parametrize(
    ("source", "values", "message"),
    [
        ("table:a", {}, "name the column of the images' URIs"),
        (None, {}, "name the column of the images' URIs"),
        ("table:a", {"source.content": "b"}, "tells the images apart: name it with source.key"),
        ("table:a", {"source.path": "b", "source.key": "c"}, "source.key is for source.content"),
        ("table:a", {"source.path": "b", "source.modified": "c"}, "source.modified is for source.content"),
        (".", {"source.root": "b"}, "source.root is for tables"),
    ],
)
def test_settings_that_do_not_go_together_are_one_clear_error(source, values, message):
    with pytest.raises(ConfigError, match=message):
        open_files(source, settings(**values))


def test_relative_paths_begin_at_the_table(tmp_path):
    (tmp_path / "a.parquet").touch()
    config = settings(**{"source.path": "uri"})
    for place in (tmp_path, tmp_path / "a.parquet"):
        assert open_files(str(place), config).root == str(tmp_path)
    assert open_files("table:a", config).root == ""
    with pytest.raises(StorageError, match="no such folder; check the --source"):
        open_files(str(tmp_path / "none.parquet"), config)


@pytest.mark.parametrize("order", [("fac", "abcdef", "edb"), ("aabb", "ccddeeff")])
def test_the_kept_columns_of_an_image_are_forgotten_when_it_is_done(order):
    kept = KeptColumns(pa.schema([("x", pa.int64())]), models=2)
    values = pa.array([{"x": 1}, None, {"x": 3}], pa.struct([("x", pa.int64())]))
    batches = [
        pa.RecordBatch.from_arrays([pa.array(names), values], names=["path", "kept"]) for names in ("abc", "def")
    ]
    assert [batch.schema.names for batch in kept.remember(batches)] == [["path"]] * 2
    results = [pa.RecordBatch.from_pydict({"path": list(paths)}) for paths in order]
    found = [row for batch in kept.append(results) for row in batch.to_pylist()]
    expected = dict(zip("abcdef", [1, None, 3] * 2, strict=True))
    assert [row["x"] for row in found] == [expected[path] for path in "".join(order)]
    assert not kept._rows and not kept._left


def test_a_refused_credential_is_no_error_of_one_file(monkeypatch):
    with pytest.raises(StorageError, match="NO_SUCH_VARIABLE"):
        UriStorage("", StorageOptions(credential="env:NO_SUCH_VARIABLE")).stat("s3://bucket/a.png")
