"""The whole pipeline with images, model and results in ADLS Gen2: as over a folder, whatever goes wrong meanwhile."""

import contextlib
import datetime as dt
import io
import os
import shutil
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from urllib.parse import parse_qs, quote, unquote

import cv2
import nbformat
import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from azure.storage.filedatalake import FileSystemSasPermissions, generate_file_system_sas
from cluster import Run, python_workers, read_rows, start_run
from deltalake import DeltaTable
from dfs_facade import ACCOUNT, BUSY, DROP, DROP_AFTERWARDS, EXPIRE, KEY, DfsFacade, Request
from nbclient import NotebookClient
from pyspark.sql import SparkSession
from test_results import make_work, publish, stage, table
from test_video import pictures, write_clip

from helpers import doctor, pipeline
from helpers.config import PROJECT, load_config
from helpers.errors import StorageError
from helpers.pipeline.folders import KEEP
from helpers.pipeline.results import ResultStore, Work
from helpers.pipeline.rows import without
from helpers.pipeline.schemas import RESULT_SCHEMA
from helpers.pipeline.table import Table
from helpers.storage import StorageOptions, adls, objects, open_storage
from helpers.storage.adls import AdlsStorage
from helpers.storage.interface import UNFINISHED
from helpers.storage.objects import ObjectStorage
from studies.cluster import Cluster, wait_for

PICTURES, COPIES, SIDE = 12, 4, 1000  # different images, how often each is there, pixels: a run has a middle
PARTITIONS = 20
VIDEO_FRAMES = 30
ALL = FileSystemSasPermissions(read=True, write=True, create=True, add=True, delete=True, list=True)


def comparable(rows: list[dict], root: str) -> list[dict]:
    """Results without what differs between two places: where they are, and when the images came there."""
    rows = [{**row, "path": row["path"].removeprefix(root), "modified": None, "model": None} for row in rows]
    return sorted(rows, key=lambda row: row["path"])


def files_of(storage: ObjectStorage, folder: str) -> list[str]:
    """The files of a table, as Delta's own library has them."""
    uri, options = storage.delta_table(folder)
    names = pa.table(DeltaTable(uri, storage_options=options).get_add_actions())["path"].to_pylist()
    return [storage.join(folder, name) for name in names]


@dataclass
class Place:
    """A container with images and a model, and what its runs have in common."""

    dfs: DfsFacade
    storage: AdlsStorage
    logs: Path
    credential: str = "env:ADLS_KEY"

    @property
    def locations(self) -> list[str]:
        """Of the images, the model and the results."""
        return [self.storage.join(name) for name in ("photos", "model", "out")]

    @property
    def settings(self) -> dict[str, object]:
        reached = {"storage.endpoint": self.dfs.endpoint, "storage.credential": self.credential}
        shown = {"paths.runs": str(self.logs / "runs"), "pictures": 0, "report": 0}
        return {**reached, **shown, "partitioning.partitions": PARTITIONS}

    def start(self, *settings: str, profile: str = "local", name: str = "run") -> Run:
        """A run in a process of its own, to be killed or stopped, or to show what it says."""
        own = [f"{key}={value}" for key, value in self.settings.items()]
        master = ["spark.master=local[2]"] if profile == "local" else []
        return start_run(*self.locations, self.logs / f"{name}.log", *master, *own, *settings, profile=profile)

    def run(self, spark: SparkSession, **settings: object) -> pipeline.RunSummary:
        """A run in this process."""
        return pipeline.run(spark, *self.locations, load_config("local", **{**self.settings, **settings}))

    def files(self, folder: str) -> list[str]:
        with contextlib.suppress(StorageError):  # there is no such folder, or not any more
            return [entry.path for entry in self.storage.list(folder) if entry.path.endswith(".parquet")]
        return []

    def wait_until_staged(self, run: Run, files: int) -> None:
        def look() -> bool:
            assert run.process.popen.poll() is None, f"the run ended before its middle:\n{run.process.errors}"
            time.sleep(0.1)  # else the looks would keep a core from the run
            return len(self.files("out/_staging")) >= files

        wait_for(f"{files} finished tasks", look)

    def rows(self, folder: str = "out/results") -> list[dict]:
        """What tasks have staged, or what a reader of the table sees."""
        files = self.files(folder) if folder == "out/_staging" else files_of(self.storage, folder)
        tables = [pq.read_table(io.BytesIO(self.storage.read(path))) for path in files]
        rows = pa.concat_tables(tables).to_pylist() if tables else []
        assert len({row["path"] for row in rows}) == len(rows), "an image is twice in the results"
        return comparable(rows, self.storage.join("photos"))

    def assert_equal(self, expected: list[dict]) -> None:
        assert self.rows() == expected
        # What a writer was at when it was killed, or lost its permission, stays for a day.
        left = self.storage.list("out/_staging") if self.storage.exists("out/_staging") else ()
        names = [entry.path.rpartition("/")[2] for entry in left]
        assert [name for name in names if name != KEEP and not UNFINISHED.fullmatch(name)] == []


