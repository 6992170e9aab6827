"""Runs on a real MLflow server: what it gets to know, and what happens without it."""

import json
import logging
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import mlflow
import numpy as np
import optuna
import pandas as pd
import pytest
import torch
from cluster import call, read_results
from mlflow.entities import Run as MlflowRun
from mlflow.tracking import MlflowClient
from mlflow_server import free_port, start_mlflow
from optuna.distributions import FloatDistribution
from pyspark import cloudpickle
from pyspark.sql import functions
from trainings import PROGRAMS, places

import fashion_mnist
from helpers import pipeline
from helpers.bundle.manifest import load_bundle
from helpers.config import PROJECT, load_config
from helpers.errors import BundleError, ConfigError, RunError, TrainingError
from helpers.export.registration import publish
from helpers.pipeline.pyfunc import OUTPUT_SCHEMA
from helpers.pipeline.runs import Run
from helpers.session import spark_schema
from helpers.storage import lock, open_storage
from helpers.tracking import registry
from helpers.tracking.mlflow import MLflow, open_writers, server, track
from helpers.tracking.tensorboard import read_scalars
from helpers.training import newest_step, rank, train_on_spark
from search import search
from studies.cluster import wait_for

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # the tasks cannot import a test

PASSWORD = "a-pass-word"  # of a user of a server
SIZES = ["--epochs", "2", "--batch-size", "64", "--train-images", "640", "--test-images", "200"]  # of a training
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


def runs(uri: str, experiment: str) -> list[MlflowRun]:
    client = MlflowClient(uri)
    return client.search_runs([client.get_experiment_by_name(experiment).experiment_id], order_by=["start_time"])


def curves(uri: str, run: MlflowRun) -> dict[str, list[tuple[int, float]]]:
    """Of each tag the steps and the values, in 32 bits as TensorBoard has them."""
    client = MlflowClient(uri)
    history = {tag: client.get_metric_history(run.info.run_id, tag) for tag in run.data.metrics}
    return {tag: [(one.step, float(np.float32(one.value))) for one in values] for tag, values in history.items()}


def events(folder: str | Path) -> dict[str, list[tuple[int, float]]]:
    tables = read_scalars(str(folder))
    return {tag: list(zip(table["step"], table["value"], strict=True)) for tag, table in tables.items()}


def files(uri: str, run: MlflowRun, folder: str | None = None) -> list[str]:
    """The artifacts of a run."""
    found = []
    for entry in MlflowClient(uri).list_artifacts(run.info.run_id, folder):
        found += files(uri, run, entry.path) if entry.is_dir else [entry.path]
    return found


def helpers(*arguments: Any) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "helpers", *map(str, arguments)],
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


def test_a_training_on_spark_is_one_run_with_all_that_its_dashboard_has(spark, uri, fashion_mnist_root, tmp_path):
    arguments = [*SIZES, *places(fashion_mnist_root, str(tmp_path)), "--mlflow", uri]
    result = train_on_spark(spark, PROGRAMS / "fashion_mnist.py", arguments, processes=2)
    run = MlflowClient(uri).get_run((tmp_path / "mlflow_run").read_text())
    found = curves(uri, run)
    assert found == events(tmp_path) and len(found["train/loss"]) == 20 and "throughput/rank_1" in found
    # Tasks do not have this process's environment, and so not its experiment.
    assert [one.info.run_name for one in runs(uri, "spark-vision")].count(tmp_path.name) == 1
    assert run.data.params["learning_rate"] == str(result["settings"]["learning_rate"])
    assert {"predictions/first/000000.png", "confusion/matrix/000000.png"} <= set(files(uri, run))


@pytest.mark.parametrize("error, status", [(RuntimeError, "FAILED"), (KeyboardInterrupt, "KILLED")])
def test_a_training_that_fails_or_is_interrupted_says_so_and_may_go_on(
    uri, experiment, fashion_mnist_root, tmp_path, error, status
):
    def stop(*_: Any) -> None:
        raise error

    options = fashion_mnist.parse([*SIZES, *places(fashion_mnist_root, str(tmp_path)), "--mlflow", uri])
    with pytest.raises(error):
        fashion_mnist.train(options, stop)
    assert [run.info.status for run in runs(uri, experiment)] == [status]
    fashion_mnist.train(options)
    (run,) = runs(uri, experiment)
    assert run.info.status == "FINISHED" and curves(uri, run) == events(tmp_path)


