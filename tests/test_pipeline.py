import errno
import json
import os
import re
import resource
import shutil
import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import openvino as ov
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from bombs import bilevel_png
from cluster import read_results

import fashion_data
from helpers import pipeline
from helpers.bundle.manifest import load_bundle, save_bundle
from helpers.config import Config, load_config
from helpers.errors import BundleError, ConfigError, RunError, StorageError, UserError
from helpers.pipeline import RunSummary
from helpers.pipeline.listing import list_images
from helpers.pipeline.report import draw_sample
from helpers.pipeline.results import ResultStore
from helpers.pipeline.task import STAGES
from helpers.session import is_sail
from helpers.storage import LocalStorage, open_storage
from helpers.tracking.watching import show_progress

LOCAL = {"spark.master": "local[2]", "pictures": 0}


def settings(**overrides) -> Config:
    return load_config("local", **{**LOCAL, **overrides})


def rows_of(output: Path) -> list[dict]:
    """The results as any reader of the table sees them, by path."""
    return read_results(output).sort_by("path").to_pylist()


@dataclass
class Finished:
    """A run over the samples."""

    source: Path
    output: Path
    summary: RunSummary


@pytest.fixture(scope="module")
def finished(spark, samples, bundle_uri, tmp_path_factory) -> Finished:
    source = tmp_path_factory.mktemp("source") / "photos"
    shutil.copytree(samples, source)
    output = tmp_path_factory.mktemp("output")
    return Finished(source, output, pipeline.run(spark, str(source), bundle_uri, str(output), settings(pictures=12)))


@pytest.fixture
def earlier(finished, tmp_path) -> Finished:
    """The same with an output of its own, for a test that changes it."""
    output = tmp_path / "output"
    shutil.copytree(finished.output, output)
    return Finished(finished.source, output, finished.summary)


# A driver of its own in another folder: workers start in the driver's folder and would find this project's there. And
# with Spark's own daemon, as on a cluster: that of one machine has this project's modules imported already.
FRESH_WORKER = """
import json, sys
from helpers.config import load_config
from helpers.pipeline.listing import list_images, assign, plan
from helpers.pipeline import make_task
from helpers.session import get_spark, pack_helpers, starting
import pyarrow as pa

daemon = {"spark.python.daemon.module": "pyspark.daemon"}
config = load_config("local", spark={"master": "local[1]", "conf": daemon})
with starting(config):
    task = make_task(*sys.argv[1:], config)
spark = get_spark(config)

def look(batches):
    import sys
    import helpers
    from helpers.pipeline import stages

    rows = sum(batch.num_rows for batch in task.results(batches))
    files = {"helpers": [helpers.__file__], "stages": [stages.__file__]}
    yield pa.RecordBatch.from_pydict({"rows": [rows], **files, "modules": [sorted(sys.modules)]})

images = list_images(task.source, config).images
frame = spark.createDataFrame(assign(images, plan(images, 1, config))).coalesce(1)
(row,) = frame.mapInArrow(look, "rows long, helpers string, stages string, modules array<string>").collect()
print(json.dumps({**row.asDict(), "archive": pack_helpers().name}))
"""


@pytest.fixture(scope="module")
def fresh_worker(samples, bundle_uri, tmp_path_factory) -> dict:
    """What a new worker process has imported, and from where, after all stages ran in it."""
    cwd = tmp_path_factory.mktemp("elsewhere")
    command = [sys.executable, "-c", FRESH_WORKER, str(samples), bundle_uri, str(cwd / "out")]
    answer = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120, check=False)
    assert answer.returncode == 0, answer.stderr
    return json.loads(answer.stdout.splitlines()[-1])


@pytest.mark.spark
def test_a_worker_imports_helpers_from_the_shipped_archive(fresh_worker):
    assert fresh_worker["rows"] == 64
    assert fresh_worker["helpers"].endswith(f"/{fresh_worker['archive']}/helpers/__init__.py")
    assert fresh_worker["stages"].endswith(f"/{fresh_worker['archive']}/helpers/pipeline/stages.py")


@pytest.mark.spark
def test_a_worker_runs_all_stages_without_the_drivers_heavy_packages(fresh_worker):
    modules = set(fresh_worker["modules"])
    assert {"helpers.bundle.runtime", "openvino", "cv2"} <= modules
    assert not modules & {"torch", "torchvision", "pydantic", "nncf", "onnx", "matplotlib", "tensorboard"}


