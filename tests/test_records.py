import json
import shutil
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest

from helpers import pipeline
from helpers.config import load_config
from helpers.errors import DataError
from helpers.pipeline.records import RUNS, read_runs, read_tasks, shown_settings
from helpers.pipeline.results import ResultStore
from helpers.pipeline.task import RECORD_SCHEMA, STAGES
from helpers.storage import open_storage

LOCAL = {"spark.master": "local[2]", "partitioning.partitions": 4}


@pytest.fixture(scope="module")
def output(spark, samples, bundle_uri, tmp_path_factory) -> str:
    """Of a run over the samples, and another that had nothing to do."""
    output = str(tmp_path_factory.mktemp("recorded"))
    place = str(tmp_path_factory.mktemp("runs"))
    config = load_config("local", **{**LOCAL, "paths.runs": place, "pictures": 2})
    summary = pipeline.run(spark, str(samples), bundle_uri, output, config, session_seconds=5.0)
    again = pipeline.run(spark, str(samples), bundle_uri, output, config)
    assert (summary.ok, again.skipped) == (60, 64)
    return output


def test_a_run_leaves_its_record_and_one_that_did_nothing_none(output):
    names = sorted(path.name for path in Path(output, RUNS).iterdir())
    run = names[0].removesuffix(".json")
    assert names == [f"{run}.json", f"{run}.parquet"]
    assert all(path.name.startswith(run) for path in Path(output, "results").glob("*.parquet"))
    kept = [name for name in RECORD_SCHEMA.names if name not in ("statistics", "distribution")]
    assert pq.read_schema(Path(output, RUNS, names[1])).names == kept


def test_the_record_of_a_run_says_what_it_was_and_took(output):
    (run,) = read_runs(output).to_dict("records")
    assert (run["images"], run["failed"], run["partitions"], run["slots"], run["retries"]) == (64, 4, 4, 2, 0)
    assert run["model"].startswith("fashion_cnn-fp32@") and len(run["bundle"]) == 12
    assert run["output"] == output and run["master"] == "local[2]"
    assert run["versions"]["pyspark"] == run["spark"] and None not in run["versions"].values()
    assert run["config"]["partitioning"]["partitions"] == 4
    assert run["session_seconds"] == 5.0
    phases = [run[f"{name}_seconds"] for name in ("open", "list", "pass", "publish", "log")]
    assert min(phases) > 0 and sum(phases) == pytest.approx(run["seconds"], rel=0.01)
    assert run["started"] < run["list_ended"] < run["pass_ended"] < run["publish_ended"] < run["log_ended"]


def test_the_tasks_of_a_run_are_one_table_whose_times_are_since_the_pass_began(output):
    tasks, (run,) = read_tasks(output), read_runs(output).to_dict("records")
    assert len(tasks) == 4 and set(tasks["partition"]) == {0, 1, 2, 3}
    assert (tasks["images"].sum(), tasks["failed"].sum(), tasks["bytes"].sum()) == (64, 4, run["bytes"])
    assert set(tasks["run"]) == {run["run"]} and set(tasks["output"]) == {output}
    assert (tasks["begin"] > 0).all() and (tasks["end"] < run["pass_seconds"]).all()
    stages = tasks[[f"{stage}_seconds" for stage in STAGES]]
    assert (stages >= 0).all(axis=None)
    pd.testing.assert_series_equal(stages.sum(axis=1), tasks["seconds"], check_names=False)
    assert tasks["executor"].nunique() == 1
    assert (tasks["thread_seconds"] > 0).all() and (tasks["thread_seconds"] <= tasks["cpu_seconds"]).all()
    # The clock of a thread and that of the processor are read one after the other.
    assert (tasks["thread_seconds"] <= tasks["seconds"] + 0.01).all()


def test_a_worker_loads_its_model_once(output):
    loads = read_tasks(output).sort_values("begin").groupby("process")["load_seconds"]
    assert (loads.apply(lambda values: (values.iloc[1:] == 0).all())).all()


def test_several_outputs_are_read_as_one_table_and_no_run_twice(output, tmp_path):
    other = tmp_path / "deep" / "other"
    shutil.copytree(Path(output, RUNS), other / RUNS)
    for path in (other / RUNS).glob("*.json"):
        values = json.loads(path.read_text())
        path.rename(path.with_name("20990101T000000-00000000.json"))
        path.with_suffix(".parquet").rename(path.with_name("20990101T000000-00000000.parquet"))
        values["run"] = "20990101T000000-00000000"
        path.with_name("20990101T000000-00000000.json").write_text(json.dumps(values))
    both = [output, str(tmp_path)]
    assert len(read_runs(both)) == 2 and len(read_tasks(both)) == 8
    assert len(read_tasks([output, f"{output}/{RUNS}", output])) == 4