def test_a_rank_whose_task_has_gone_says_that_it_was_interrupted(uri, experiment, fashion_mnist_root, tmp_path):
    arguments = [*SIZES, "--epochs", "1000", *places(fashion_mnist_root, str(tmp_path)), "--mlflow", uri]
    command = [sys.executable, "-m", rank.__name__, tmp_path / "failure", PROGRAMS / "fashion_mnist.py", *arguments]
    with subprocess.Popen(list(map(str, command)), stdin=subprocess.PIPE, start_new_session=True) as process:
        wait_for("its run", (tmp_path / "mlflow_run").exists)
        wait_for("the first checkpoint", lambda: newest_step(f"{tmp_path}/checkpoints"))
    assert process.returncode == 1
    (run,) = runs(uri, experiment)
    assert run.info.status == "KILLED" and run.data.metrics["train/loss"] > 0


def test_an_argument_with_a_password_reaches_no_plan(spark, tmp_path):
    arguments = ["--run-dir", str(tmp_path), "--mlflow", f"http://user:{PASSWORD}@host:5000"]
    with pytest.raises(ConfigError, match="argument 4 .* holds a secret.*MLFLOW_TRACKING_PASSWORD") as raised:
        train_on_spark(spark, PROGRAMS / "fashion_mnist.py", arguments)
    assert PASSWORD not in str(raised.value)


SPACE = {"x": FloatDistribution(-4, 4)}


def parabola(trial: optuna.Trial) -> float:
    trial.report(1.0, 1)
    return -((trial.params["x"] - 2) ** 2)


def test_trials_are_runs_below_the_search(spark, uri, experiment, tmp_path):
    for trials in (2, 3):
        study = search(spark, parabola, SPACE, str(tmp_path), trials, parallel=1, mlflow=uri)
    first, *below = runs(uri, experiment)
    assert [run.info.run_name for run in below] == ["trial-0000", "trial-0001", "trial-0002"]
    for run, trial in zip(below, study.trials, strict=True):
        assert run.data.tags["mlflow.parentRunId"] == first.info.run_id
        assert float(run.data.params["x"]) == pytest.approx(trial.params["x"])
        assert curves(uri, run) == events(tmp_path / run.info.run_name)
    assert first.data.metrics["best/objective"] == pytest.approx(study.best_value) and len(study.trials) == 3


def fails(trial: optuna.Trial) -> float:
    raise ValueError(f"no value at {trial.params}")


def test_a_search_that_fails_says_so(spark, uri, experiment, tmp_path):
    with pytest.raises(TrainingError, match="none of 1 trials succeeded"):
        search(spark, fails, SPACE, str(tmp_path), 1, parallel=1, mlflow=uri)
    assert [run.info.status for run in runs(uri, experiment)] == ["FAILED"]


def test_a_search_that_is_interrupted_says_so_and_one_that_is_kept_out_changes_nothing(
    spark, uri, experiment, tmp_path, monkeypatch
):
    def statuses() -> list[str]:
        return [run.info.status for run in runs(uri, experiment)]

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    search(spark, parabola, SPACE, str(tmp_path), 1, parallel=1, mlflow=uri)
    with lock(open_storage(str(tmp_path)), "search.lock"), pytest.raises(TrainingError, match="another search"):
        search(spark, parabola, SPACE, str(tmp_path), 2, parallel=1, mlflow=uri)
    assert statuses() == ["FINISHED"] * 2  # of the search and its trial
    monkeypatch.setattr("search._run_on_spark", interrupt)
    with pytest.raises(KeyboardInterrupt):
        search(spark, parabola, SPACE, str(tmp_path), 2, parallel=1, mlflow=uri)
    assert statuses() == ["KILLED", "FINISHED"]


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


def test_a_run_of_the_pipeline_that_fails_says_why(spark, uri, experiment, samples, bundle_uri, tmp_path):
    settings = {"spark.master": "local[2]", "tracking.mlflow": uri, "inference.device": "GPU"}  # which is not there
    with pytest.raises(RunError, match="GPU"):
        pipeline.run(spark, str(samples), bundle_uri, str(tmp_path / "out"), load_config("local", **settings))
    (run,) = runs(uri, experiment)
    assert run.info.status == "FAILED" and run.data.params["config.inference.device"] == "GPU"
    file = MlflowClient(uri).download_artifacts(run.info.run_id, "error.txt", str(tmp_path))
    assert "GPU" in Path(file).read_text()