def test_a_run_gives_every_image_one_row(finished):
    rows = rows_of(finished.output)
    files = [path for path in finished.source.rglob("*") if path.is_file()]
    assert len(rows) == 64
    assert [row["path"] for row in rows] == sorted(str(path) for path in files)
    assert {row["path"]: row["length"] for row in rows} == {str(path): path.stat().st_size for path in files}
    assert {row["model"] for row in rows} == {rows[0]["model"]} and rows[0]["model"].startswith("fashion_cnn-fp32@")


def test_damaged_files_are_rows_with_an_error_and_the_rest_are_not(finished):
    failed = {Path(row["path"]).name: row["error"] for row in rows_of(finished.output) if row["error"] is not None}
    assert set(failed) == {"cut short.png", "empty.jpg", "notes.jpg", "page.png"}
    assert failed["empty.jpg"] == "the file is empty"
    for row in rows_of(finished.output):
        assert (row["error"] is None) == (row["predictions"] is not None) == (row["width"] is not None)
        assert row["predictions"] is None or len(row["predictions"]) == 3  # the bundle's top_k


def test_sizes_are_the_originals(finished):
    row = next(row for row in rows_of(finished.output) if row["path"].endswith("sample 004.png"))
    assert (row["width"], row["height"]) == (56, 56)


def test_the_summary_counts_what_happened(finished):
    summary = finished.summary
    assert (summary.images, summary.ok, summary.failed, summary.skipped) == (64, 60, 4, 0)
    assert summary.partitions == 2 == len(summary.records)
    assert summary.seconds > 0
    assert summary.images_per_second >= 64 / summary.seconds  # listing and start-up are left out of the rate
    assert summary.results == str(finished.output / "results")
    assert dict(summary.reasons())["the file is empty"] == 1
    assert sum(count for _, count in summary.reasons()) == 4


def test_names_of_runs_are_in_the_order_of_their_starts(samples, bundle_uri, tmp_path):
    task = partial(pipeline.make_task, str(samples), bundle_uri, str(tmp_path), load_config("local"))
    names = [task().run for _ in range(30)]  # of which some are in one second
    assert names == sorted(names) and len({name[:15] for name in names}) < len(set(names)) == 30


def test_records_of_the_tasks_add_up(spark, finished):
    records = finished.summary.records
    assert sum(record["images"] for record in records) == 64
    assert sum(record["failed"] for record in records) == 4
    assert sum(record["bytes"] for record in records) == sum(row["length"] for row in rows_of(finished.output))
    for record in records:
        parts = [record[f"{stage}_seconds"] for stage in STAGES]
        assert sum(parts) == pytest.approx(record["seconds"]) and min(parts) >= 0
        assert (record["process"] == os.getpid()) == is_sail(spark) and record["peak_megabytes"] > 10


def test_a_run_leaves_results_and_no_traces_of_work(finished):
    assert {path.name for path in finished.output.iterdir()} == {"results", "pictures", "report", "runs"}
    names = {path.name for path in (finished.output / "results").iterdir()} - {"_delta_log"}
    assert names and all(re.fullmatch(r"[\w-]+\.parquet", name) for name in names)


def test_pictures_are_made_and_safely_named(finished):
    pictures = list((finished.output / "pictures").iterdir())
    assert len(pictures) == 12
    for picture in pictures:
        assert re.fullmatch(r"sample_\d{3}_(png|jpg|bmp|webp)-[0-9a-f]{16}\.png", picture.name)
        assert min(cv2.imread(str(picture)).shape[:2]) >= 224


def test_stages_one_by_one_give_what_the_fused_run_gives(spark, finished, bundle_uri):
    config = settings()
    images = pipeline.ingest(spark, str(finished.source), config)
    tensors = pipeline.preprocess(images, bundle_uri, config)
    outputs = pipeline.infer(tensors, bundle_uri, config)
    found = pipeline.postprocess(outputs, bundle_uri, config).toArrow().sort_by("path").to_pylist()
    assert found == rows_of(finished.output)