@pytest.fixture
def make_place(dfs, adls_container, bundle_uri, tmp_path) -> Callable[[Path], Place]:
    def make(photos: Path) -> Place:
        place = Place(dfs, AdlsStorage(adls_container, StorageOptions(dfs.endpoint, "env:ADLS_KEY")), tmp_path)
        for folder, name in ((photos, "photos"), (Path(bundle_uri), "model")):
            for path in folder.rglob("*"):
                if path.is_file():
                    dfs.put(place.storage._container, f"{name}/{path.relative_to(folder)}", path.read_bytes())
        return place

    return make


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for i in range(PICTURES):
        colors = np.random.default_rng(i).integers(0, 256, (12, 12, 3), np.uint8)
        image = cv2.resize(colors, (SIDE, SIDE), interpolation=cv2.INTER_CUBIC)
        for number in range(COPIES):
            cv2.imwrite(str(folder / f"{i:03d}-{number}.jpg"), image)
    (folder / "notes.jpg").write_bytes(b"no image")
    return folder


@pytest.fixture
def place(make_place, photos) -> Place:
    return make_place(photos)


@pytest.fixture(scope="module")
def expected(spark, photos, bundle_uri, tmp_path_factory) -> list[dict]:
    """What every run, disturbed or not, must come to: the results of a run over the local folder."""
    output = tmp_path_factory.mktemp("local")
    summary = pipeline.run(spark, str(photos), bundle_uri, str(output), load_config("local", pictures=0, report=0))
    assert summary.images == summary.ok + 1 == PICTURES * COPIES + 1
    return comparable(read_rows(output), str(photos))


def counts(summary: pipeline.RunSummary) -> tuple[int, int, int, int]:
    return summary.images, summary.ok, summary.failed, summary.skipped


def test_a_run_over_abfss_equals_a_run_over_a_folder_and_resumes(here, make_place, samples, bundle_uri, tmp_path):
    """Over images of all kinds, damaged files and a video."""
    source = shutil.copytree(samples, tmp_path / "source")
    write_clip(source / "clip.mp4", "mpeg4", pictures(VIDEO_FRAMES))
    place = make_place(source)
    config = load_config("local", pictures=0, report=0)
    local = pipeline.run(here, str(source), bundle_uri, str(tmp_path / "out"), config)

    first = place.run(here, **{"partitioning.partitions": None, "pictures": 3, "report": 200})
    assert counts(first) == counts(local) and first.partitions == local.partitions
    assert first.results == place.storage.join("out", "results")
    assert place.rows() == comparable(read_rows(tmp_path / "out"), str(source))
    assert sum("#frame=" in row["path"] and row["error"] is None for row in place.rows()) == VIDEO_FRAMES
    assert len(list(place.storage.list("out/pictures"))) == 3
    assert place.storage.read("out/report/index.html").count(b"data:image/jpeg") >= 60 + VIDEO_FRAMES

    before = 64 + VIDEO_FRAMES
    place.storage.write("photos/new.png", (samples / "clothes" / "sample 000.png").read_bytes())
    assert counts(place.run(here)) == (before + 1, 1, 0, before)
    assert len(place.rows()) == before + 1


def test_a_run_after_a_killed_driver_does_only_what_was_not_finished(here, place, expected):
    first = place.start()
    place.wait_until_staged(first, 4)
    first.process.kill()
    kept = len(place.rows("out/_staging"))
    assert 0 < kept <= PICTURES * COPIES and not place.storage.exists("out/results")
    second = place.run(here)
    place.assert_equal(expected)
    assert kept == second.skipped < second.images == PICTURES * COPIES + 1


