"""conf/yarn.sh on a real YARN: a ResourceManager and two NodeManagers, whose nodes have no package of ours."""

import contextlib
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pyarrow as pa
import pytest
from cluster import Run

from helpers import pipeline
from helpers.config import PROJECT, load_config
from helpers.java import local_options
from helpers.pipeline import listing
from studies.cluster import Process, arguments_of, wait_for

HERE = Path(__file__).parent / "yarn"
LIBRARIES = Path(sys.prefix, "yarn")  # Hadoop's, 100 MB, once per environment
SMALL = {"EXECUTORS": "2", "CORES": "1", "HEAP": "512m", "OVERHEAD": "512m", "DRIVER_HEAP": "512m"}
# A large cluster's master is asked less often.
OFTEN = ["--conf", "spark.yarn.report.interval=200ms", "--conf", "spark.yarn.scheduler.heartbeat.interval-ms=200"]


@dataclass
class Yarn:
    """The cluster's process, and the folder that HADOOP_CONF_DIR names."""

    process: Process
    conf: Path

    def executors(self) -> list[psutil.Process]:
        """The JVMs of the executors; containers leave the session of their cluster, but not its tree."""
        tree = psutil.Process(self.process.popen.pid).children(recursive=True)
        executors = [p for p in tree if any("YarnCoarseGrainedExecutorBackend" in part for part in arguments_of(p))]
        return [p for p in executors if p.name() == "java"]

    def start(self, log: Path, output: Path, *arguments: str, **settings: str) -> Run:
        """conf/yarn.sh as a user calls it; its results are below `output`."""
        path = f"{self.conf.parent / 'bin'}{os.pathsep}{os.environ['PATH']}"
        environment = {"HADOOP_CONF_DIR": str(self.conf), "PATH": path, "SPARK_SUBMIT_OPTS": local_options()}
        environment |= {**SMALL, **settings}
        return Run(output, Process(["sh", "conf/yarn.sh", *arguments, *OFTEN], log, environment))

    def stop(self) -> None:
        """End the cluster, and what it started."""
        tree = psutil.Process(self.process.popen.pid).children(recursive=True)
        self.process.popen.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.popen.wait(20)
        for process in tree:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.kill()


@pytest.fixture(scope="module")
def yarn(tmp_path_factory) -> Iterator[Yarn]:
    if not shutil.which("mvn"):
        assert not os.environ.get("CI"), "Hadoop's libraries come by mvn, which CI must have"
        pytest.skip("Hadoop's libraries come by mvn, which is not here")
    if not LIBRARIES.is_dir():
        unfinished = LIBRARIES.with_suffix(".unfinished")
        target = f"-DoutputDirectory={unfinished}"
        command = ["mvn", "-q", "-B", "-f", str(HERE / "pom.xml"), "dependency:copy-dependencies", target]
        subprocess.run(command, check=True)
        unfinished.rename(LIBRARIES)
    folder = tmp_path_factory.mktemp("yarn")
    conf = folder / "conf"
    conf.mkdir()
    command = folder / "bin" / "yarn"  # what the nodes of a cluster have, for the logs
    command.parent.mkdir()
    logs = f'exec java {local_options()} -cp "{LIBRARIES}/*:{conf}" org.apache.hadoop.yarn.client.cli.LogsCLI "$@"'
    command.write_text(f"#!/bin/sh\nshift\n{logs}\n")
    command.chmod(0o755)
    opens = [f"--add-opens=java.base/java.{name}=ALL-UNNAMED" for name in ("lang", "util", "io")]
    command = ["java", *opens, "-Xmx1g", *shlex.split(local_options())]
    command += ["-cp", f"{LIBRARIES}/*{os.pathsep}{HERE}", f"-Duser.dir={folder}"]
    started = Yarn(Process([*command, str(HERE / "SmallYarn.java"), str(conf)], folder / "yarn.log"), conf)

    def ready() -> bool:
        assert started.process.popen.poll() is None, started.process.errors
        return "ready" in started.process.answer

    try:
        wait_for("YARN", ready)
        yield started
    finally:
        started.stop()
        shutil.rmtree(folder, ignore_errors=True)  # the nodes' unpacked archives are 6 GB


