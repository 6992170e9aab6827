"""The pipeline over a real Spark Connect server; `test_sources` has the one that `remote("local[2]")` starts."""

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import connect_client
import pyarrow as pa
import pytest
from cluster import Finished, call, read_rows
from connect_client import client_process
from trainings import train_fashion

from helpers import pipeline
from helpers.config import PROJECT, load_config
from helpers.java import local_options
from helpers.pipeline import listing as ingest
from studies.cluster import LOOPBACK, SPARK_HOME, Process, wait_for

NOTEBOOKS = sorted((PROJECT / "notebooks").glob("0[4-7]_*.ipynb"))
EPOCHS = 2  # enough for the accuracy that notebook 07 asserts
LISTENS = r"Spark Connect server started at: \S+:(\d+)"
PROGRAM = """
import json, os, sys
import helpers.training
print("this is rank", os.environ["RANK"], "of", os.environ["WORLD_SIZE"])
if sys.argv[1] == "badly" and os.environ["RANK"] == "1":
    raise ValueError("so it is told")
print(json.dumps({"rank": int(os.environ["RANK"])}))
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[str]:
    """The address of a server with two slots, a process that knows nothing of this one."""
    command = [str(SPARK_HOME / "bin" / "spark-class"), "org.apache.spark.deploy.SparkSubmit", "--master", "local[2,4]"]
    settings = {
        "connect.grpc.binding.address": LOOPBACK,
        "connect.grpc.binding.port": "0",
        "driver.host": LOOPBACK,
        "ui.enabled": "false",
        "driver.extraJavaOptions": local_options(),
    }
    command += [part for key, value in settings.items() for part in ("--conf", f"spark.{key}={value}")]
    command += ["--class", "org.apache.spark.sql.connect.service.SparkConnectServer", "spark-internal"]
    log = tmp_path_factory.mktemp("connect") / "server.log"
    process = Process(command, log, {"PYSPARK_PYTHON": sys.executable})
    try:
        yield f"sc://{LOOPBACK}:{wait_for('the server', lambda: re.search(LISTENS, process.errors))[1]}"
        assert process.popen.poll() is None, process.errors
    finally:
        process.kill()


@pytest.fixture(scope="module")
def client(server) -> Iterator[Callable[..., Any]]:
    """Runs a function in a process whose Spark that server is; one for all, because it takes seconds to start."""
    with client_process(server) as run_there:
        yield run_there


@pytest.fixture(scope="module")
def expected(samples, bundle_uri, tmp_path_factory) -> list[dict]:
    """What the stages give in this process, without any Spark."""
    config = load_config("local")
    task = pipeline.make_task(str(samples), bundle_uri, str(tmp_path_factory.mktemp("unused")), config)
    listed = ingest.list_images(task.source, config).images
    return pa.Table.from_batches(task.results(listed.to_batches())).sort_by("path").to_pylist()


@pytest.fixture(scope="module")
def models(fashion_mnist_root, tmp_path_factory) -> Path:
    """The folder with the int8 bundle that the notebooks take: that of notebook 03, or one made in less time."""
    for made in (PROJECT / "out" / "tested" / "models", Path(load_config("local").paths.models)):
        if (made / "fashion_cnn-int8" / "manifest.json").exists():
            return made
    from helpers.export.architectures import get_architecture
    from helpers.export.conversion import calibration_images, export
    from helpers.storage import open_storage
    from studies.samples import write_images

    folder = tmp_path_factory.mktemp("models")
    train_fashion(["--epochs", str(EPOCHS)], fashion_mnist_root, folder / "run")
    calibration = write_images(fashion_mnist_root, str(folder / "calibration"), train=True, count=1000)
    config = load_config("local")
    images = calibration_images(open_storage(str(calibration)), get_architecture("fashion_cnn"), config)
    checkpoint = folder / "run" / "checkpoint.pt"
    export("fashion_cnn", checkpoint, open_storage(str(folder / "fashion_cnn-int8")), "int8", images)
    return folder


def test_the_stages_one_by_one_give_what_one_process_does(client, samples, bundle_uri, expected):
    for reader in ("files", "spark"):
        table = client(connect_client.run_stages, str(samples), bundle_uri, reader)
        assert table.sort_by("path").to_pylist() == expected


def test_what_a_server_refuses_is_told_and_stops_nothing(client):
    """As Databricks serverless does with most settings."""
    assert "this Spark keeps its own spark.executor.memory" in client(connect_client.set_what_is_refused)


def test_the_command_runs_over_a_server_and_resumes(client, samples, bundle_uri, expected, tmp_path):
    arguments = ["run", "--source", str(samples), "--model", bundle_uri, "--output", str(tmp_path / "out")]
    summaries = []
    for _ in range(2):
        code, answer, errors = client(connect_client.call, *arguments)
        assert code == 0, errors
        summaries.append(json.loads(answer))
    first, again = summaries
    assert (first["ok"], first["failed"], first["partitions"]) == (60, 4, 2)
    assert (again["ok"], again["skipped"]) == (0, 64)
    assert read_rows(tmp_path / "out") == expected


def test_a_model_that_the_server_cannot_read_is_one_clear_error(client, samples, bundle_uri, tmp_path):
    bundle, output = tmp_path / "bundle", tmp_path / "out"
    shutil.copytree(bundle_uri, bundle)
    with (bundle / "model.bin").open("r+b") as weights:
        weights.truncate(100)
    manifest = json.loads((bundle / "manifest.json").read_text())
    # The server's workers have the whole one, and would read no file of it again.
    (bundle / "manifest.json").write_text(json.dumps({**manifest, "name": "cut short"}))
    arguments = ["run", "--source", str(samples), "--model", str(bundle), "--output", str(output)]
    Finished(output, *client(connect_client.call, *arguments)).assert_one_clear_error("model.bin")


def test_where_no_server_answers_there_is_one_clear_error_at_once(samples, bundle_uri, tmp_path, caplog):
    with contextlib.closing(socket.create_server((LOOPBACK, 0))) as free:
        port = free.getsockname()[1]
    settings = ["--set", "spark.mode=connect", "--set", f"spark.master=sc://{LOOPBACK}:{port}/;token=planted"]
    answer = call("run", *settings, "--source", samples, "--model", bundle_uri, "--output", tmp_path / "out")
    run = Finished(tmp_path / "out", answer.returncode, answer.stdout, answer.stderr)
    run.assert_one_clear_error(f"{LOOPBACK}:{port}", "start-connect-server.sh", "spark.master")
    assert "planted" not in run.errors + caplog.text


def test_a_program_is_trained_over_a_server(client, tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    result, error, printed = client(connect_client.train, str(tmp_path / "program.py"))
    assert result == {"rank": 0} and error == "rank 1 of 2 failed with ValueError: so it is told"
    assert printed.splitlines()[:2] == ["this is rank 0 of 2"] * 2


def test_the_notebooks_of_the_four_stages_run_over_connect_with_the_same_outputs(server, models, tmp_path):
    assert len(NOTEBOOKS) == 4
    environment = {
        "HELPERS_SPARK__MODE": "connect",
        "HELPERS_SPARK__MASTER": server,
        "HELPERS_PATHS__MODELS": str(models),
        "HELPERS_PATHS__RESULTS": str(tmp_path / "results"),
    }
    command = [sys.executable, "-m", "pytest", "-q", "--nbval", *map(str, NOTEBOOKS)]
    command += ["--nbval-sanitize-with", "conf/nbval.cfg", "-p", "no:cacheprovider"]
    ran = subprocess.run(
        command, cwd=PROJECT, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stdout[-5000:]
    cells = [cell for path in NOTEBOOKS for cell in json.loads(path.read_text())["cells"]]
    executed = [c for c in cells if c["cell_type"] == "code" and "nbval-skip" not in c["metadata"].get("tags", [])]
    assert f"{len(executed)} passed" in ran.stdout