def test_a_worker_killed_in_the_middle_loses_and_doubles_nothing(here, place, expected):
    jvm = psutil.Process(here.sparkContext._gateway.proc.pid)
    tracker = here.sparkContext.statusTracker()

    def failed_tasks() -> int:
        stages = [tracker.getStageInfo(number) for number in tracker.getActiveStageIds()]
        return sum(stage.numFailedTasks for stage in stages if stage)

    with ThreadPoolExecutor(1) as pool:
        run = pool.submit(place.run, here)
        wait_for("2 finished tasks", lambda: run.done() or len(place.files("out/_staging")) >= 2)
        while not failed_tasks():  # Spark tries a task again, but not more than three times
            assert not run.done(), "the run ended before a worker was killed with a task in it"
            for worker in python_workers(jvm):
                worker.kill()
            with contextlib.suppress(TimeoutError):
                wait_for("the loss of a task", failed_tasks, patience=1)
        assert run.result().failed == 1
    place.assert_equal(expected)


@dataclass
class Trouble:
    """What happens to the requests of a run, from its middle on."""

    started: float = 0.0
    requests: int = 0
    disturbed: int = 0

    def throttle(self, request: Request) -> object:
        """A second and a half of 503, and at least ten of them however slow this machine is."""
        self.requests += request.is_read
        if self.requests == 20 and not self.started:
            self.started = time.monotonic()
        if not self.started or (self.disturbed >= 10 and time.monotonic() > self.started + 1.5):
            return None
        self.disturbed += 1
        return BUSY

    def drop(self, request: Request) -> object:
        """Every 20th connection, in turn before and after the request was served."""
        self.requests += 1
        if self.requests % 20:
            return None
        self.disturbed += 1
        return DROP if self.requests % 40 else DROP_AFTERWARDS


def try_again_at_once(monkeypatch) -> None:
    """Let this process repeat failed requests without a pause, until its clients are forgotten."""
    monkeypatch.setitem(adls.RETRY, "increment_base", 0)
    monkeypatch.setitem(adls.RETRY, "random_jitter_range", 0)
    for name in ("init_backoff", "max_backoff"):
        monkeypatch.setitem(objects.BACKOFF, name, dt.timedelta(milliseconds=1 + (name == "max_backoff")))
    adls.forget_clients()


@pytest.mark.parametrize("kind", ["throttle", "drop"])
def test_a_busy_service_or_a_bad_network_loses_and_doubles_nothing(here, place, expected, kind, monkeypatch):
    trouble = Trouble()
    if kind == "drop":  # this process's requests come one by one, so each would wait for seconds; the tasks' do
        try_again_at_once(monkeypatch)
    with place.dfs.disturb(getattr(trouble, kind)):
        summary = place.run(here)
    adls.forget_clients()
    place.assert_equal(expected)
    assert trouble.disturbed >= 10 and summary.failed == 1


@pytest.fixture
def secret(place, monkeypatch) -> str:
    """A SAS token in the environment, which is the run's credential."""
    expiry = dt.datetime.now(dt.UTC) + dt.timedelta(hours=1)
    token = generate_file_system_sas(ACCOUNT, place.storage._container, KEY, permission=ALL, expiry=expiry)
    monkeypatch.setenv("ADLS_SAS", f"?{token}")
    place.credential = "env:ADLS_SAS"
    return token


def forms_of(secret: str) -> set[str]:
    """The token's signature as it may be written."""
    signature = parse_qs(secret)["sig"][0]
    return {signature, quote(signature), quote(signature, safe=""), unquote(signature)}


def test_a_token_that_expires_half_way_is_one_clear_error_and_a_new_credential_completes(here, place, expected, secret):
    reads: list[Request] = []

    def expire(request: Request) -> str | None:
        if request.is_read and "photos" in request.path:
            reads.append(request)
        return EXPIRE if len(reads) > 25 else None

    with place.dfs.disturb(expire):
        failed = place.start().finish()
    failed.assert_one_clear_error("env:ADLS_SAS", "expired", "run again")
    kept = len(place.rows("out/_staging"))
    assert 0 < kept < PICTURES * COPIES and not place.storage.exists("out/results")
    place.credential = "env:ADLS_KEY"
    again = place.run(here)
    place.assert_equal(expected)
    assert again.skipped == kept


@pytest.fixture
def cluster(tmp_path_factory, secret) -> Iterator[Cluster]:
    """Its processes have the variable, as a cluster's environment should."""
    started = Cluster(tmp_path_factory.mktemp("cluster"))
    started.complete(workers=1)
    yield started
    started.stop()


