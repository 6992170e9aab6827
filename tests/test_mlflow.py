"""Runs on a real MLflow server: what it gets to know, and what happens without it."""

import json
import logging
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import optuna
import pytest
from mlflow.entities import Run
from mlflow.tracking import MlflowClient
from mlflow_server import free_port, start_mlflow
from optuna.distributions import FloatDistribution
from pyspark import cloudpickle
from trainings import PROGRAMS, places

from helpers.bundle.manifest import load_bundle
from helpers.config import load_config
from helpers.errors import ConfigError
from helpers.storage import open_storage
from helpers.tracking.mlflow import MLflow, open_writers, server, track
from helpers.tracking.tensorboard import read_scalars
from helpers.training import train_on_spark
from search import search

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # the tasks cannot import a test

PASSWORD = "a-pass-word"  # of a user of a server
PNG = cv2.imencode(".png", np.full((3, 5, 3), 7, np.uint8))[1].tobytes()


@pytest.fixture(scope="session")
def uri(tmp_path_factory) -> Iterator[str]:
    with start_mlflow(tmp_path_factory.mktemp("mlflow")) as address:
        yield address


@pytest.fixture
def experiment(request, monkeypatch) -> str:
    """Runs of a test apart from those of others."""
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", request.node.name)
    return request.node.name


def runs(uri: str, experiment: str) -> list[Run]:
    client = MlflowClient(uri)
    return client.search_runs([client.get_experiment_by_name(experiment).experiment_id], order_by=["start_time"])


def curves(uri: str, run: Run) -> dict[str, list[tuple[int, float]]]:
    """Of each tag the steps and the values, in 32 bits as TensorBoard has them."""
    client = MlflowClient(uri)
    history = {tag: client.get_metric_history(run.info.run_id, tag) for tag in run.data.metrics}
    return {tag: [(one.step, float(np.float32(one.value))) for one in values] for tag, values in history.items()}


def events(folder: str | Path) -> dict[str, list[tuple[int, float]]]:
    tables = read_scalars(str(folder))
    return {tag: list(zip(table["step"], table["value"], strict=True)) for tag, table in tables.items()}


def files(uri: str, run: Run, folder: str | None = None) -> list[str]:
    """The artifacts of a run."""
    found = []
    for entry in MlflowClient(uri).list_artifacts(run.info.run_id, folder):
        found += files(uri, run, entry.path) if entry.is_dir else [entry.path]
    return found