def test_outputs_below_a_folder_named_like_that_of_records_have_their_records_read_alone(output, tmp_path):
    shutil.copytree(output, tmp_path / RUNS / "one")
    assert list((tmp_path / RUNS / "one").rglob("_delta_log/*.json"))
    assert read_runs(str(tmp_path))["run"].tolist() == read_runs(str(tmp_path / RUNS))["run"].tolist() != []
    assert read_runs(output)["run"].tolist() == read_runs(str(tmp_path))["run"].tolist()


def test_a_driver_that_dies_before_it_publishes_has_left_the_record(spark, samples, bundle_uri, tmp_path, monkeypatch):
    """And the next run publishes what the record is about."""
    config = load_config("local", **{**LOCAL, "paths.runs": str(tmp_path / "tb")})
    arguments = spark, str(samples), bundle_uri, str(tmp_path / "out"), config

    def die(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as killed:
        killed.setattr(ResultStore, "publish", die)
        with pytest.raises(KeyboardInterrupt):
            pipeline.run(*arguments)
    (run,) = read_runs(str(tmp_path / "out")).to_dict("records")
    assert run["images"] == 64 and run["pass_seconds"] > 0
    assert pd.isna(run["publish_seconds"]) and pd.isna(run["seconds"])
    assert pipeline.run(*arguments).skipped == 64
    published = {path.name for path in (tmp_path / "out" / "results").glob("*.parquet")}
    assert {name.rpartition("-")[0][: len(run["run"])] for name in published} == {run["run"]}
    assert len(read_tasks(str(tmp_path / "out"))) == 4


def test_the_dashboard_has_the_same_numbers(spark, samples, bundle_uri, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = load_config("local", **{**LOCAL, "paths.runs": str(tmp_path / "tb")})
    pipeline.run(spark, str(samples), bundle_uri, str(tmp_path / "out"), config, session_seconds=7.0)
    (folder,) = (tmp_path / "tb" / "pipeline").iterdir()
    events = EventAccumulator(str(folder)).Reload()
    tasks = read_tasks(str(tmp_path / "out")).sort_values("end")

    def logged(tag: str) -> list[float]:
        return [event.value for event in events.Scalars(tag)]

    for stage in STAGES:
        assert logged(f"stage/{stage}_seconds") == pytest.approx(tasks[f"{stage}_seconds"].tolist())
    assert logged("task/seconds") == pytest.approx(tasks["seconds"].tolist())
    assert logged("run/megabytes") == pytest.approx((tasks["bytes"].cumsum() / 2**20).tolist())
    assert logged("run/session_seconds") == [7.0]
    (run,) = read_runs(str(tmp_path / "out")).to_dict("records")
    assert logged("run/pass_seconds") == pytest.approx([run["pass_seconds"]])


def test_no_setting_that_can_hold_a_secret_is_recorded():
    config = load_config(
        "local",
        **{
            "spark.mode": "connect",
            "spark.master": "sc://user:s3cret@host:443/;token=s3cret;use_ssl=true",
            "spark.conf.fs.azure.account.key.photos.dfs.core.windows.net": "s3cret",
            "spark.conf.spark.hadoop.fs.s3a.access.key": "s3cret",
            "spark.conf.spark.executor.cores": 4,
            "storage.credential": "env:s3cret",
        },
    )
    shown = shown_settings(config)
    assert "s3cret" not in json.dumps(shown)
    assert shown["spark"]["master"] == "sc://host:443"
    assert shown["spark"]["conf"] == {"spark.executor.cores": "4"}


def test_the_records_are_no_source_of_images(tmp_path):
    store = ResultStore(open_storage(str(tmp_path)))
    assert str(tmp_path / RUNS) in store.folders


def test_where_there_is_no_record_or_a_damaged_one_the_error_says_so(output, tmp_path):
    with pytest.raises(DataError, match="no records of runs below .*--output"):
        read_runs(str(tmp_path))
    shutil.copytree(Path(output, RUNS), tmp_path / RUNS)
    next((tmp_path / RUNS).glob("*.json")).write_text("{")
    with pytest.raises(DataError, match="json is not the record of a run"):
        read_tasks(str(tmp_path))