def test_on_a_cluster_a_killed_executor_loses_nothing_and_the_token_is_shown_nowhere(
    place, expected, secret, cluster, monkeypatch
):
    """And a variable that only the driver has is one clear error."""
    monkeypatch.setenv("ONLY_HERE", os.environ["ADLS_SAS"])
    place.credential = "env:ONLY_HERE"
    refused = place.start(*cluster.assignments, profile="cluster", name="refused").finish()
    refused.assert_one_clear_error("env:ONLY_HERE", "every Spark worker")

    place.credential = "env:ADLS_SAS"
    events = place.logs / "events"
    events.mkdir()
    told = {"enabled": "true", "compress": "false", "dir": f"file:{events}"}
    listened = [f"spark.conf.spark.eventLog.{name}={value}" for name, value in told.items()]
    run = place.start(*cluster.assignments, *listened, profile="cluster")
    place.wait_until_staged(run, 2)
    launched = cluster.launched()
    cluster.executors()[0].kill()
    finished = run.finish()
    assert cluster.launched() > launched, "the executor was not in use any more"
    assert finished.code == 0, finished.errors
    place.assert_equal(expected)

    forms = {form.encode() for form in forms_of(secret)}
    looked_at = [path for top in (place.logs, cluster.folder) for path in top.rglob("*") if path.is_file()]
    plans = [path for path in looked_at if b"MapInArrow" in path.read_bytes()]
    logs = [path for path in looked_at if path.name == "stderr" and path.stat().st_size]
    assert plans and logs and any(path.name == "run.log" for path in looked_at)
    assert [path for path in looked_at if any(form in path.read_bytes() for form in forms)] == []


NOTEBOOK = """
from helpers import pipeline
from helpers.config import load_config
from helpers.session import get_spark
from helpers.storage import open_storage
config = load_config("local", **{settings})
print(config)
config
---
spark = get_spark(config)
spark
---
images = pipeline.ingest(spark, "{root}/photos", config)
images.explain(True)
images
---
images.where("error is null").select("path", "length").orderBy("path").show(3, truncate=False)
---
pipeline.run(spark, "{root}/photos", "{root}/model", "{root}/out", config)
---
spark.createDataFrame(pipeline.ingest(spark, "{root}/photos", config).limit(2).toArrow()).show()
---
storage = open_storage("{root}", config)
print(storage, vars(storage), storage.options)
storage.read("not there")
---
open_storage("{root}x", config).read("no such container")
---
import os
os.environ["ADLS_SAS"] += "0"
storage.read("photos/notes.jpg")
"""


def test_the_token_is_in_no_output_of_a_notebook(place, secret):
    """Nor in the tracebacks that a notebook shows of what goes wrong."""
    settings = {
        "storage": {"endpoint": place.dfs.endpoint, "credential": place.credential},
        "spark": {"master": "local[2]"},
        "paths": {"runs": str(place.logs / "runs")},
    }
    text = NOTEBOOK.replace("{settings}", repr(settings)).replace("{root}", place.storage.root)
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell.strip()) for cell in text.split("---")])
    NotebookClient(book, allow_errors=True, kernel_name="python3", resources={"metadata": {"path": PROJECT}}).execute()
    failed = [any(output.output_type == "error" for output in cell.outputs) for cell in book.cells]
    assert failed == [False] * 6 + [True] * 3
    shown = nbformat.writes(book)
    assert "MapInArrow" in shown and "env:ADLS_SAS" in shown and f"images={PICTURES * COPIES + 1}" in shown
    assert not [form for form in forms_of(secret) if form in shown]


