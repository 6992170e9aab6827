"""The packed environment, on workers whose interpreter has none of our packages."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pytest
from cluster import Run, start_run
from test_house_rules import EXECUTOR_MODULES

from conf import pack
from helpers import pipeline
from helpers.config import PROJECT, load_config, parse_assignments
from helpers.errors import HostError
from helpers.pipeline import listing as ingest
from helpers.session import find_environment, pack_helpers
from studies.cluster import LOOPBACK, Cluster, Process

REQUIREMENTS = (PROJECT / "requirements.txt").read_text(encoding="utf-8")
MEGABYTES = 400  # the most that the archive may have
MODULES = [f"helpers.{name}" for name in EXECUTOR_MODULES] + [
    "av",
    "azure.identity",
    "azure.storage.filedatalake",
    "obstore",
]


@pytest.fixture(scope="module")
def archive(tmp_path_factory) -> Path:
    return pack.pack(tmp_path_factory.mktemp("pack") / "executors.tar.gz")


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory) -> str:
    """An interpreter with the standard library and nothing else."""
    folder = tmp_path_factory.mktemp("bare")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    return str(folder / "bin" / "python")


@pytest.fixture(scope="module")
def cluster(bare_python, tmp_path_factory) -> Iterator[Cluster]:
    """A cluster whose processes know Java, a bare Python, and nothing of this project."""
    java = Path(shutil.which("java") or "")
    environment = {"PATH": f"{java.parent}{os.pathsep}{os.defpath}", "PYSPARK_PYTHON": bare_python}
    environment |= {name: os.environ[name] for name in ("JAVA_HOME",) if name in os.environ}
    started = Cluster(tmp_path_factory.mktemp("cluster"), environment)
    started.complete(workers=1)  # each unpacks the archive, and one of them shows all there is
    yield started
    started.stop()


def names_in(archive: Path) -> list[str]:
    with tarfile.open(archive) as tar:
        return tar.getnames()


def test_the_archive_is_slim_and_has_no_training_framework(archive):
    assert archive.stat().st_size <= MEGABYTES * 2**20
    folders = {name.split("/")[2] for name in names_in(archive) if name.startswith("./packages/")}
    assert {"numpy", "pyarrow", "cv2", "openvino", "azure"} <= folders
    assert not folders & {"torch", "torchvision", "onnx", "nncf", "pyspark", "helpers", "matplotlib", "deltalake"}


def test_unpacked_anywhere_it_runs_the_executors_modules_and_takes_nothing_from_this_python(archive, tmp_path):
    shipped = shutil.copy(pack_helpers(), tmp_path)
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path, filter="tar")
    script = f"""
import importlib, sys
for name in {MODULES}:
    print(importlib.import_module(name).__file__)
print(*sys.path, sys.prefix, sep="\\n")
"""
    command = [str(tmp_path / "bin" / "python"), "-c", script]
    answer = subprocess.run(command, env={"PYTHONPATH": shipped}, cwd="/", capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
    places = [line for line in answer.stdout.splitlines() if line]
    assert len(places) > len(MODULES)
    assert [place for place in places if not place.startswith(str(tmp_path))] == []


def test_workers_without_our_packages_cannot_run_a_task(
    cluster, samples, bundle_uri, bare_python, tmp_path, monkeypatch
):
    """Which is what makes the next test one of the archive."""
    monkeypatch.setenv("PYSPARK_PYTHON", bare_python)
    run = start_run(
        samples, bundle_uri, tmp_path / "out", tmp_path / "run.log", *cluster.assignments, profile="cluster"
    )
    run.finish().assert_one_clear_error("No module named", "make pack", "spark.environment")


def test_workers_without_our_packages_run_from_the_archive(
    cluster, samples, bundle_uri, archive, tmp_path, monkeypatch
):
    monkeypatch.delenv("PYSPARK_PYTHON", raising=False)
    settings = [*cluster.assignments, f"spark.environment={archive}"]
    run = start_run(samples, bundle_uri, tmp_path / "out", tmp_path / "run.log", *settings, profile="cluster").finish()
    assert (run.summary["ok"], run.summary["failed"]) == (60, 4), run.errors
    task = pipeline.make_task(str(samples), bundle_uri, str(tmp_path / "unused"), load_config("local"))
    listed = ingest.list_images(task.source, load_config("local")).images
    alone = pa.Table.from_batches(task.results(listed.to_batches())).sort_by("path").to_pylist()
    assert run.rows() == alone
    assert list(cluster.folder.glob("work*/app-*/*/environment/bin/python"))


def test_the_recipe_for_yarn_runs_on_such_a_cluster(cluster, samples, bundle_uri, archive, tmp_path, monkeypatch):
    """The script as it is: another master, an executor as small as the cluster's worker."""
    monkeypatch.delenv("PYSPARK_PYTHON", raising=False)
    small = {
        "MASTER": cluster.url,
        "ARCHIVE": str(archive),
        "CORES": "1",
        "EXECUTORS": "1",
        "HEAP": "512m",
        "OVERHEAD": "384m",
    }
    for name, value in {**small, "SPARK_LOCAL_IP": LOOPBACK}.items():
        monkeypatch.setenv(name, value)
    process = Process(
        ["sh", "conf/yarn.sh", str(samples), bundle_uri, str(tmp_path / "out"), "--set", "pictures=3"],
        tmp_path / "run.log",
    )
    run = Run(tmp_path / "out", process).finish()
    assert (run.summary["ok"], run.summary["failed"]) == (60, 4), run.errors
    assert len(run.rows()) == 64 and len(list((tmp_path / "out" / "pictures").iterdir())) == 3


