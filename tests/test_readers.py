"""Both readers give the same images, and a run's dashboard holds what happened."""

import logging
import os
import shutil
import struct
import sys
from pathlib import Path

import cv2
import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from cluster import read_results
from pyspark import cloudpickle
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_video import pictures, write_clip

from helpers import pipeline
from helpers.config import load_config
from helpers.images.decoding import decode, load
from helpers.images.spec import InputSpec
from helpers.pipeline import readers
from helpers.pipeline.listing import assign, list_images, plan
from helpers.pipeline.readers import choose_reader, read_by_spark
from helpers.pipeline.task import STAGES
from helpers.storage import LocalStorage, open_storage

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers know nothing of this file

RGB = {"color": "rgb", "mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}


class DriverOnly(LocalStorage):
    """A storage that tasks cannot read, as a Volume on serverless compute."""

    def __reduce__(self):
        return OutOfReach, (self.root,)


class OutOfReach(LocalStorage):
    """What such a storage is in a task."""

    def read(self, path: str) -> bytes:
        raise PermissionError(13, "no access from tasks")


@pytest.fixture
def photos(samples, tmp_path) -> Path:
    source = tmp_path / "photos {1} [a] *"
    shutil.copytree(samples, source)
    shutil.copy(source / "clothes" / "sample 000.png", source / "odd b%20#'é\nname.png")
    return source


def run(spark, source: Path, bundle_uri: str, output: Path, **overrides) -> list[dict]:
    config = load_config("local", **{"report": 0, **overrides})
    pipeline.run(spark, str(source), bundle_uri, str(output), config)
    return read_results(output).sort_by("path").to_pylist()


def test_both_readers_give_the_same_results_empty_files_and_odd_names_included(spark, photos, bundle_uri, tmp_path):
    by_tasks = run(spark, photos, bundle_uri, tmp_path / "files", reader="files")
    by_spark = run(spark, photos, bundle_uri, tmp_path / "spark", reader="spark")
    assert len(by_tasks) == 65 and sum(row["error"] is not None for row in by_tasks) == 4
    assert by_spark == by_tasks


def test_both_readers_give_the_same_frame(spark, photos):
    frames = [pipeline.ingest(spark, str(photos), load_config("local", reader=reader)) for reader in ("files", "spark")]
    by_tasks, by_spark = (frame.orderBy("path").toArrow() for frame in frames)
    assert by_tasks.schema == by_spark.schema and by_tasks.num_rows == 65
    assert by_tasks.to_pylist() == by_spark.to_pylist()


def test_spark_divides_what_it_reads(spark, photos):
    config = load_config("local", **{"reader": "spark", "partitioning.target_bytes": 100_000})
    assert pipeline.ingest(spark, str(photos), config).where("length > 0").toArrow().num_rows == 64
    assert spark.conf.get("spark.sql.files.maxPartitionBytes") == "100000"


@pytest.fixture
def trap(photos) -> Path:
    """What Spark cannot read, what it passes over, and what nobody may make it read."""
    good = (photos / "bags" / "sample 018.bmp").read_bytes()
    for name in ("2026-01-01T10:00:00.bmp", "_MG_0001.bmp", "_folder/a.bmp", "part=1/b.bmp", "name=\\xff.bmp"):
        (photos / name).parent.mkdir(exist_ok=True)
        (photos / name).write_bytes(good)
    (photos / os.fsdecode(b"bytes\xff.bmp")).write_bytes(good)
    for name in ("backup.iso", "scan.tiff", "notes"):
        with (photos / name).open("wb") as file:
            file.truncate(3 * 2**30)
    for number in (1, 2):
        (photos / "clothes" / f"up {number}").symlink_to("..", target_is_directory=True)
    (photos / "folder.png").mkdir()
    return photos


TRAP_GOOD = {"2026-01-01T10:00:00.bmp", "_MG_0001.bmp", "_folder/a.bmp", "part=1/b.bmp", "name=\\x5cxff.bmp"}
TRAP_GOOD |= {"bytes\\xff.bmp"}


def test_spark_reads_what_was_listed_and_nothing_else_of_the_source(spark, trap, bundle_uri, tmp_path):
    rows = {
        row["path"].removeprefix(f"{trap}/"): row
        for row in run(spark, trap, bundle_uri, tmp_path / "out", reader="spark")
    }
    assert len(rows) == 65 + len(TRAP_GOOD) + 2
    assert {name for name in TRAP_GOOD if rows[name]["error"]} == set()
    assert "ingest.max_bytes" in rows["scan.tiff"]["error"] and rows["folder.png"]["error"]
    assert sum(row["error"] is not None for row in rows.values()) == 4 + 2


def test_stage_1_by_spark_has_a_row_for_each_image(spark, trap):
    rows = {
        row.path.removeprefix(f"{trap}/"): row
        for row in pipeline.ingest(spark, str(trap), load_config("local", reader="spark")).collect()
    }
    assert len(rows) == 65 + len(TRAP_GOOD) + 2
    passed = {name for name, row in rows.items() if "passes over" in (row.error or "")}
    assert passed == {"2026-01-01T10:00:00.bmp", "_MG_0001.bmp", "name=\\x5cxff.bmp", "bytes\\xff.bmp"}
    assert rows["_folder/a.bmp"].content == rows["part=1/b.bmp"].content == (trap / "part=1/b.bmp").read_bytes()


def test_stage_1_by_spark_has_one_row_for_what_needs_no_reader_and_has_such_a_name(spark, photos):
    (photos / "_empty.bmp").touch()
    with (photos / "_long.bmp").open("wb") as file:
        file.truncate(3 * 2**30)
    write_clip(photos / "take:1.mp4", "mp4v", pictures(3))
    rows = pipeline.ingest(spark, str(photos), load_config("local", reader="spark")).select("path", "error").collect()
    errors = {row.path.removeprefix(f"{photos}/"): row.error for row in rows}
    assert len(rows) == len(errors) == 65 + 2 + 3
    assert errors["_empty.bmp"] is None and "ingest.max_bytes" in errors["_long.bmp"]
    assert [errors[f"take:1.mp4#frame={number}"] for number in range(3)] == [None] * 3


def test_a_colon_in_a_name_is_no_harm_where_nothing_must_be_escaped(spark, samples, bundle_uri, tmp_path):
    source = shutil.copytree(samples, tmp_path / "photos")
    shutil.copy(source / "bags" / "sample 018.bmp", source / "2026-01-01T10:00:00.bmp")
    assert run(spark, source, bundle_uri, tmp_path / "spark", reader="spark") == run(
        spark, source, bundle_uri, tmp_path / "files", reader="files"
    )


def test_the_listed_length_is_pushed_down_to_spark_and_the_plan_has_the_listed_paths_alone(spark, photos, capsys):
    config, storage = load_config("local"), open_storage(str(photos))
    images = list_images(storage, config).images
    images = images.filter(pc.greater(images["length"], 0)).slice(0, 3)
    (frame,) = read_by_spark(spark, storage, assign(images, plan(images, 2, config)), config)
    frame.explain()
    shown = capsys.readouterr().out
    assert "InMemoryFileIndex(3 paths)" in shown
    assert f"LessThanOrEqual(length,{pc.max(images['length']).as_py()})" in shown


def test_a_file_that_has_grown_since_it_was_listed_is_not_opened_by_spark(spark, deletable_photos):
    storage, config, images = deletable_photos
    frames = list(read_by_spark(spark, storage, images, config))
    with open(images["path"][0].as_py(), "ab") as file:  # noqa: PTH123
        file.truncate(3 * 2**30)
    assert sum(frame.count() for frame in frames) == images.num_rows - 1


@pytest.fixture
def deletable_photos(photos):
    config, storage = load_config("local"), open_storage(str(photos))
    images = list_images(storage, config).images
    images = images.filter(pc.greater(images["length"], 0))
    return storage, config, assign(images, plan(images, 2, config))


def test_files_that_have_gone_cost_themselves_before_and_while_spark_looks_for_them(spark, deletable_photos):
    storage, config, images = deletable_photos
    for path in images["path"].to_pylist()[:5]:
        Path(path).unlink()
    (frame,) = read_by_spark(spark, storage, images, config)
    Path(images["path"][5].as_py()).unlink()
    assert {row.path for row in frame.select("path").collect()} == set(images["path"].to_pylist()[6:])
    for path in images["path"].to_pylist()[6:]:
        Path(path).unlink()
    (frame,) = read_by_spark(spark, storage, images, config)
    assert frame.count() == 0


def test_a_run_of_several_plans_gives_each_image_once(spark, photos, bundle_uri, tmp_path, monkeypatch):
    expected = run(spark, photos, bundle_uri, tmp_path / "one", reader="spark")
    monkeypatch.setattr(readers, "FILES_PER_PLAN", 7)
    assert run(spark, photos, bundle_uri, tmp_path / "ten", reader="spark") == expected
    (records,) = (tmp_path / "ten" / "runs").glob("*.parquet")
    partitions = pq.read_table(records)["partition"].to_pylist()
    assert len(partitions) == len(set(partitions)) > 9


def test_an_image_changed_under_a_run_by_spark_is_not_lost(spark, photos, bundle_uri, tmp_path):
    first = run(spark, photos, bundle_uri, tmp_path / "out", reader="spark")
    changed = photos / "clothes" / "sample 001.jpg"
    changed.write_bytes((photos / "bags" / "sample 018.bmp").read_bytes())
    second = run(spark, photos, bundle_uri, tmp_path / "out", reader="spark")
    assert [row["path"] for row in first] == [row["path"] for row in second]
    assert [a["path"] for a, b in zip(first, second, strict=True) if a != b] == [str(changed)]


@pytest.mark.parametrize(
    ("mode", "kind", "expected"), [("local", DriverOnly, "files"), ("cluster", DriverOnly, "spark")]
)
def test_auto_asks_a_task_where_tasks_run_elsewhere(spark, photos, mode, kind, expected, caplog, monkeypatch):
    if mode == "cluster":
        monkeypatch.setattr("helpers.pipeline.readers.local_slots", lambda spark: None)
    config, storage = load_config("local"), kind(str(photos))
    images = list_images(storage, config).images
    with caplog.at_level(logging.INFO, "helpers"):
        assert choose_reader(spark, storage, assign(images, plan(images, 2, config)), config) == expected
    assert f"reader {expected}: " in caplog.text


def test_auto_takes_the_tasks_where_they_can_read(spark, photos, monkeypatch):
    monkeypatch.setattr("helpers.pipeline.readers.local_slots", lambda spark: None)
    config, storage = load_config("local"), open_storage(str(photos))
    images = list_images(storage, config).images
    assert choose_reader(spark, storage, assign(images, plan(images, 2, config)), config) == "files"


def test_heavy_models_get_fewer_images_a_task(samples):
    config = load_config("local", **{"partitioning.target_seconds": 10})
    images = list_images(open_storage(str(samples)), config).images
    assert plan(images, 2, config, image_seconds=0.003).partitions == 2
    assert plan(images, 2, config, image_seconds=1.0).files.max() <= 12


def photograph(width: int, height: int | None = None) -> bytes:
    rng, sides = np.random.default_rng(0), (width, height or width)
    image = cv2.resize(rng.integers(0, 256, (24, 24, 3), np.uint8), sides, interpolation=cv2.INTER_CUBIC)
    return cv2.imencode(".jpg", image)[1].tobytes()


@pytest.mark.parametrize(("side", "reduced"), [(400, False), (900, True), (4000, True)])
def test_scaled_decoding_stays_within_a_gray_level_and_keeps_the_original_size(side, reduced):
    content = photograph(side)
    exact, size = load(content, InputSpec(224, 224, **RGB), 2**28)
    scaled, scaled_size = load(content, InputSpec(224, 224, **RGB, scaled_decoding=2), 2**28)
    assert size == scaled_size == (side, side)
    assert np.array_equal(exact, scaled) != reduced
    assert np.abs(exact.astype(int) - scaled).mean() < 1


@pytest.mark.parametrize("size", [(1000, 999), (999, 1000)])
@pytest.mark.parametrize("orientation", [1, 6])
def test_scaled_decoding_does_not_exchange_sides_that_are_nearly_equal(size, orientation):
    """An eighth of both is 125 pixels, from which nobody can tell whether EXIF has turned the image."""
    tag = b"MM\0*" + struct.pack(">IHHHIHHI", 8, 1, 0x0112, 3, 1, orientation, 0, 0)
    exif = b"\xff\xe1" + struct.pack(">H", 8 + len(tag)) + b"Exif\0\0" + tag
    content = photograph(*size)
    _, found = load(content[:2] + exif + content[2:], InputSpec(28, 28, **RGB, scaled_decoding=2), 2**28)
    assert found == (size if orientation == 1 else size[::-1])


def test_scaled_decoding_is_for_jpeg_files_alone():
    content = cv2.imencode(".png", decode(photograph(900), 2**28))[1].tobytes()
    exact, scaled = (load(content, InputSpec(64, 64, **RGB, scaled_decoding=m), 2**28)[0] for m in (0, 1))
    assert np.array_equal(exact, scaled)


def test_a_run_shows_in_tensorboard(spark, photos, bundle_uri, tmp_path):
    overrides = {"paths.runs": str(tmp_path / "runs"), "pictures": 5, "partitioning.partitions": 4}
    run(spark, photos, bundle_uri, tmp_path / "out", **overrides)
    (folder,) = (tmp_path / "runs" / "pipeline").iterdir()
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0}).Reload()
    assert [event.value for event in events.Scalars("run/images")][-1] == 65
    assert [event.value for event in events.Scalars("run/failed")][-1] == 4
    stages = {tag for tag in events.Tags()["scalars"] if tag.startswith("stage/")}
    assert stages == {f"stage/{stage}_seconds" for stage in STAGES} and all(
        len(events.Scalars(tag)) == 4 for tag in stages
    )
    assert len(events.Tags()["images"]) == 5 == len(list((tmp_path / "out" / "pictures").iterdir()))


def test_a_file_that_goes_while_spark_reads_is_a_row(spark, photos, bundle_uri, tmp_path, monkeypatch):
    def remove_then_read(*arguments):
        (photos / "clothes" / "sample 002.bmp").unlink()
        return read_by_spark(*arguments)

    monkeypatch.setattr("helpers.pipeline.runs.read_by_spark", remove_then_read)
    rows = run(spark, photos, bundle_uri, tmp_path / "out", reader="spark")
    assert len(rows) == 65
    gone = next(row for row in rows if row["path"].endswith("sample 002.bmp"))
    assert gone["error"].startswith("the file is gone") and gone["predictions"] is None
