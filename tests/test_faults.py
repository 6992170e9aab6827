"""Whatever is killed or fills up in the middle of a run: no image is lost or doubled, or there is one clear error.

How it was checked that each test fails without its protection: in a copy of the repository, one change at a time.

    changed                                                            failed
    base.yaml: task_attempts 1                                         killed in the middle, local worker
    base.yaml: conf spark.stage.maxConsecutiveAttempts 1               killed in the middle
    results.py: `recover` takes nothing from staging                     killed driver
    local.py: `_explained` lets ENOSPC pass                            full disk, disk full before
    log4j2.properties: level error for Spark's executor and scheduler  full disk, missing model
    bundle.py: hashes are not compared                                 truncated model
    bundle.py: a missing file's OSError passes                         missing model
"""

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
from cluster import Finished, Run, python_workers, read_results, read_rows, staged_rows, start_run
from pyspark.sql import SparkSession

from helpers import pipeline
from helpers.cli import main
from helpers.config import load_config
from helpers.java import local_options
from helpers.pipeline.results import ResultStore
from helpers.storage import open_storage
from studies.cluster import Cluster, wait_for

PICTURES, COPIES = 20, 7  # different images, and how often each is there
SIDE = 1200  # pixels: a task's images take long enough that a run has a middle
PARTITIONS = 40
ONE_EXECUTOR = "spark.conf.spark.cores.max=1"
TMPFS_BYTES, TMPFS_FILES = 4 * 2**20, 500
ROOM_BYTES = 48 * 2**10  # for the files of a few tasks


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[Cluster]:
    started = Cluster(tmp_path_factory.mktemp("cluster"))
    yield started
    started.stop()
    assert not [process for daemon in (started.master, *started.workers) for process in daemon.members()]


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for i in range(PICTURES):
        colors = np.random.default_rng(i).integers(0, 256, (12, 12, 3), np.uint8)
        first = folder / f"{i:03d}-0.jpg"
        cv2.imwrite(str(first), cv2.resize(colors, (SIDE, SIDE), interpolation=cv2.INTER_CUBIC))
        for copy in range(1, COPIES):
            (folder / f"{i:03d}-{copy}.jpg").hardlink_to(first)
    (folder / "notes.jpg").write_bytes(b"no image")
    return folder


@dataclass
class Place:
    """Where a test runs, and what its runs have in common."""

    photos: Path
    bundle: str
    folder: Path
    output: Path = field(init=False)

    def __post_init__(self) -> None:
        self.output = self.folder / "output"

    def start(self, *settings: str, profile: str = "local") -> Run:
        common = (f"paths.runs={self.folder / 'runs'}", f"partitioning.partitions={PARTITIONS}", "pictures=0")
        log = self.folder / "run.log"
        return start_run(self.photos, self.bundle, self.output, log, *common, *settings, profile=profile)

    def start_local(self, *settings: str) -> Run:
        return self.start("spark.master=local[2]", *settings)

    def start_on(self, cluster: Cluster, *settings: str) -> Run:
        cluster.complete()
        return self.start(*cluster.assignments, *settings, profile="cluster")

    def run(self, spark: SparkSession) -> pipeline.RunSummary:
        """A run in this process."""
        config = load_config("local", pictures=0)
        return pipeline.run(spark, str(self.photos), self.bundle, str(self.output), config)


@pytest.fixture
def place(photos, bundle_uri, tmp_path) -> Place:
    return Place(photos, bundle_uri, tmp_path)


@pytest.fixture(scope="module")
def undisturbed(spark, photos, bundle_uri, tmp_path_factory) -> Path:
    """The output of a run, which every disturbed one must come to."""
    place = Place(photos, bundle_uri, tmp_path_factory.mktemp("undisturbed"))
    place.run(spark)
    rows = read_rows(place.output)
    assert [row["path"] for row in rows] == sorted(str(path) for path in photos.iterdir())
    assert sum(row["error"] is None for row in rows) == PICTURES * COPIES
    assert len({row["predictions"][0]["score"] for row in rows if row["predictions"]}) == PICTURES
    return place.output


def assert_equal(output: Path, undisturbed: Path) -> None:
    assert read_rows(output) == read_rows(undisturbed)
    assert not (output / "_staging").exists()


def assert_finishes(run: Run, undisturbed: Path) -> Finished:
    finished = run.finish()
    assert finished.code == 0, finished.errors
    assert_equal(run.output, undisturbed)
    return finished


def send(process: psutil.Process, number: int) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        process.send_signal(number)


def kill(process: psutil.Process) -> None:
    send(process, signal.SIGKILL)


def kill_python_worker(run: Run, workers: Callable[[], list[psutil.Process]], log: Callable[[], str]) -> None:
    """Kill workers while tasks are in them; of one that was between two tasks nobody would ever know.

    Stopped workers hold the run up, so that the tasks that come next go into them and it cannot end meanwhile.
    """
    run.wait_until_staged(2)
    for _ in range(10):
        stopped = wait_for("a Python worker", workers)
        for worker in stopped:
            send(worker, signal.SIGSTOP)
        time.sleep(0.3)  # for tasks to arrive
        for worker in stopped:
            send(worker, signal.SIGKILL)
        with contextlib.suppress(AssertionError):
            wait_for("the crash", lambda: "Python worker exited unexpectedly" in log(), patience=3)
            return
        assert run.process.popen.poll() is None, "the run ended before a task was in a worker that was killed"
    pytest.fail("no task was in any of the workers killed")


