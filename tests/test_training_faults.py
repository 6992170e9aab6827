"""A training on a cluster of processes, one of which is killed: it goes on from the last checkpoint."""

import contextlib
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import psutil
import pytest
from trainings import PROGRAMS, places

from helpers.config import PROJECT
from helpers.java import local_options
from helpers.tracking.tensorboard import read_scalars
from helpers.training import newest_step, rank
from studies.cluster import PATIENCE, Cluster, Process, wait_for

INTERVAL = 10  # steps from one checkpoint to the next
ARGUMENTS = ["--epochs", "2", "--batch-size", "64", "--train-images", "3200", "--test-images", "1000", "--seed", "3"]
ARGUMENTS += ["--precision", "fp32", "--checkpoint-steps", str(INTERVAL), "--no-resume"]
STEPS = 100


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[Cluster]:
    started = Cluster(tmp_path_factory.mktemp("cluster"))
    yield started
    started.stop()
    assert not [process for daemon in (started.master, *started.workers) for process in daemon.members()]


@dataclass
class Job:
    """A training that runs, and what can be seen of it from outside."""

    run_dir: Path
    process: Process

    def reached(self) -> int:
        assert self.process.popen.poll() is None, f"the training ended:\n{self.process.errors}"
        return newest_step(f"{self.run_dir}/checkpoints")

    def finish(self) -> dict:
        try:
            code = self.process.popen.wait(PATIENCE)
        finally:
            self.process.kill()
        assert code == 0, self.process.errors
        return json.loads(self.process.answer.splitlines()[-1])


@pytest.fixture
def job(cluster, fashion_mnist_root, tmp_path) -> Iterator[Job]:
    cluster.complete()
    arguments = [*ARGUMENTS, *places(fashion_mnist_root, tmp_path / "run")]
    command = [sys.executable, str(PROJECT / "tests" / "training_job.py"), "2", str(PROGRAMS / "fashion_mnist.py")]
    command += [json.dumps(arguments), *cluster.assignments]
    environment = {"PYTHONPATH": str(PROJECT), "SPARK_SUBMIT_OPTS": local_options()}
    started = Job(tmp_path / "run", Process([*command], tmp_path / "job.log", environment))
    yield started
    started.process.kill()


def ranks(cluster: Cluster) -> dict[int, psutil.Process]:
    """The training processes by their rank."""
    found = {}
    with contextlib.suppress(psutil.NoSuchProcess):
        for executor in cluster.executors():
            for process in executor.children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    if rank.__name__ in process.cmdline():
                        found[int(process.environ()["RANK"])] = process
    return found


def _ended(process: psutil.Process) -> bool:
    return not process.is_running()


def test_killed_ranks_and_executors_cost_no_more_than_an_interval_each(cluster, job):
    reached: list[int] = []
    # Rank 0 is the one that writes the checkpoints; `test_launch` loses rank 1.
    for lost in ("rank", "executor"):
        until = job.reached() + 2 * INTERVAL
        wait_for("two checkpoints", lambda until=until: job.reached() >= until)
        processes = ranks(cluster)
        assert set(processes) == {0, 1}
        reached.append(job.reached())
        (cluster.executors()[0] if lost == "executor" else processes[0]).kill()
        # Long before the patience after which an exchange of gradients is given up.
        for process in processes.values():
            wait_for("the end of both", partial(_ended, process), patience=60)
    result = job.finish()
    assert len(result["resumed_at"]) == len(reached)
    for done, resumed_at in zip(reached, result["resumed_at"], strict=True):
        assert done <= resumed_at < STEPS and resumed_at % INTERVAL == 0
    assert (
        f"a rank was lost, going on from the newest checkpoint of step {result['resumed_at'][0]}" in job.process.errors
    )
    # One curve without a gap or a step twice, and a network that has learned all the way.
    losses = read_scalars(str(job.run_dir))["train/loss"]
    assert losses["step"].tolist() == list(range(1, STEPS + 1))
    assert result["epochs"][1]["train_loss"] < result["epochs"][0]["train_loss"]
    assert result["test_accuracy"] > 0.7 and result["processes"] == 2
    assert not list(job.run_dir.glob("checkpoints/*"))