def test_a_driver_that_stood_still_while_another_run_committed_replaces_nothing_of_it(here, place):
    """Stopped as a machine is that sleeps, when it writes what stays of a file of results."""
    place.run(here, **{"partitioning.partitions": 1})
    before, names = place.rows(), sorted(entry.path for entry in place.storage.list("photos"))
    changed = [name for name in names if name.endswith(".jpg")][:2]
    content = place.storage.read(changed[1])

    place.storage.write(changed[0], place.storage.read(names[-2]) + b"another length")
    slow = place.start(name="slow")
    stopped: list[str] = []

    def stop(request: Request) -> None:
        if not stopped and request.query.get("action") == "flush" and request.name.startswith("out/results/"):
            stopped.append(request.name)
            slow.process.popen.send_signal(signal.SIGSTOP)

    with place.dfs.disturb(stop):
        wait_for("the copy of a file of results", lambda: stopped or slow.process.popen.poll() is not None)
    assert stopped, slow.process.errors
    place.storage.write(changed[1], content + b"another length")
    fast = place.run(here)
    committed = place.rows()
    assert len(committed) == len(before) and fast.ok == 1  # it has kept what the slow one had finished

    slow.process.popen.send_signal(signal.SIGCONT)
    ended = slow.finish()
    assert ended.code == 0 and "another run has changed" in ended.errors
    assert place.rows() == committed
    assert counts(place.run(here)) == (len(before), 0, 0, len(before))
    assert place.rows() == committed
    assert not place.storage.exists("out/_staging")


# ---------------------------------------------------------------- death at every request


def keys(store: ResultStore) -> list[tuple[str, int]]:
    """Path and version of every row that a reader of the table sees."""
    files = files_of(store.storage, "results")
    rows = [row for path in files for row in pq.read_table(io.BytesIO(store.storage.read(path))).to_pylist()]
    return sorted((row["path"], row["modified"].microsecond) for row in rows)


@pytest.fixture(params=["adls", "s3"])
def kind(request) -> str:
    return request.param


@pytest.fixture
def server(request, kind) -> DfsFacade:
    return request.getfixturevalue("dfs") if kind == "adls" else request.getfixturevalue("s3").relay


@pytest.fixture
def open_results(request, kind) -> Callable[[object], ResultStore]:
    """Open results in a folder of a name of their own, as a new process does."""
    root = request.getfixturevalue(f"{kind}_root")
    config = load_config("local", **request.getfixturevalue(f"{kind}_settings"))
    return lambda name: ResultStore(open_storage(f"{root}/{name}", config))


@dataclass
class Commits:
    """One commit, to be made in many folders that each hold the same earlier results."""

    server: DfsFacade
    open_results: Callable[[object], ResultStore]
    first: ObjectStorage  # of the folder that the others are copies of
    work: Work

    @classmethod
    def of(
        cls,
        server: DfsFacade,
        open_results: Callable[[object], ResultStore],
        earlier: list[pa.Table],
        new: list[pa.Table],
    ) -> "Commits":
        store = open_results("first")
        publish(store, *(stage(store, "run1", number, rows) for number, rows in enumerate(earlier)))
        staged = [stage(store, "run2", number, rows) for number, rows in enumerate(new)]
        return cls(server, open_results, store.storage, make_work(store, *staged))

    @cached_property
    def files(self) -> dict[str, bytes]:
        root = f"{self.first.root}/"
        return {entry.path.removeprefix(root): self.first.read(entry.path) for entry in self.first.list()}

    def begin(self, name: object) -> ResultStore:
        """A folder where the commit can be made."""
        store = self.open_results(name)
        if isinstance(store.storage, AdlsStorage):
            names = [storage._name(storage.root) for storage in (self.first, store.storage)]
            self.server.copy_folder(store.storage._container, *names)
        else:
            for path, data in self.files.items():
                store.storage.write(path, data)
        return store

    def end(self, store: ResultStore) -> None:
        store.publish(self.work)
        store.unstage("run2")


def test_a_commit_cut_off_at_any_request_is_put_right_by_the_next_run(server, open_results, monkeypatch):
    monkeypatch.setitem(adls.RETRY, "retry_total", 0)
    monkeypatch.setattr(objects, "TRIES", 0)
    adls.forget_clients()
    old = [("a", 0), ("b", 0), ("c", 0)]
    new = [("a", 1), ("b", 0), ("c", 1), ("d", 1), ("e", 1)]
    staged = [table("a", "d", version=1), table("c", "e", version=1)]
    commits = Commits.of(server, open_results, [table("a", "b"), table("c")], staged)
    for last in range(200):
        store = commits.begin(last)
        requests: list[Request] = []

        def cut(request: Request, last: int = last, requests: list = requests) -> str | None:
            requests.append(request)
            if len(requests) <= last:
                return None
            # The last request may have been served although nobody lives to hear of it.
            return DROP_AFTERWARDS if len(requests) == last + 1 and last % 2 else DROP

        try:
            with server.disturb(cut):
                commits.end(store)
            break
        except StorageError:
            assert keys(store) in (old, new), f"half a commit after {last} requests"
            store.recover()
            assert keys(store) == new, f"cut off after {last} requests"
            assert not store.storage.exists("_staging")
    else:
        pytest.fail("the commit never ended")
    adls.forget_clients()
    assert last >= 15 and keys(store) == new