@pytest.mark.spark
def test_ingest_alone_keeps_the_plans_partitions(spark, finished):
    from pyspark.sql.functions import spark_partition_id

    images = pipeline.ingest(spark, str(finished.source), settings(**{"partitioning.partitions": 5}))
    counts = images.groupBy(spark_partition_id().alias("partition")).count().collect()
    assert {row.partition for row in counts} == set(range(5))
    assert sum(row["count"] for row in counts) == 64


def test_a_second_run_skips_everything_and_changes_nothing(spark, earlier, bundle_uri):
    before = rows_of(earlier.output)
    summary = pipeline.run(spark, str(earlier.source), bundle_uri, str(earlier.output), settings())
    assert (summary.images, summary.ok, summary.failed, summary.skipped) == (64, 0, 0, 64)
    assert (summary.partitions, summary.images_per_second) == (0, 0.0)
    assert rows_of(earlier.output) == before


def test_only_new_and_changed_images_are_worked_on(spark, bundle_uri, samples, tmp_path):
    source, output = tmp_path / "photos", tmp_path / "output"
    shutil.copytree(samples, source)
    pipeline.run(spark, str(source), bundle_uri, str(output), settings())
    touched, mended = source / "clothes" / "sample 001.jpg", source / "empty.jpg"
    os.utime(touched, ns=(0, 1_700_000_000_000_001_000))
    shutil.copyfile(source / "clothes" / "sample 002.bmp", mended)
    shutil.copyfile(mended, source / "new.bmp")
    summary = pipeline.run(spark, str(source), bundle_uri, str(output), settings())
    assert (summary.images, summary.ok, summary.failed, summary.skipped) == (65, 3, 0, 62)
    rows = {row["path"]: row for row in rows_of(output)}
    assert len(rows_of(output)) == len(rows) == 65
    assert rows[str(touched)]["modified"].timestamp() == pytest.approx(1_700_000_000.000001)
    assert rows[str(mended)]["error"] is None
    again = pipeline.run(spark, str(source), bundle_uri, str(output), settings())
    assert (again.skipped, again.ok) == (65, 0)


@pytest.mark.spark
def test_an_image_that_would_take_a_task_over_its_memory_is_an_error_row(spark, earlier, bundle_uri):
    large = earlier.source.parent / "large.png"  # within ingest.max_pixels, and 1,152 MB while it is decoded
    large.write_bytes(bilevel_png(12_000, 12_000))
    summary = pipeline.run(
        spark, str(large.parent), bundle_uri, str(earlier.output), settings(**{"inference.memory_megabytes": 900})
    )
    large.unlink()
    assert (summary.ok, summary.failed, summary.skipped) == (0, 1, 64)
    (row,) = [row for row in rows_of(earlier.output) if row["path"] == str(large)]
    assert "12000 x 12000 pixels" in row["error"] and "inference.memory_megabytes" in row["error"]
    assert max(record["peak_megabytes"] for record in summary.records) < 900


def test_a_model_that_takes_more_memory_than_a_task_may_have_stops_the_run(spark, finished, bundle_uri, tmp_path):
    with pytest.raises(RunError, match="a task takes .* MB with .* loaded, more than inference.memory_megabytes=50"):
        pipeline.run(
            spark, str(finished.source), bundle_uri, str(tmp_path), settings(**{"inference.memory_megabytes": 50})
        )


def test_starting_over_does_every_image_again(spark, earlier, bundle_uri):
    old = set(ResultStore(open_storage(str(earlier.output))).files())
    summary = pipeline.run(spark, str(earlier.source), bundle_uri, str(earlier.output), settings(resume=False))
    assert (summary.ok, summary.failed, summary.skipped) == (60, 4, 0)
    assert len(rows_of(earlier.output)) == 64
    assert old and not old & set(ResultStore(open_storage(str(earlier.output))).files())


@pytest.mark.parametrize("change", [{"postprocess.top_k": 1}, {"inference.precision": "bf16"}])
def test_results_of_two_models_are_not_mixed(spark, earlier, bundle_uri, change):
    before = rows_of(earlier.output)
    with pytest.raises(RunError, match="results of fashion_cnn-fp32@.*another --output.*resume=false"):
        pipeline.run(spark, str(earlier.source), bundle_uri, str(earlier.output), settings(**change))
    assert rows_of(earlier.output) == before