def test_a_run_of_the_pipeline_that_is_interrupted_says_so(
    spark, uri, experiment, samples, bundle_uri, tmp_path, monkeypatch
):
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Run, "_run_tasks", interrupt)
    config = load_config("local", **{"spark.master": "local[2]", "tracking.mlflow": uri})
    with pytest.raises(KeyboardInterrupt):
        pipeline.run(spark, str(samples), bundle_uri, str(tmp_path / "out"), config)
    assert [run.info.status for run in runs(uri, experiment)] == ["KILLED"]


def test_a_run_without_a_place_for_its_dashboard_has_its_numbers_on_the_server(
    spark, uri, experiment, samples, bundle_uri, tmp_path, caplog
):
    (tmp_path / "file").touch()
    settings = {"spark.master": "local[2]", "tracking.mlflow": uri, "paths.runs": str(tmp_path / "file")}
    pipeline.run(spark, str(samples), bundle_uri, str(tmp_path / "out"), load_config("local", **settings))
    assert "the run has no dashboard" in caplog.text
    (run,) = runs(uri, experiment)
    assert run.info.status == "FINISHED" and run.data.metrics["run/images"] == 64


def test_without_its_server_a_run_warns_once_and_ends_well(
    spark, samples, bundle_uri, tmp_path, monkeypatch, caplog, capfd
):
    monkeypatch.setenv("HELPERS_TRACKING__MLFLOW", f"http://user:{PASSWORD}@127.0.0.1:{free_port()}")
    config = load_config("local", **{"pictures": 2, "spark.master": "local[2]", "paths.runs": str(tmp_path / "tb")})
    assert pipeline.run(spark, str(samples), bundle_uri, str(tmp_path / "out"), config).ok == 60
    printed = capfd.readouterr()
    shown = f"{caplog.text}\n{printed.err}"
    (warning,) = [line for line in shown.splitlines() if "MLflow" in line or "127.0.0.1" in line]
    assert "does not have all of this run" in warning and "tracking.mlflow=off" in warning
    assert printed.out == "" and PASSWORD not in shown
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


def settings_of(uri: str, place: Path, **others: Any) -> dict[str, Any]:
    return {"tracking.mlflow": uri, "paths.models": str(place), "paths.runs": str(place / "tb"), **others}


def assignments(settings: dict[str, Any]) -> list[str]:
    return [part for name, value in settings.items() for part in ("--set", f"{name}={value}")]


def export_and_register(uri: str, checkpoint: Path, place: Path, *options: Any) -> dict[str, Any]:
    command = ["export", "--architecture", "fashion_cnn", "--checkpoint", checkpoint, "--output", place / "bundle"]
    answer = call(*command, *options, *assignments(settings_of(uri, place)))
    assert answer.returncode == 0, answer.stderr
    return json.loads(answer.stdout)


@pytest.fixture(scope="module")
def versions(uri, checkpoint, tmp_path_factory) -> list[str]:
    """Two versions of the model `fashion`, of networks with other weights; the first is the champion."""
    other = tmp_path_factory.mktemp("other") / "other.pt"
    torch.manual_seed(1)
    torch.save(fashion_mnist.FashionCNN().state_dict(), other)
    places = [tmp_path_factory.mktemp("registered") for _ in range(2)]
    first = export_and_register(uri, checkpoint, places[0], "--register", "fashion", "--alias", "champion")
    second = export_and_register(uri, other, places[1], "--register", "fashion")
    assert [first["registered"], second["registered"]] == ["models:/fashion/1", "models:/fashion/2"]
    return [first["model"].partition("@")[2], second["model"].partition("@")[2]]


def test_an_export_is_a_run_with_its_preview(uri, experiment, checkpoint, tmp_path):
    answer = export_and_register(uri, checkpoint, tmp_path)
    (run,) = runs(uri, experiment)
    manifest = load_bundle(open_storage(answer["bundle"])).manifest
    assert set(answer) == {"bundle", "model"}
    assert run.data.params["digest"] == manifest.digest and run.data.params["checkpoint.sha256"]
    assert files(uri, run) == ["preview.png"] and run.info.status == "FINISHED"


