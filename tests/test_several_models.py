"""Several models in one pass: images are decoded once, and have a row per model."""

import shutil
from collections import Counter
from pathlib import Path

import graphs
import pyarrow as pa
import pytest
from cluster import read_results

from helpers import pipeline
from helpers.cli import _parser
from helpers.config import load_config
from helpers.errors import ConfigError, RunError
from helpers.pipeline import views
from helpers.pipeline.listing import list_images
from helpers.pipeline.records import read_runs
from helpers.pipeline.task import Task


def settings(**overrides):
    return load_config("local", **{"spark.master": "local[2]", "pictures": 0, "postprocess.top_k": 2, **overrides})


@pytest.fixture(scope="module")
def brightness_uri(tmp_path_factory) -> str:
    return graphs.brightness(tmp_path_factory.mktemp("brightness")).storage.root


@pytest.fixture(scope="module")
def models(bundle_uri, brightness_uri) -> list[str]:
    return [bundle_uri, brightness_uri]


def results_of(task: Task) -> list[dict]:
    images = list_images(task.source, settings()).images
    return pa.Table.from_batches(task.results(images.to_batches(max_chunksize=20))).to_pylist()


def rows_of(output: Path) -> list[dict]:
    return read_results(output).sort_by([("path", "ascending"), ("model", "ascending")]).to_pylist()


def test_every_image_is_decoded_once_and_has_a_row_per_model(samples, models, tmp_path, monkeypatch):
    contents = Counter()

    def count(content, *limits):
        contents[bytes(content)] += 1
        return decode(content, *limits)

    decode = views.decode
    monkeypatch.setattr(views, "decode", count)
    rows = results_of(pipeline.make_task(str(samples), models, str(tmp_path), settings()))
    assert len(rows) == 2 * 64 and sorted(Counter(row["path"] for row in rows).values()) == [2] * 64
    files = Counter(path.read_bytes() for path in samples.rglob("*") if path.is_file())
    assert contents == files


def test_a_model_says_the_same_alone_and_with_others(samples, models, tmp_path):
    together = results_of(pipeline.make_task(str(samples), models, str(tmp_path), settings()))
    for model in models:
        alone = results_of(pipeline.make_task(str(samples), model, str(tmp_path), settings()))
        identity = alone[0]["model"]
        assert [row for row in together if row["model"] == identity] == alone and len(alone) == 64


@pytest.mark.parametrize("limit", ["HELD_BYTES", "HELD_IMAGES"])
def test_few_images_wait_for_the_other_model_where_they_are_large_or_many(
    samples, models, tmp_path, monkeypatch, limit
):
    monkeypatch.setattr(views, limit, 1)
    rows = results_of(pipeline.make_task(str(samples), models, str(tmp_path), settings()))
    assert len(rows) == 2 * 64
    ahead, most = Counter(), 0
    for row in rows:
        ahead[row["model"]] += 1
        most = max(most, abs(2 * ahead[row["model"]] - ahead.total()))
    assert most <= 1 + 4  # what is no image takes no memory


@pytest.fixture(scope="module")
def finished(spark, samples, models, tmp_path_factory) -> tuple[Path, pipeline.RunSummary]:
    output = tmp_path_factory.mktemp("several")
    return output, pipeline.run(spark, str(samples), models, str(output), settings(pictures=4))


def test_a_run_counts_images_and_not_rows(finished):
    output, summary = finished
    assert (summary.images, summary.ok, summary.failed, summary.skipped) == (64, 60, 4, 0)
    assert sum(count for _, count in summary.reasons()) == 4
    rows = rows_of(output)
    assert len(rows) == 128 and len({(row["path"], row["model"]) for row in rows}) == 128
    assert sum(record["bytes"] for record in summary.records) == sum(row["length"] for row in rows) // 2
    (run,) = read_runs(str(output)).to_dict("records")
    assert run["images"] == 64 and all(f"{name}@" in run["model"] for name in ("fashion_cnn-fp32", "brightness"))
    assert len(list((output / "pictures").iterdir())) == 4


@pytest.fixture
def output(finished, tmp_path) -> Path:
    return Path(shutil.copytree(finished[0], tmp_path / "output"))


def test_a_second_run_skips_images_with_a_row_of_each_model(spark, samples, models, output):
    before = rows_of(output)
    again = pipeline.run(spark, str(samples), models[::-1], str(output), settings())
    assert (again.images, again.ok, again.failed, again.skipped, again.failed_of_all) == (64, 0, 0, 64, 4)
    assert rows_of(output) == before


def test_a_run_of_fewer_models_than_the_results_have_is_refused(spark, samples, models, output):
    with pytest.raises(RunError, match="holds results of brightness@.*this run is of fashion_cnn-fp32@.*resume=false"):
        pipeline.run(spark, str(samples), models[0], str(output), settings())


def test_images_that_lack_a_model_are_worked_on_again_and_their_rows_replaced(spark, samples, models, tmp_path):
    output = tmp_path / "output"
    pipeline.run(spark, str(samples), models[0], str(output), settings())
    summary = pipeline.run(spark, str(samples), models, str(output), settings())
    assert (summary.ok, summary.failed, summary.skipped) == (60, 4, 0)
    assert Counter(row["path"] for row in rows_of(output)).most_common()[-1][1] == 2 and len(rows_of(output)) == 128


def test_the_same_model_twice_is_refused(samples, models, tmp_path):
    with pytest.raises(ConfigError, match="the same model twice"):
        pipeline.make_task(str(samples), [models[0], models[0]], str(tmp_path), settings())


def test_the_command_takes_several_models():
    options = _parser().parse_args(["run", "--source", "a", "--model", "b", "--model", "c", "--output", "d"])
    assert options.model == ["b", "c"]