@pytest.mark.parametrize("effect", [DROP, DROP_AFTERWARDS, BUSY], ids=["dropped", "dropped afterwards", "busy"])
def test_a_disturbance_of_any_one_request_of_a_commit_changes_nothing(server, open_results, monkeypatch, effect):
    """Each request fails once, and afterwards all is as if it had not."""
    try_again_at_once(monkeypatch)
    commits = Commits.of(server, open_results, [table("a", "b")], [table("a", "c", version=1)])
    disturbed, count = -1, 0
    while disturbed < count:
        store = commits.begin(disturbed)
        requests: list[Request] = []

        def disturb(request: Request, number: int = disturbed, requests: list = requests) -> object:
            requests.append(request)
            return effect if len(requests) - 1 == number else None

        with server.disturb(disturb):
            commits.end(store)
        assert keys(store) == [("a", 1), ("b", 0), ("c", 1)], f"request {disturbed} of {count}"
        count = count or len(requests)
        disturbed += 1
    adls.forget_clients()
    assert count >= 10


def test_runs_that_start_together_leave_each_image_once_and_a_reader_misses_none(open_results):
    first = open_results("out")
    publish(first, stage(first, "20260101T000000-0", 0, table("a", "b")))
    ended, seen = threading.Event(), []

    def read() -> None:
        while not ended.is_set():
            seen.append([path for path, _ in keys(open_results("out"))])
            ended.wait(0.2)  # else it would keep a core from the runs

    def run(number: int, version: int) -> None:
        store = open_results("out")
        name = f"20260102T00000{version}-0000000{number}"
        store.resume("net@1")
        found = store.look()
        todo = without(pa.concat_tables([table("a", version=version), table(f"new {version}")]), found.rows)
        if todo.num_rows:
            store.publish(make_work(store, stage(store, name, 0, todo), seen=found))
        store.unstage(name)
        store.recover("net@1")

    reader = threading.Thread(target=read)
    reader.start()
    try:
        for version in range(1, 3):
            with ThreadPoolExecutor(3) as pool:
                runs = [pool.submit(run, number, version) for number in range(3)]
            assert [run.result() for run in runs] == [None] * 3
            assert keys(first) == [
                ("a", version),
                ("b", 0),
                *((f"new {number}", 0) for number in range(1, version + 1)),
            ]
    finally:
        ended.set()
        reader.join()
    assert len(seen) > 5 and all(len(set(paths)) == len(paths) and {"a", "b"} <= set(paths) for paths in seen)
    assert not first.storage.exists("_staging")


def test_no_secret_is_in_an_error_of_the_table(dfs, adls_root, adls_settings, monkeypatch, caplog):
    storage = AdlsStorage(adls_root, load_config("local", **adls_settings).storage)
    container = storage._container
    expiry = dt.datetime.now(dt.UTC) - dt.timedelta(hours=1)
    token = generate_file_system_sas(ACCOUNT, container, KEY, permission=ALL, expiry=expiry)
    monkeypatch.setenv("ADLS_SAS", token)
    monkeypatch.setenv("WRONG_KEY", KEY[:-6] + "AAAA==")
    for reference in ("env:ADLS_SAS", "env:WRONG_KEY"):
        table = Table(AdlsStorage(adls_root, StorageOptions(dfs.endpoint, reference)), "results", RESULT_SCHEMA)
        for action in (table.open, table.create):
            with pytest.raises(StorageError, match=f"the credential {reference} was refused") as error:
                action()
            shown = "".join(traceback.format_exception(error.value)) + caplog.text
            assert not [form for form in forms_of(token) | {KEY[:-6]} if form in shown]
            assert "\n" not in str(error.value)


def test_the_doctor_looks_into_a_container(adls_root, adls_settings):
    config = load_config("local", **adls_settings, **{"paths.results": adls_root})
    assert doctor._storage(config) == f"{adls_root} can be written to"
    wrong = load_config(
        "local", **{**adls_settings, "storage.credential": "env:NOT_THERE"}, **{"paths.results": adls_root}
    )
    (finding,) = [doctor._look("storage", doctor._storage, wrong)]
    assert not finding.ok and "export NOT_THERE" in finding.detail