def test_post_processing_can_be_set_for_a_run(spark, finished, bundle_uri, tmp_path):
    config = settings(**{"postprocess.top_k": 1})
    pipeline.run(spark, str(finished.source), bundle_uri, str(tmp_path), config)
    expected = [row["predictions"] and row["predictions"][:1] for row in rows_of(finished.output)]
    assert [row["predictions"] for row in rows_of(tmp_path)] == expected


def test_an_unknown_post_processing_parameter_stops_before_anything_is_written(spark, finished, bundle_uri, tmp_path):
    with pytest.raises(ConfigError, match=r"postprocess\.topk.*top_k"):
        pipeline.run(
            spark, str(finished.source), bundle_uri, str(tmp_path / "out"), settings(**{"postprocess.topk": 1})
        )
    assert not (tmp_path / "out").exists()


def test_a_source_without_images_is_an_error(spark, bundle_uri, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "notes.txt").write_text("no image")
    with pytest.raises(RunError, match="0 images; left out: 1 with another suffix"):
        pipeline.run(spark, str(tmp_path / "photos"), bundle_uri, str(tmp_path / "out"), settings())


def test_a_source_that_is_not_there_is_an_error(spark, bundle_uri, tmp_path):
    with pytest.raises(StorageError, match="gone.*no such folder"):
        pipeline.run(spark, str(tmp_path / "gone"), bundle_uri, str(tmp_path / "out"), settings())


def test_a_missing_bundle_is_an_error(spark, finished, tmp_path):
    with pytest.raises(BundleError, match="no model bundle at .*gone"):
        pipeline.run(spark, str(finished.source), str(tmp_path / "gone"), str(tmp_path / "out"), settings())


def test_an_output_that_is_a_file_is_an_error(spark, finished, bundle_uri, tmp_path):
    (tmp_path / "out").write_text("the user's")
    with pytest.raises(UserError, match=str(tmp_path / "out")):
        pipeline.run(spark, str(finished.source), bundle_uri, str(tmp_path / "out"), settings())
    assert (tmp_path / "out").read_text() == "the user's"


@pytest.mark.parametrize("form", ["{}/x/../photos", "{}/photos/", "{}/./photos", "file://{}/photos"])
def test_the_same_images_under_another_spelling_are_skipped_not_doubled(spark, samples, bundle_uri, tmp_path, form):
    shutil.copytree(samples / "bags", tmp_path / "photos")
    output = tmp_path / "out"
    first = pipeline.run(spark, str(tmp_path / "photos"), bundle_uri, str(output), settings())
    again = pipeline.run(spark, form.format(tmp_path), bundle_uri, str(output), settings())
    assert again.skipped == again.images == first.images == len(rows_of(output))


@pytest.fixture
def damaged(bundle_uri, tmp_path) -> str:
    """A bundle whose weights are cut short, and which no worker has in memory."""
    bundle = load_bundle(open_storage(bundle_uri))
    graph, weights = bundle.read("model.xml") + b"\n", bundle.read("model.bin")
    copy = save_bundle(
        open_storage(str(tmp_path / "bundle")), bundle.manifest, {"model.xml": graph, "model.bin": weights}
    )
    copy.storage.write("model.bin", b"short")
    return copy.storage.root


def test_damaged_weights_stop_the_run_with_the_bundles_own_words(spark, finished, damaged, tmp_path):
    with pytest.raises((RunError, BundleError)) as error:
        pipeline.run(spark, str(finished.source), damaged, str(tmp_path / "out"), settings())
    message = str(error.value)
    assert "model.bin is damaged or truncated (5 bytes)" in message and "\n" not in message
    assert not (tmp_path / "out" / "results").exists()


@pytest.mark.parametrize("form", ["plain", "with ..", "through a link", "source through a link"])
def test_an_output_below_its_source_is_not_taken_for_images(spark, samples, bundle_uri, tmp_path, form):
    source = tmp_path / "photos"
    shutil.copytree(samples / "bags", source)
    count = len(list(source.iterdir()))
    assert count > 2
    (tmp_path / "link").symlink_to(source)
    sources = {"source through a link": tmp_path / "link"}
    outputs = {"with ..": tmp_path / "x" / ".." / "photos" / "out", "through a link": tmp_path / "link" / "out"}
    arguments = str(sources.get(form, source)), bundle_uri, str(outputs.get(form, source / "out"))
    first = pipeline.run(spark, *arguments, settings(pictures=5))
    assert first.images == count and len(list((source / "out" / "pictures").iterdir())) > 0
    second = pipeline.run(spark, *arguments, settings(pictures=5))
    assert (second.images, second.skipped) == (count, count)