def test_the_model_has_what_it_needs_and_no_torch(uri, versions, tmp_path):
    source = MlflowClient(uri).get_model_version_download_uri("fashion", "1")
    folder = Path(mlflow.artifacts.download_artifacts(source, dst_path=str(tmp_path), tracking_uri=uri))
    needs = (folder / "requirements.txt").read_text()
    assert "openvino==" in needs and "torch" not in needs and "pyspark" not in needs
    code = folder / "code"
    assert [path.name for path in code.iterdir()] == ["helpers"] and not list(code.rglob("__pycache__"))
    script = """
import sys
sys.modules.update({name: None for name in ("torch", "pyspark", "deltalake", "yaml", "tensorboard")})
sys.path[:0] = [sys.argv[1]]
from helpers.pipeline import pyfunc
assert pyfunc.__file__.startswith(sys.argv[1])
print(len(pyfunc._load_pyfunc(sys.argv[2]).bundle.manifest.labels))
"""
    command = [sys.executable, "-P", "-c", script, str(code), str(folder / "data" / "bundle")]
    answer = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path, env={"PATH": "/bin"})
    assert answer.stdout.split() == ["10"]
    # MLflow puts this package before the project's own in the process that has loaded the model.
    script = "from helpers.export.cards import find_cards; from helpers.config import CONF, load_config; "
    script += "load_config('local'); print(CONF, find_cards())"
    answer = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=code)
    conf = code / "helpers" / "conf"
    assert answer.stdout.startswith(str(conf)) and "fashion_cnn" in answer.stdout
    tracked = subprocess.check_output(["git", "ls-files", "conf/*.yaml", "conf/*.properties"], cwd=PROJECT, text=True)
    ours = {Path(name).name for name in tracked.split() if Path(name).parent == Path("conf")}
    assert {path.name for path in conf.iterdir()} == ours | {"cards"}


def test_an_export_that_cannot_be_registered_says_so(uri, experiment, bundle_uri, tmp_path):
    with pytest.raises(BundleError, match="a/b cannot be registered"):
        publish(load_bundle(open_storage(bundle_uri)), load_config("local", **settings_of(uri, tmp_path)), "a/b")
    assert [run.info.status for run in runs(uri, experiment)] == ["FAILED"]