def test_python_workers_executors_and_spark_workers_killed_in_the_middle_lose_and_double_nothing(
    cluster, place, undisturbed
):
    """In one run: a Python worker, then an executor, then one Spark worker, which the other does the work of, then it.

    Others take their places.
    """
    run = place.start_on(cluster)

    def workers() -> list[psutil.Process]:
        return [worker for executor in cluster.executors() for worker in python_workers(executor)]

    kill_python_worker(run, workers, cluster.executor_logs)

    run.wait_until_staged(len(run.staged()) + 1)
    launched = cluster.launched()
    kill(cluster.executors()[0])
    wait_for("another executor", lambda: cluster.launched() > launched)
    assert run.process.popen.poll() is None, "the executor was not in use any more"

    run.wait_until_staged(len(run.staged()) + 1)
    lost = list(cluster.workers)
    lost[0].kill()
    run.wait_until_staged(len(run.staged()) + 1)
    lost[1].kill()
    assert cluster.executors() == []
    assert run.process.popen.poll() is None, "the run had ended"
    cluster.complete()
    finished = assert_finishes(run, undisturbed)
    assert finished.summary["images"] == finished.summary["ok"] + 1 == PICTURES * COPIES + 1


def test_a_python_worker_killed_in_local_mode_loses_and_doubles_nothing(place, undisturbed):
    # Without the project's own log settings the driver's log tells of a task that was lost.
    run = place.start_local(f"spark.conf.spark.driver.extraJavaOptions={local_options()}")
    driver = psutil.Process(run.process.popen.pid)
    kill_python_worker(run, lambda: python_workers(driver), lambda: run.process.errors)
    assert_finishes(run, undisturbed)


def test_a_run_after_a_killed_driver_does_only_what_was_not_finished(spark, cluster, place, undisturbed):
    first = place.start_on(cluster, ONE_EXECUTOR)
    first.wait_until_staged(5)
    first.process.kill()
    wait_for("the end of its executors", lambda: not cluster.executors())  # which may have ended a task meanwhile
    kept = staged_rows(place.output).num_rows
    assert 0 < kept <= PICTURES * COPIES
    assert not (place.output / "results").exists()
    second = place.run(spark)
    assert_equal(place.output, undisturbed)
    assert kept == second.skipped < second.images == PICTURES * COPIES + 1


@pytest.fixture
def disk(tmp_path) -> Iterator[Path]:
    """A small disk of its own for the output."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={TMPFS_BYTES},nr_inodes={TMPFS_FILES}", "test", str(folder)]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    if answer.returncode and not os.environ.get("CI"):
        pytest.skip(f"a small disk cannot be mounted here: {answer.stderr.strip()}")
    assert answer.returncode == 0, answer.stderr
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(disk: Path, leave: int) -> Path:
    """Take the disk's space up to a rest, as another program would."""
    file = disk / "somebody else's"
    status = os.statvfs(disk)
    file.write_bytes(bytes(status.f_bavail * status.f_frsize - leave))
    return file


def test_a_full_disk_is_one_clear_error_and_a_run_with_space_completes(spark, disk, place, undisturbed):
    output = place.output = disk / "output"
    (output / "results").mkdir(parents=True)
    pq.write_table(read_results(undisturbed).slice(0, 30), output / "results" / "earlier.parquet")
    ResultStore(open_storage(str(output))).prepare()
    before = read_rows(output)
    taken = fill(disk, leave=ROOM_BYTES)

    failed = place.start_local().finish()
    failed.assert_one_clear_error("disk is full", str(output))
    assert read_rows(output) == before

    kept = staged_rows(output).num_rows
    taken.unlink()
    again = place.run(spark)
    assert_equal(output, undisturbed)
    assert again.skipped == len(before) + kept


def test_a_disk_full_before_the_run_is_one_clear_error_too(disk, place, spark, capsys):
    """Then it is the driver that cannot write."""
    output = disk / "output"
    output.mkdir()
    with contextlib.suppress(OSError):
        for number in range(2 * TMPFS_FILES):
            (disk / str(number)).touch()
    arguments = ["--source", str(place.photos), "--model", place.bundle, "--output", str(output)]
    assert main(["run", "--profile", "local", "--set", "spark.master=local[2]", *arguments]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("error: ") and "disk is full" in lines[-1] and str(output) in lines[-1]


@pytest.fixture
def broken(place, undisturbed) -> Path:
    """A bundle whose weights will be broken, and one new image beside the results of an earlier run."""
    shutil.copytree(undisturbed, place.output)
    shutil.copytree(place.bundle, place.folder / "bundle")
    new = place.folder / "new"
    new.mkdir()
    (new / "new.jpg").hardlink_to(place.photos / "000-0.jpg")
    place.photos, place.bundle = new, str(place.folder / "bundle")
    return place.folder / "bundle" / "model.bin"


def test_a_truncated_model_is_one_clear_error_and_earlier_results_stay(cluster, broken, place, undisturbed):
    broken.write_bytes(broken.read_bytes()[:1000])
    finished = place.start_on(cluster, ONE_EXECUTOR, "spark.task_attempts=1").finish()
    finished.assert_one_clear_error(str(broken), "truncated")
    assert finished.rows() == read_rows(undisturbed)


def test_a_missing_model_file_is_one_clear_error_and_earlier_results_stay(broken, place, undisturbed):
    broken.unlink()
    finished = place.start_local().finish()
    finished.assert_one_clear_error(str(broken), "cannot be read")
    assert finished.rows() == read_rows(undisturbed)