@pytest.fixture(scope="module")
def prepared(yarn, archive) -> Iterator[str]:
    """A place of the nodes' with Spark and the archive."""
    with tempfile.TemporaryDirectory() as folder:
        # As in HDFS, and unlike pytest's own folders: a node unpacks what everybody may read once for all applications.
        Path(folder).chmod(0o755)
        place = f"viewfs://small{folder}/place"
        environment = {**os.environ, "HADOOP_CONF_DIR": str(yarn.conf), "ARCHIVE": str(archive)}
        environment["SPARK_SUBMIT_OPTS"] = local_options()
        command = ["sh", "conf/yarn.sh", "--prepare", place]
        answer = subprocess.run(command, cwd=PROJECT, env=environment, capture_output=True, text=True, check=False)
        told = f"PREPARED={place} conf/yarn.sh SOURCE MODEL OUTPUT\n"
        assert (answer.returncode, answer.stdout) == (0, told), answer
        yield place


@pytest.fixture(scope="module")
def expected(samples, bundle_uri, tmp_path_factory) -> list[dict]:
    """The rows of a run in one process, without Spark."""
    config = load_config("local")
    task = pipeline.make_task(str(samples), bundle_uri, str(tmp_path_factory.mktemp("unused")), config)
    batches = listing.list_images(task.source, config).images.to_batches()
    return pa.Table.from_batches(task.results(batches)).sort_by("path").to_pylist()


def test_a_driver_in_the_cluster_answers_as_a_local_one_does(yarn, prepared, samples, bundle_uri, expected, tmp_path):
    output = tmp_path / "out"
    settings = ["--set", "max_failed_share=0.01", "--set", "spark.wait_seconds=240"]
    arguments = [str(samples), bundle_uri, str(output), *settings]
    finished = yarn.start(tmp_path / "run.log", output, *arguments, PREPARED=prepared, DEPLOY="cluster").finish()
    assert finished.code == 1, finished.errors
    assert (finished.summary["ok"], finished.summary["failed"]) == (60, 4)
    assert finished.answer.count("\n") == 1
    assert finished.rows() == expected
    assert "error: 4 of 64 images failed" in finished.errors and "executors came" not in finished.errors
    assert list(output.glob("runs/pipeline/*/events*")), "dashboards go below the output"
    assert not yarn.executors()


def test_an_executor_that_is_killed_loses_nothing_where_the_queue_grants_half(
    yarn, prepared, samples, bundle_uri, expected, tmp_path
):
    settings = ["--set", "spark.wait_seconds=5", "--set", "partitioning.partitions=16"]
    arguments = [str(samples), bundle_uri, str(tmp_path / "out"), "--conf", "spark.yarn.queue=half", *settings]
    run = yarn.start(tmp_path / "run.log", tmp_path / "out", *arguments, PREPARED=prepared)
    run.wait_until_staged(2)
    (executor,) = yarn.executors()
    executor.kill()
    finished = run.finish()
    assert (finished.summary["ok"], finished.summary["failed"]) == (60, 4), finished.errors
    assert finished.rows() == expected
    assert "1 of 2 executors came" in finished.errors and "over 1 slots" in finished.errors


def test_a_queue_that_is_not_there_is_one_sentence(yarn, prepared, samples, bundle_uri, tmp_path):
    arguments = [str(samples), bundle_uri, str(tmp_path / "out"), "--conf", "spark.yarn.queue=nowhere"]
    run = yarn.start(tmp_path / "run.log", tmp_path / "out", *arguments, PREPARED=prepared)
    run.finish().assert_one_clear_error("unknown queue: nowhere", "--conf spark.yarn.queue=NAME")


def test_a_mistake_that_a_driver_in_the_cluster_finds_is_one_sentence(yarn, prepared, samples, tmp_path):
    arguments = [str(samples), str(tmp_path / "nowhere"), str(tmp_path / "out")]
    run = yarn.start(tmp_path / "run.log", tmp_path / "out", *arguments, PREPARED=prepared, DEPLOY="cluster")
    run.finish().assert_one_clear_error(f"{tmp_path}/nowhere")