def predictions_of(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """By the file's name, with scores in 32 bits."""
    return {
        Path(row["path"]).name: (
            row["error"],
            row["width"],
            [(p["label"], p["score"]) for p in row["predictions"] or []],
        )
        for row in rows
    }


def test_a_run_by_alias_says_which_version_it_was_and_follows_the_alias(spark, uri, versions, samples, tmp_path):
    """Registered, moved to another alias, run by alias, rolled back."""
    client, models = MlflowClient(uri), []
    config = load_config("local", **settings_of(uri, tmp_path, **{"spark.master": "local[2]"}))
    for step, version in enumerate(("1", "2", "1")):
        client.set_registered_model_alias("fashion", "champion", version)
        output = str(tmp_path / f"out{step}")
        assert pipeline.run(spark, str(samples), "models:/fashion@champion", output, config).ok == 60
        rows = read_results(output)
        (model,) = rows["model"].unique().to_pylist()
        models.append((model, predictions_of(rows.to_pylist())))
    (first, one), (second, two), (third, again) = models
    assert first.startswith("fashion/1@") and second.startswith("fashion/2@") and len(first.partition("@")[2]) == 12
    assert first == third and one == again and one != two


def test_a_bundle_is_copied_once(uri, versions, tmp_path, monkeypatch):
    config = load_config("local", **settings_of(uri, tmp_path))
    bundle = registry.fetch("models:/fashion/1", config)
    assert bundle.manifest.digest == versions[0] and bundle.registered == "fashion/1"
    assert bundle.storage.root == str(tmp_path / "registered" / f"fashion-1-{versions[0]}")
    monkeypatch.setattr(registry, "_download", None)
    assert registry.fetch("models:/fashion/1", config).storage.root == bundle.storage.root


def test_a_copy_that_is_another_bundle_than_was_registered_is_refused(uri, versions, tmp_path):
    client = MlflowClient(uri)
    client.set_model_version_tag("fashion", "2", registry.DIGEST, "0123456789ab")
    try:
        with pytest.raises(BundleError, match=f"holds the bundle {versions[1]}, and was registered as 0123456789ab"):
            registry.fetch("models:/fashion/2", load_config("local", **settings_of(uri, tmp_path)))
    finally:
        client.set_model_version_tag("fashion", "2", registry.DIGEST, versions[1])
    assert not list(tmp_path.rglob("manifest.json"))


@pytest.mark.parametrize(
    "model, words",
    [
        ("models:/fashion", "write models:/NAME@ALIAS or models:/NAME/VERSION"),
        ("models:/fashion@nobody", "models:/fashion@nobody cannot be looked up .*alias nobody.*export --register"),
        ("models:/fashion/77", "models:/fashion/77 cannot be looked up .*not found"),
        ("models:/strange/1", "models:/strange/1 is no bundle: register one"),
    ],
)
def test_a_model_that_is_not_there_is_one_clear_error(uri, versions, tmp_path, model, words):
    if "strange" in model:
        client = MlflowClient(uri)
        client.create_registered_model("strange")
        run = MLflow(uri, "strange").identify()
        client.create_model_version("strange", f"runs:/{run}/model", run)
    with pytest.raises(BundleError, match=words):
        registry.fetch(model, load_config("local", **settings_of(uri, tmp_path)))


def test_a_registered_model_without_a_server_says_what_to_set(samples, checkpoint, tmp_path, caplog):
    run = ["run", "--source", samples, "--model", "models:/fashion@champion", "--output", tmp_path]
    export = ["export", "--architecture", "fashion_cnn", "--checkpoint", checkpoint, "--output", tmp_path]
    export += ["--register", "x"]
    for command in (run, export):
        answer = call(*command)
        assert answer.returncode == 2 and len(answer.stderr.splitlines()) == 1
        assert "set tracking.mlflow" in answer.stderr
    down = call(*export, "--set", f"tracking.mlflow=http://user:{PASSWORD}@127.0.0.1:{free_port()}")
    assert down.returncode == 2 and "x cannot be registered" in down.stderr
    assert PASSWORD not in down.stderr + down.stdout + caplog.text


def test_pyfunc_predicts_what_the_pipeline_predicts(spark, uri, versions, samples, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    config = load_config("local", **settings_of(uri, tmp_path, **{"spark.master": "local[2]"}))
    pipeline.run(spark, str(samples), "models:/fashion/1", str(tmp_path / "out"), config)
    expected = read_results(str(tmp_path / "out")).to_pylist()
    monkeypatch.setattr(sys, "path", [*sys.path])  # to which MLflow adds the model's code, for good
    model = mlflow.pyfunc.load_model("models:/fashion/1")
    paths = [row["path"] for row in expected]
    by_path = model.predict(pd.DataFrame({"path": paths}))
    by_content = model.predict(pd.DataFrame({"content": [Path(path).read_bytes() for path in paths]}))
    assert len(expected) == 64 and sum(row["error"] is not None for row in expected) == 4
    for predicted in (by_path, by_content):
        rows = predicted.assign(path=paths).to_dict("records")
        assert predictions_of(rows) == predictions_of(expected)


def test_spark_udf_predicts_what_the_pipeline_predicts(spark, uri, versions, samples, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    config = load_config("local", **settings_of(uri, tmp_path, **{"spark.master": "local[2]"}))
    pipeline.run(spark, str(samples), "models:/fashion/1", str(tmp_path / "out"), config)
    expected = read_results(str(tmp_path / "out")).to_pylist()
    as_json = {"result_type": "string", "params": {"format": "json"}}
    monkeypatch.setattr(sys, "path", [*sys.path])
    predict = mlflow.pyfunc.spark_udf(spark, "models:/fashion/1", env_manager="local", **as_json)
    table = spark.createDataFrame([(row["path"],) for row in expected], "path string").repartition(2)
    parsed = functions.from_json(predict(functions.struct("path")), spark_schema(OUTPUT_SCHEMA)).alias("row")
    rows = table.select("path", parsed).select("path", "row.*").collect()
    assert predictions_of([row.asDict(recursive=True) for row in rows]) == predictions_of(expected)


def test_a_workspace_has_its_models_in_unity_catalog(monkeypatch):
    """No workspace can be here: only that the right registry is asked for the right names."""
    monkeypatch.setenv("DATABRICKS_RUNTIME_VERSION", "18.0")
    asked = []

    class Client:
        def __init__(self, *uris: str):
            asked.append(uris)

        def get_model_version_by_alias(self, *names: str) -> SimpleNamespace:
            asked.append(names)
            return SimpleNamespace(version=3, tags={registry.DIGEST: "0123456789ab"})

    monkeypatch.setattr("mlflow.tracking.MlflowClient", Client)
    assert registry.pin("models:/main.vision.fashion@champion", load_config("local")) == "models:/main.vision.fashion/3"
    assert asked == [("databricks", "databricks-uc"), ("main.vision.fashion", "champion")]