def helpers(*arguments: Any, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "helpers", *map(str, arguments)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def warnings_of(text: str) -> list[str]:
    return [line for line in text.splitlines() if "MLflow" in line]


def test_auto_is_the_workspaces_own_server_and_elsewhere_none(monkeypatch):
    assert server("auto") is None and server("off") is None and server("http://host:5000") == "http://host:5000"
    monkeypatch.setenv("DATABRICKS_RUNTIME_VERSION", "18.0")
    assert server("auto") == "databricks" and server("off") is None


@pytest.mark.parametrize("value", ["off", False])
def test_off_is_no_boolean_although_yaml_reads_one(value):
    assert load_config("local", **{"tracking.mlflow": value}).tracking.mlflow == "off"


def test_a_run_that_goes_on_is_one_run_whose_curves_are_tensorboards(uri, experiment, tmp_path):
    for steps in (0, 3, 4):  # what a training does again after a crash, it measures again
        writer = open_writers(str(tmp_path), uri, {"seed": 1}, steps)
        for step in range(steps + 1, steps + 4):
            writer.log_scalars({"train/loss": 1 / step, "train/accuracy": step}, step)
        writer.log_picture("predictions/validation", PNG, steps)
        writer.close()
    (run,) = runs(uri, experiment)
    assert curves(uri, run) == events(tmp_path)
    assert [step for step, _ in curves(uri, run)["train/loss"]] == [1, 2, 3, 4, 5, 6, 7]
    assert run.info.status == "FINISHED" and run.info.run_name == tmp_path.name and run.data.params == {"seed": "1"}
    assert files(uri, run) == [f"predictions/validation/{step:06d}.png" for step in (0, 3, 4)]


def test_many_measurements_and_long_parameters_arrive(uri, experiment, tmp_path):
    writer = MLflow(uri, "many")
    writer.log_settings({f"p{number}": number for number in range(150)} | {"deep": {"er": "x" * 10_000}})
    for step in range(2500):
        writer.log_scalars({"a/b": float(step), "a/nan": float("nan")}, step)
    writer.close()
    (run,) = runs(uri, experiment)
    assert [value for _, value in curves(uri, run)["a/b"]] == list(range(2500))
    assert len(run.data.params) == 151 and run.data.params["deep.er"] == "x" * 6000


def test_texts_and_pictures_are_files_of_the_run(uri, experiment, tmp_path):
    writer = MLflow(uri, "files")
    writer.log_text("run/record.json", "{}")
    writer.log_text("note", "a")
    writer.log_picture("pictures/a b.png", PNG)
    writer.close()
    (run,) = runs(uri, experiment)
    assert sorted(files(uri, run)) == ["note.txt", "pictures/a b.png", "run/record.json"]
    client = MlflowClient(uri)
    assert Path(client.download_artifacts(run.info.run_id, "pictures/a b.png", str(tmp_path))).read_bytes() == PNG


def test_a_training_on_spark_is_one_run_with_all_that_its_dashboard_has(
    spark, uri, experiment, fashion_mnist_root, tmp_path
):
    sizes = ["--epochs", "2", "--batch-size", "64", "--train-images", "640", "--test-images", "200"]
    arguments = [*sizes, *places(fashion_mnist_root, str(tmp_path)), "--mlflow", uri]
    result = train_on_spark(spark, PROGRAMS / "fashion_mnist.py", arguments, processes=2)
    run = MlflowClient(uri).get_run((tmp_path / "mlflow_run").read_text())
    found = curves(uri, run)
    assert found == events(tmp_path) and len(found["train/loss"]) == 20 and "throughput/rank_1" in found
    assert len(runs(uri, "spark-vision")) == 1  # tasks do not have this process's environment
    assert run.data.params["learning_rate"] == str(result["settings"]["learning_rate"])
    assert {"predictions/first/000000.png", "confusion/matrix/000000.png"} <= set(files(uri, run))


def test_an_argument_with_a_password_reaches_no_plan(spark, tmp_path):
    arguments = ["--run-dir", str(tmp_path), "--mlflow", f"http://user:{PASSWORD}@host:5000"]
    with pytest.raises(ConfigError, match="argument 4 .* holds a secret.*MLFLOW_TRACKING_PASSWORD") as raised:
        train_on_spark(spark, PROGRAMS / "fashion_mnist.py", arguments)
    assert PASSWORD not in str(raised.value)


def parabola(trial: optuna.Trial) -> float:
    trial.report(1.0, 1)
    return -((trial.params["x"] - 2) ** 2)


def test_trials_are_runs_below_the_search(spark, uri, experiment, tmp_path):
    for trials in (2, 3):
        study = search(spark, parabola, {"x": FloatDistribution(-4, 4)}, str(tmp_path), trials, parallel=1, mlflow=uri)
    first, *below = runs(uri, experiment)
    assert [run.info.run_name for run in below] == ["trial-0000", "trial-0001", "trial-0002"]
    for run, trial in zip(below, study.trials, strict=True):
        assert run.data.tags["mlflow.parentRunId"] == first.info.run_id
        assert float(run.data.params["x"]) == pytest.approx(trial.params["x"])
        assert curves(uri, run) == events(tmp_path / run.info.run_name)
    assert first.data.metrics["best/objective"] == pytest.approx(study.best_value) and len(study.trials) == 3


def test_a_run_of_the_pipeline_has_its_numbers_settings_and_pictures(uri, experiment, samples, bundle_uri, tmp_path):
    command = ["run", "--source", samples, "--model", bundle_uri, "--output", tmp_path / "out"]
    settings = {f"tracking.mlflow={uri}", "pictures=2", "spark.master=local[2]", f"paths.runs={tmp_path / 'tb'}"}
    answer = helpers(*command, *(part for setting in settings for part in ("--set", setting)))
    assert answer.returncode == 0, answer.stderr
    assert [json.loads(line)["ok"] for line in answer.stdout.splitlines()] == [60]  # nothing else is printed
    assert warnings_of(answer.stderr) == []
    (run,), (folder,) = runs(uri, experiment), (tmp_path / "tb" / "pipeline").iterdir()
    assert curves(uri, run) == events(folder) and run.info.run_name == folder.name
    assert "stage/infer_seconds" in run.data.metrics and "run/pass_seconds" in run.data.metrics
    assert run.data.params["bundle"] == load_bundle(open_storage(bundle_uri)).manifest.digest
    assert run.data.params["config.inference.threads"] == "1" and "versions.openvino" in run.data.params
    pictures = {f"pictures/{path.name}" for path in (tmp_path / "out" / "pictures").iterdir()}
    assert len(pictures) == 2 and set(files(uri, run)) == pictures | {"run/record.json"}


def test_without_its_server_a_run_warns_once_and_ends_well(samples, bundle_uri, tmp_path):
    address = f"http://user:{PASSWORD}@127.0.0.1:{free_port()}"
    command = ["run", "--source", samples, "--model", bundle_uri, "--output", tmp_path / "out", "--set", "pictures=2"]
    command += ["--set", "spark.master=local[1]", "--set", f"paths.runs={tmp_path / 'tb'}"]
    answer = helpers(*command, HELPERS_TRACKING__MLFLOW=address)
    assert answer.returncode == 0, answer.stderr
    (warning,) = [line for line in answer.stderr.splitlines() if "MLflow" in line or "127.0.0.1" in line]
    assert "does not have all of this run" in warning and "tracking.mlflow=off" in warning
    assert json.loads(answer.stdout)["ok"] == 60 and PASSWORD not in answer.stderr + answer.stdout
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) > 5 and not [path for path in written if PASSWORD.encode() in path.read_bytes()]