def test_results_next_to_the_images_are_possible(spark, samples, bundle_uri, tmp_path):
    source = tmp_path / "photos"
    shutil.copytree(samples / "bags", source)
    count = len(list(source.iterdir()))
    for _ in range(2):
        assert pipeline.run(spark, str(source), bundle_uri, str(source), settings(pictures=5)).images == count


def test_a_killed_runs_finished_tasks_are_kept(spark, earlier, bundle_uri):
    """As if the driver had died between the tasks' end and publication."""
    staged = earlier.output / "_staging" / "20260101T000000-00000000"
    staged.mkdir(parents=True)
    table = read_results(earlier.output)
    failed = table.num_rows - table["error"].null_count
    pq.write_table(table, staged / f"000000-{table.num_rows}-{failed}.parquet")
    shutil.rmtree(earlier.output / "results")
    summary = pipeline.run(spark, str(earlier.source), bundle_uri, str(earlier.output), settings())
    assert (summary.skipped, summary.ok, summary.failed) == (64, 0, 0)
    assert len({row["path"] for row in rows_of(earlier.output)}) == len(rows_of(earlier.output)) == 64
    assert not (earlier.output / "_staging").exists()


def test_all_ten_thousand_predictions_equal_the_bundles_without_spark(
    spark, test_images, bundle_uri, fashion_mnist_root, tmp_path
):
    config = settings(**{"postprocess.top_k": 10})
    summary = pipeline.run(spark, str(test_images), bundle_uri, str(tmp_path), config)
    assert (summary.images, summary.ok, summary.failed, summary.skipped) == (10_000, 10_000, 0, 0)

    # The same stages in this process: equal to the bit.
    task = pipeline.make_task(str(test_images), bundle_uri, str(tmp_path), config)
    alone = pa.Table.from_batches(task.results(list_images(task.source, config).images.to_batches()))
    rows = read_results(tmp_path).sort_by("path").select(alone.column_names).cast(alone.schema)
    assert rows.equals(alone.sort_by("path"))
    assert [Path(path).name for path in rows["path"].to_pylist()] == [f"{i:05d}.png" for i in range(10_000)]

    # Neither files nor stages: OpenVINO on the data set's arrays.
    pixels = fashion_data.load(fashion_mnist_root, train=False)[0][..., None]
    model = ov.Core().compile_model(Path(bundle_uri, "model.xml"), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    logits = np.concatenate([model(pixels[i : i + 500])["logits"] for i in range(0, 10_000, 500)])
    scores = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    predictions = rows["predictions"].combine_chunks().flatten()
    classes = predictions.field("class_id").to_numpy().reshape(10_000, 10)
    found = np.zeros_like(scores)
    np.put_along_axis(found, classes, predictions.field("score").to_numpy().reshape(10_000, 10), axis=1)
    np.testing.assert_allclose(found, scores, atol=1e-5)
    best = classes[:, 0]
    clear = np.diff(np.sort(scores, axis=1)[:, -2:])[:, 0] > 1e-5  # else rounding decides
    assert clear.mean() > 0.99
    np.testing.assert_array_equal(best[clear], scores.argmax(axis=1)[clear])


def no_images(source: Path) -> dict:
    shutil.rmtree(source)
    source.mkdir()
    return {}


def too_little_memory(source: Path) -> dict:
    return {"inference.memory_megabytes": 50}


@pytest.mark.parametrize("change", [no_images, too_little_memory])
def test_starting_over_that_comes_to_nothing_keeps_the_earlier_results(spark, earlier, bundle_uri, tmp_path, change):
    before = rows_of(earlier.output)
    source = shutil.copytree(earlier.source, tmp_path / "photos")
    changed = change(source)
    with pytest.raises(RunError):
        pipeline.run(spark, str(source), bundle_uri, str(earlier.output), settings(resume=False, **changed))
    assert rows_of(earlier.output) == before


def test_starting_over_with_a_damaged_model_keeps_the_earlier_results(spark, earlier, damaged):
    before = rows_of(earlier.output)
    with pytest.raises(RunError, match="model.bin"):
        pipeline.run(spark, str(earlier.source), damaged, str(earlier.output), settings(resume=False))
    assert rows_of(earlier.output) == before


def test_starting_over_replaces_another_models_results_and_those_of_images_that_are_gone(
    spark, earlier, bundle_uri, tmp_path
):
    source = shutil.copytree(earlier.source / "bags", tmp_path / "photos")
    summary = pipeline.run(
        spark, str(source), bundle_uri, str(earlier.output), settings(resume=False, **{"postprocess.top_k": 1})
    )
    assert len(rows_of(earlier.output)) == summary.images == len(list(source.iterdir()))
    assert {len(row["predictions"]) for row in rows_of(earlier.output)} == {1}


# ---------------------------------------------------------------- what is done, and what is tried again


@pytest.fixture
def photos(tmp_path) -> Path:
    """Good images only."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(6):
        pixels = np.random.default_rng(number).integers(0, 256, (40, 60, 3), np.uint8)
        cv2.imwrite(str(folder / f"{number}.png"), pixels)
    return folder


def test_images_above_a_limit_are_worked_on_again_once_it_is_raised(spark, photos, bundle_uri, tmp_path):
    count, run = (
        len(list(photos.iterdir())),
        partial(pipeline.run, spark, str(photos), bundle_uri, str(tmp_path / "out")),
    )
    limited = settings(**{"ingest.max_pixels": 100})
    for _ in range(2):  # nothing is done by the first run, so the second has as much to do
        summary = run(limited)
        assert (summary.ok, summary.failed, summary.skipped) == (0, count, 0)
        assert summary.failed_of_all == count and len(rows_of(tmp_path / "out")) == count
    summary = run(settings())
    assert (summary.ok, summary.failed, summary.skipped) == (count, 0, 0)
    assert [row["error"] for row in rows_of(tmp_path / "out")] == [None] * count


def test_an_image_that_could_not_be_read_is_worked_on_again(spark, photos, bundle_uri, tmp_path, monkeypatch):
    """Its length and modification time are the same before and after."""
    hidden = photos / "away.png"
    place, status = sorted(photos.iterdir())[0], sorted(photos.iterdir())[0].stat()
    listed = list_images(open_storage(str(photos)), settings())
    with monkeypatch.context() as context:
        context.setattr(pipeline.listing, "list_slices", lambda *_, **__: iter([listed]))
        place.rename(hidden)
        summary = pipeline.run(spark, str(photos), bundle_uri, str(tmp_path / "out"), settings())
    assert (summary.failed, dict(summary.reasons())) == (
        1,
        {"the file is gone: it was moved or deleted after it was listed, or its link leads nowhere": 1},
    )
    hidden.rename(place)
    assert place.stat().st_mtime_ns == status.st_mtime_ns
    again = pipeline.run(spark, str(photos), bundle_uri, str(tmp_path / "out"), settings())
    assert (again.ok, again.failed, again.skipped) == (1, 0, summary.images - 1)
    assert all(row["error"] is None for row in rows_of(tmp_path / "out"))


def test_damaged_files_are_done_until_they_change_and_still_count_as_failed(spark, earlier, bundle_uri):
    again = pipeline.run(spark, str(earlier.source), bundle_uri, str(earlier.output), settings())
    assert (again.ok, again.failed, again.skipped, again.failed_of_all) == (0, 0, 64, 4)
    assert again.reasons() == earlier.summary.reasons()
    assert set(json.loads(again.to_json())) == set(json.loads(earlier.summary.to_json()))


# ---------------------------------------------------------------- after the results are published


def in_the_folders_place(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place.write_text("the user's")


def full_disk(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = LocalStorage.write

    def fail(self, path: str, data: bytes) -> None:
        if self.join(path).startswith(str(place)):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(self, path, data)

    monkeypatch.setattr(LocalStorage, "write", fail)


@pytest.mark.parametrize("how", [in_the_folders_place, full_disk])
@pytest.mark.parametrize("what", ["pictures", "report", "runs", "dashboards"])
def test_what_cannot_be_written_beside_the_results_is_a_warning(
    spark, photos, bundle_uri, tmp_path, caplog, monkeypatch, what, how
):
    output = tmp_path / "out"
    output.mkdir()
    how(tmp_path / "dashboards" if what == "dashboards" else output / what, monkeypatch)
    config = settings(pictures=3, **{"paths.runs": str(tmp_path / "dashboards")})
    summary = pipeline.run(spark, str(photos), bundle_uri, str(output), config)
    assert summary.ok == len(rows_of(output)) > 0
    warnings = [record.message for record in caplog.records if record.levelname == "WARNING"]
    said = {"pictures": "no picture", "report": "no page", "runs": "record", "dashboards": "set paths.runs"}[what]
    assert any(said in warning and re.search("file is where|disk is full|No space", warning) for warning in warnings)
    assert not (output / "_staging").exists()


def test_no_folder_for_temporary_files_is_no_dashboard_and_no_more(
    spark, photos, bundle_uri, tmp_path, caplog, monkeypatch, adls_root, adls_settings
):
    def fail(*_: object, **__: object) -> None:
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found")

    monkeypatch.setattr("helpers.tracking.tensorboard.tempfile.TemporaryDirectory", fail)
    config = settings(**{"paths.runs": adls_root}, **adls_settings)
    assert pipeline.run(spark, str(photos), bundle_uri, str(tmp_path / "out"), config).ok > 0
    assert "no dashboard: [Errno 2] No usable temporary directory found; set paths.runs" in caplog.text


def test_dashboards_go_to_any_storage(spark, photos, bundle_uri, tmp_path, adls_root, adls_settings):
    config = settings(pictures=2, **{"paths.runs": adls_root}, **adls_settings)
    pipeline.run(spark, str(photos), bundle_uri, str(tmp_path / "out"), config)
    (events,) = open_storage(adls_root, config).list("pipeline")
    assert "tfevents" in events.path and events.length > 1000


def test_a_progress_that_cannot_be_counted_is_a_warning(caplog):
    def fail() -> tuple[int, int]:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    with show_progress(10, fail, done=0, is_whole=True):
        pass
    (record,) = caplog.records
    assert record.levelname == "WARNING" and "Stale file handle" in record.message


def replaced_by_another_size(path: Path) -> None:
    cv2.imwrite(str(path), np.zeros((300, 10, 3), np.uint8))


def replaced_by_another_size_of_the_same_length(path: Path) -> None:
    """And of the same modification time, so that only its pixels tell."""
    status, image = path.stat(), cv2.imread(str(path))
    content = cv2.imencode(".png", np.zeros((image.shape[0] // 2, image.shape[1], 3), np.uint8))[1].tobytes()
    path.write_bytes(content.ljust(status.st_size, b"\0"))
    assert path.stat().st_size == status.st_size
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def replaced_by_a_file_of_terabytes(path: Path) -> None:
    os.truncate(path, 2**42)


@pytest.mark.parametrize(
    "replace",
    [replaced_by_another_size, replaced_by_another_size_of_the_same_length, replaced_by_a_file_of_terabytes],
)
def test_an_image_that_is_replaced_before_its_picture_is_drawn_costs_its_picture_only(
    spark, bundle_uri, photos, tmp_path, caplog, monkeypatch, replace
):
    victim, publish = photos / "3.png", ResultStore.publish

    def and_replace(*given) -> list[str]:
        replace(victim)
        return publish(*given)

    monkeypatch.setattr(ResultStore, "publish", and_replace)
    summary = pipeline.run(spark, str(photos), bundle_uri, str(tmp_path / "out"), settings(pictures=100))
    assert summary.ok == summary.images
    assert len(list((tmp_path / "out" / "pictures").iterdir())) == summary.images - 1
    assert f"no picture of {victim}" in caplog.text


@pytest.mark.spark
def test_a_picture_that_would_take_too_much_memory_is_not_drawn(spark, photos, bundle_uri, tmp_path, caplog):
    (photos / "large.png").write_bytes(bilevel_png(9_000, 9_000))  # 81 million pixels, and 32 bytes each to draw them
    config = settings(**{"inference.memory_megabytes": 2048})
    finished = pipeline.run(spark, str(photos), bundle_uri, str(tmp_path / "out"), config)
    assert finished.ok == finished.images
    files = ResultStore(open_storage(str(tmp_path / "out"))).files()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    names = draw_sample(open_storage(str(tmp_path / "out")), files, open_storage(str(photos)), settings(pictures=100))
    assert len(names) == finished.images - 1
    assert "large.png: it has 9000 x 9000 pixels" in caplog.text
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50 * 2**10
