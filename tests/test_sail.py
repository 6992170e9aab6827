"""The pipeline on Sail, a Spark Connect server in its own process: the rows that Spark has, whatever goes wrong.

A process cannot hold a classic and a Connect session at once, so every run on Sail is a process of its own.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from bombs import bilevel_png
from cluster import Finished, Run, read_rows, start_run
from test_video import pictures, write_clip

from helpers import java, memory, pipeline
from helpers.bundle import runtime
from helpers.config import PROJECT, load_config
from helpers.doctor import examine
from helpers.memory import resident_megabytes
from helpers.pipeline import sail
from helpers.session import choose_mode, with_mode

ON_BOTH = ("pipeline", "slices", "exactly_once", "archives", "sources", "views", "several_models")
STAGES = """
import sys
import pyarrow.parquet as pq
from helpers import pipeline
from helpers.config import load_config
from helpers.errors import HostError
from helpers.session import get_slots, get_spark
from helpers.training import train_on_spark

source, model, target = sys.argv[1:]
config = load_config("local", spark={"mode": "sail", "master": "local[2]"})
spark = get_spark(config)
assert get_slots(spark) == 2
frame = pipeline.ingest(spark, source, config)
for stage in (pipeline.preprocess, pipeline.infer, pipeline.postprocess):
    frame = stage(frame, model, config)
pq.write_table(frame.toArrow(), target)
for use in (
    lambda: pipeline.run(spark, source, model, "table:results", config),
    lambda: train_on_spark(spark, pipeline.__file__),
):
    try:
        use()
    except HostError as error:
        print(error)
"""


@pytest.fixture(autouse=True)
def alone_again(monkeypatch):
    """What Sail's tasks say of the process that they share holds for a test, and not for the next file's."""
    monkeypatch.setattr(memory, "_is_shared", False)
    monkeypatch.setattr(runtime, "_tasks", 1)


@pytest.fixture(scope="module")
def source(samples, tmp_path_factory) -> Path:
    """Images of several formats, files that are none, and a video."""
    folder = shutil.copytree(samples, tmp_path_factory.mktemp("source") / "images")
    write_clip(folder / "clip.mp4", "mpeg4", pictures(20))
    return folder


def start(source: Path, model: str, work: Path, *settings: str, mode: str = "sail", name: str = "first") -> Run:
    told = (f"spark.mode={mode}", "pictures=0", "report=0", f"paths.runs={work / 'runs'}")
    return start_run(source, model, work / "out", work / f"{name}.log", "spark.master=local[2]", *told, *settings)


AT_ONCE = """
import faulthandler
import sys
import threading
import numpy as np
from helpers.bundle.runtime import get_model, share
from helpers.config import load_config
from helpers.pipeline.driver import open_bundle

def infer():
    model = get_model(bundle)
    together.wait()
    list(model.infer([(None, np.zeros((1, *bundle.manifest.input.shape), np.uint8))]))