@pytest.mark.parametrize("recipe", ["yarn.sh", "kubernetes.sh"])
def test_a_recipe_without_its_arguments_says_how_it_is_used(recipe):
    answer = subprocess.run(["sh", PROJECT / "conf" / recipe], capture_output=True, text=True, check=False)
    assert answer.returncode == 2
    assert f"conf/{recipe} SOURCE MODEL OUTPUT" in answer.stdout


def test_the_image_for_kubernetes_takes_what_there_is_and_no_torch():
    text = (PROJECT / "conf" / "Dockerfile").read_text()
    copied = [line.split()[1] for line in text.splitlines() if line.startswith("COPY ") and "--from" not in line]
    assert copied and all((PROJECT / name).exists() for name in copied)
    names = set(re.search(r"grep -E '\^\((.+)\)=='", text)[1].replace("azure-[a-z-]+|", "").split("|"))
    assert names >= {name for name in pack.executor_packages() if not name.startswith("azure-")}
    assert names <= {name for name in (line.partition("==")[0] for line in REQUIREMENTS.splitlines()) if name}
    assert not names & {"torch", "torchvision", "onnx", "nncf", "pyspark"}
    assert f"apache/spark:{version('pyspark')}-" in text


def test_the_user_of_the_pods_may_write_where_a_run_does():
    """All else in the image is root's."""
    lines = (PROJECT / "conf" / "Dockerfile").read_text().splitlines()
    (user,) = [line.split()[1] for line in lines if line.startswith("USER ")]
    (made,) = [line.split() for line in lines if line.startswith("RUN install -d ")]
    assert made[made.index("-o") + 1] == user
    last = [line.split()[1] for line in lines if line.startswith("WORKDIR ")][-1]
    home = [line.split()[1] for line in lines if line.startswith("WORKDIR ")][0]
    assert {last, f"{home}/out"} <= set(made) and PROJECT / "out" in Path(load_config("local").paths.data).parents


def test_dashboards_of_kubernetes_go_below_the_output(tmp_path):
    for name in ("conf", ".venv/bin"):
        (tmp_path / name).mkdir(parents=True)
    shutil.copy(PROJECT / "conf" / "kubernetes.sh", tmp_path / "conf")
    submit = tmp_path / ".venv" / "bin" / "spark-submit"
    submit.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    submit.chmod(0o755)
    command = [
        "sh",
        str(tmp_path / "conf" / "kubernetes.sh"),
        "/photos",
        "/model",
        "abfss://c@a.dfs.core.windows.net/out",
    ]
    environment = {**os.environ, "API": "https://host:6443", "IMAGE": "image"}
    arguments = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.splitlines()
    settings = [value for name, value in pairwise(arguments) if name == "--set"]
    assert settings == ["spark.master=k8s://https://host:6443", "paths.runs=abfss://c@a.dfs.core.windows.net/out/runs"]
    config = load_config("cluster", **parse_assignments(settings))
    assert config.paths.runs == "abfss://c@a.dfs.core.windows.net/out/runs"


def test_an_archive_that_is_not_there_has_a_remedy():
    with pytest.raises(HostError, match=r"nowhere\.tar\.gz.*make pack"):
        find_environment(load_config("cluster", **{"spark.environment": "out/nowhere.tar.gz"}))


def test_an_archive_in_a_store_is_left_to_spark():
    config = load_config("cluster", **{"spark.environment": "hdfs://name/executors.tar.gz"})
    assert find_environment(config) == "hdfs://name/executors.tar.gz"


def test_a_package_that_is_not_installed_is_named():
    assert "numpy" in pack.closure(["pyarrow", "numpy"])
    with pytest.raises(HostError, match=r"no-such-package.*make setup"):
        pack.closure(["numpy", "no-such-package"])