def test_a_server_that_never_answers_is_given_up(monkeypatch, caplog, tmp_path):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        writer = open_writers(str(tmp_path), f"http://127.0.0.1:{silent.getsockname()[1]}", {"seed": 1})
        for step in range(1, 51):
            writer.log_scalars({"train/loss": 1 / step}, step)
            writer.publish()
        writer.close()
    warning = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(warning) == 1 and "MLflow does not have all of this run" in warning[0].getMessage()
    assert len(events(tmp_path)["train/loss"]) == 50


def test_what_cannot_be_sent_in_time_is_given_up(monkeypatch, caplog):
    """And the process does not wait for it at its end either."""
    monkeypatch.setattr("helpers.tracking.mlflow.CLOSE_SECONDS", 0.1)
    blocked = threading.Event()
    writer = MLflow("http://127.0.0.1:1", "slow")
    monkeypatch.setattr(writer, "_begin", blocked.wait)
    writer.log_scalars({"a/b": 1.0}, 1)
    writer.close()
    blocked.set()
    assert "takes longer than" in caplog.text


def test_nothing_of_mlflow_is_imported_where_it_is_off(samples, bundle_uri, tmp_path):
    script = f"""
import sys
sys.modules["mlflow"] = None
from helpers.cli import main
code = main(["run", "--source", {str(samples)!r}, "--model", {bundle_uri!r}, "--output", {str(tmp_path / "out")!r},
    "--set", "spark.master=local[1]"])
sys.exit(code)
"""
    answer = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert answer.returncode == 0 and warnings_of(answer.stderr) == [], answer.stderr


def test_the_client_is_enough_without_the_parts_of_a_server():
    """`mlflow-skinny` is what the project needs; the tests have the whole, which must not be reached."""
    script = """
import sys
sys.modules.update({name: None for name in ("torch", "flask", "sqlalchemy", "sklearn", "matplotlib", "docker")})
from helpers.tracking.mlflow import connect
connect("http://127.0.0.1:1")
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def test_a_folder_gives_its_run_the_name(uri, experiment, tmp_path):
    track(uri, f"{tmp_path / 'mine'}/", goes_on=False).identify()
    assert [run.info.run_name for run in runs(uri, experiment)] == ["mine"]