faulthandler.dump_traceback_later(60, exit=True)
sys.setswitchinterval(1e-6)
bundle, together = open_bundle(sys.argv[1], load_config("local")), threading.Barrier(8)
share(8)
threads = [threading.Thread(target=infer) for _ in range(8)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
"""


def sorted_rows(finished: Finished) -> list[dict]:
    assert finished.code == 0, finished.errors
    return sorted(finished.rows(), key=lambda row: row["path"])


@pytest.fixture(scope="module")
def expected(spark, source, bundle_uri, tmp_path_factory) -> list[dict]:
    """The rows that Spark has."""
    output = tmp_path_factory.mktemp("spark")
    pipeline.run(spark, str(source), bundle_uri, str(output), load_config("local", report=0))
    return read_rows(output)


def test_all_rows_are_those_of_spark_and_a_second_run_does_what_is_new(source, bundle_uri, expected, tmp_path):
    images = shutil.copytree(source, tmp_path / "images")
    first = start(images, bundle_uri, tmp_path).finish()
    assert (first.summary["ok"], first.summary["failed"]) == (80, 4)
    names = [row["path"].removeprefix(str(source)) for row in expected]
    assert [row["path"].removeprefix(str(images)) for row in sorted_rows(first)] == names
    columns = ("width", "height", "predictions", "model", "length")
    for name in columns:
        assert [row[name] for row in sorted_rows(first)] == [row[name] for row in expected], name
    shutil.copy(images / "clothes" / "sample 000.png", images / "new.png")
    second = start(images, bundle_uri, tmp_path, mode="auto", name="second").finish()
    assert "spark.mode sail: pysail is installed" in second.errors
    assert [second.summary[key] for key in ("ok", "failed", "skipped")] == [1, 0, 84], second.errors
    assert not [word for word in ("Traceback", "INFO sail", "fork") if word in second.errors], second.errors


def test_a_killed_run_loses_nothing(source, bundle_uri, expected, tmp_path):
    few = ("spark.master=local[1]", "partitioning.partitions=16")
    first = start(source, bundle_uri, tmp_path, *few)
    first.wait_until_staged(2)
    first.process.kill()
    second = start(source, bundle_uri, tmp_path, *few, name="second").finish()
    assert sorted_rows(second) == expected
    assert second.summary["skipped"] > 0


def test_ctrl_c_ends_a_run_which_the_same_command_goes_on_with(source, bundle_uri, expected, tmp_path):
    few = ("spark.master=local[1]", "partitioning.partitions=16")
    first = start(source, bundle_uri, tmp_path, *few, mode="auto")
    first.wait_until_staged(2)
    first.process.popen.send_signal(signal.SIGINT)
    stopped = first.finish()
    assert stopped.code == 130 and stopped.errors.endswith("the same command goes on\n"), stopped.errors
    second = start(source, bundle_uri, tmp_path, *few, mode="auto", name="second").finish()
    assert sorted_rows(second) == expected
    assert second.summary["skipped"] > 0


def test_spark_goes_on_where_an_image_takes_more_than_the_tasks_of_sail_leave(bundle_uri, tmp_path):
    (tmp_path / "images").mkdir()
    for number in range(20):
        cv2.imwrite(str(tmp_path / "images" / f"{number}.png"), np.full((40, 60, 3), 10 * number, np.uint8))
    (tmp_path / "images" / "large.png").write_bytes(bilevel_png(8_000, 8_000))  # decoding takes 488 MB
    tight = "inference.memory_megabytes=815"
    finished = start(tmp_path / "images", bundle_uri, tmp_path, tight, mode="auto").finish()
    assert "Spark goes on" in finished.errors
    assert [row["error"] for row in finished.rows()] == [None] * 21, finished.errors


def test_a_process_that_takes_more_than_it_may_starts_again():
    again = threading.Event()
    with sail.within(round(resident_megabytes()) + 100, again.set):
        assert not again.wait(0.2)
        pixels = np.ones(200 * 2**20, np.uint8)
        assert again.wait(20) and pixels.all()
    again.clear()
    assert not again.wait(0.2)


def test_stages_one_by_one_give_the_rows_of_the_run(source, bundle_uri, expected, tmp_path):
    target = tmp_path / "rows.parquet"
    command = [sys.executable, "-c", STAGES, str(source), bundle_uri, str(target)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert ended.returncode == 0, ended.stderr
    assert sorted(pq.read_table(target).to_pylist(), key=lambda row: row["path"]) == expected
    output, training = ended.stdout.splitlines()
    assert "cannot go to table:results" in output and "set spark.mode=local" in output
    assert "a training" in training and "set spark.mode=local" in training


def test_runs_do_on_sail_what_tests_ask_of_runs_on_spark():
    """Those of one session: the pipeline, slices, resume, deaths of the driver, archives and tables."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    # Tasks are threads of the process with the tests, which takes more than a run does.
    environment |= {"HELPERS_SPARK__MODE": "sail", "HELPERS_INFERENCE__MEMORY_MEGABYTES": "8192"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command += [f"tests/test_{name}.py" for name in ON_BOTH]
    ended = subprocess.run(command, cwd=PROJECT, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout[-5000:]
    assert int(re.search(r"(\d+) passed", ended.stdout)[1]) > 100


def test_tables_are_sources_as_they_are_of_spark():
    """Spark's own tests, on Sail."""
    wanted = (
        "parquet_file or error_row or archive or that_spark_reads or bytes or two_models or newest_version or every"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", wanted, "test_sources.py"]
    environment = {**os.environ, "HELPERS_SPARK__MODE": "sail"}
    here = Path(__file__).parent
    ended = subprocess.run(command, cwd=here, env=environment, capture_output=True, text=True, timeout=400)
    assert ended.returncode == 0 and " passed" in ended.stdout, ended.stdout[-5000:]


def test_tasks_that_infer_for_the_first_time_at_once_do_not_wait_for_each_other(bundle_uri):
    """Half of such processes did."""
    processes = [subprocess.Popen([sys.executable, "-c", AT_ONCE, bundle_uri], stderr=subprocess.PIPE) for _ in "123"]
    for process in processes:
        _, errors = process.communicate()
        assert process.returncode == 0, errors.decode()


@pytest.mark.parametrize(
    ("uses", "settings", "mode"),
    {
        "files": ((["photos", "out"]), {}, "sail"),
        "results in a catalog": (["photos", "table:results"], {}, "local"),
        "Auto Loader": (["cloudFiles:photos", "out"], {}, "local"),
        "anything": ([], {}, "local"),
        "settings of Spark": (["photos", "out"], {"spark.conf": {"spark.ui.enabled": "true"}}, "local"),
        "a cluster": (["photos", "out"], {"spark.master": "spark://host:7077"}, "local"),
        "another mode": (["photos", "out"], {"spark.mode": "connect"}, "connect"),
    }.values(),
)
def test_one_machine_takes_sail_for_what_sail_can_do(uses, settings, mode):
    assert choose_mode(load_config("local", **settings), *uses)[0] == mode


def test_without_java_everything_is_tried_on_sail(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("JAVA_HOME", raising=False)
    monkeypatch.setattr(java, "JAVA_PACKAGE", "not_there==1")
    assert choose_mode(load_config("local"))[0] == "sail"
    assert [finding.ok for finding in examine(load_config("local"), ["java", "spark"])] == [True, True]


def test_one_machine_takes_spark_where_there_is_no_sail(monkeypatch):
    monkeypatch.setitem(sys.modules, "pysail", None)
    config = load_config("local")
    assert with_mode(config, "photos").spark.mode == "local"
    (finding,) = examine(config, ["spark"])
    assert "mode local (pysail is not installed)" in finding.detail


class Counting:
    """Tasks that note how many of them run at once, and fail a number of times."""

    def __init__(self, failures: int = 0):
        self.lock, self.running, self.most, self.calls, self.failures = threading.Lock(), 0, 0, 0, failures
        self.numbers = set[int]()

    def __call__(self, batches, number):
        self.numbers.add(number)
        with self.lock:
            self.running, self.calls = self.running + 1, self.calls + 1
            self.most = max(self.most, self.running)
        time.sleep(0.02)
        with self.lock:
            self.running -= 1
            self.failures -= 1
            if self.failures >= 0:
                raise OSError("busy")
        yield from batches


BATCH = pa.RecordBatch.from_pydict({"a": [1]})  # of 8 bytes
SMALL = load_config("local", partitioning={"target_bytes": 8}).partitioning


def test_as_many_tasks_run_at_once_as_there_are_slots():
    task = Counting()
    threads = [threading.Thread(target=lambda: list(sail.Tasks(task, 3, 1, SMALL)([BATCH]))) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert task.calls == 12 and task.most == 3


@pytest.mark.parametrize("limit", [{"target_bytes": 16}, {"target_images": 2}])
def test_many_rows_are_several_tasks_with_numbers_of_their_own(limit):
    task = Counting()
    limits = load_config("local", partitioning=limit).partitioning
    assert list(sail.Tasks(task, 2, 1, limits)([BATCH] * 5)) == [BATCH] * 5
    assert task.calls == len(task.numbers) == 3


def test_a_task_is_tried_as_often_as_sparks_are():
    task = Counting(failures=3)
    assert list(sail.Tasks(task, 2, 4, SMALL)([BATCH])) == [BATCH] and task.calls == 4
    with pytest.raises(OSError, match="busy"):
        list(sail.Tasks(Counting(failures=4), 2, 4, SMALL)([BATCH]))
