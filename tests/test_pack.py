"""The packed environment, on workers whose interpreter has none of our packages."""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest
from cluster import Run, start_run
from test_house_rules import EXECUTOR_MODULES

from conf import pack
from helpers import pipeline
from helpers.config import PROJECT, load_config
from helpers.errors import HostError
from helpers.java import find_java, local_options
from helpers.pipeline import listing as ingest
from helpers.session import find_environment, pack_helpers
from studies.cluster import LOOPBACK, SPARK_HOME, Cluster, Process, wait_for

MEGABYTES = 700  # the most that the archive may hold, of which `make pack` makes 236
NOBODY = 65534  # a user who owns nothing
# The daemon is of this machine's workers, and nodes have Spark's.
MODULES = [f"helpers.{name}" for name in EXECUTOR_MODULES if name != "pipeline.daemon"] + [
    "av",
    "azure.identity",
    "azure.storage.filedatalake",
    "obstore",
]


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory) -> str:
    """An interpreter with the standard library and nothing else."""
    folder = tmp_path_factory.mktemp("bare")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    return str(folder / "bin" / "python")


@pytest.fixture(scope="module")
def cluster(bare_python, tmp_path_factory) -> Iterator[Cluster]:
    """A cluster whose processes know Java, a bare Python, and nothing of this project."""
    java = Path(find_java() or "")
    environment = {"PATH": f"{java.parent}{os.pathsep}{os.defpath}", "PYSPARK_PYTHON": bare_python}
    environment |= {name: os.environ[name] for name in ("JAVA_HOME",) if name in os.environ}
    started = Cluster(tmp_path_factory.mktemp("cluster"), environment)
    started.complete(workers=1)  # each unpacks the archive, and one of them shows all there is
    yield started
    started.stop()


@pytest.fixture(scope="module")
def opened(archive) -> Iterator[tuple[Path, list[tarfile.TarInfo]]]:
    """The archive where everybody may read it, which pytest's own folders are not, and all that is in it.

    Read once for both, which takes seconds.
    """
    members: list[tarfile.TarInfo] = []

    def take(member: tarfile.TarInfo, folder: str) -> tarfile.TarInfo:
        members.append(member)
        return tarfile.tar_filter(member, folder)

    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        with tarfile.open(archive, "r|gz") as tar:
            tar.extractall(Path(name, "environment"), filter=take)
        yield Path(name, "environment"), members


@pytest.fixture(scope="module")
def unpacked(opened) -> Path:
    return opened[0]


@pytest.fixture(scope="module")
def members(opened) -> list[tarfile.TarInfo]:
    return opened[1]


def test_the_archive_is_slim_and_has_no_training_framework(members):
    assert sum(member.size for member in members) <= MEGABYTES * 2**20
    names = {member.name for member in members}
    folders = {name.split("/")[2] for name in names if name.startswith("./packages/")}
    assert {"numpy", "pyarrow", "cv2", "openvino", "azure", "deltalake", "pydantic", "tensorboard"} <= folders
    assert not folders & {"torch", "torchvision", "onnx", "nncf", "pyspark", "matplotlib", "grpc", "PIL"}
    assert len([member for member in members if member.isfile() and "/libavcodec" in member.name]) == 1
    assert {"./helpers/cli.py", "./conf/base.yaml", "./conf/submit.py", "./conf/log4j2.properties"} <= names


def test_every_machine_may_read_what_is_in_it(members):
    assert {(member.uid, member.gid) for member in members} == {(0, 0)}
    assert [member.name for member in members if member.mode & 0o444 != 0o444] == []


def test_unpacked_anywhere_it_runs_the_executors_modules_and_takes_nothing_from_this_python(unpacked, tmp_path):
    shipped = shutil.copy(pack_helpers(), tmp_path)
    script = f"""
import importlib, sys
for name in {MODULES}:
    print(importlib.import_module(name).__file__)
print(*sys.path, sys.prefix, sep="\\n")
"""
    command = [str(unpacked / "bin" / "python"), "-c", script]
    answer = subprocess.run(command, env={"PYTHONPATH": shipped}, cwd="/", capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
    places = [line for line in answer.stdout.splitlines() if line]
    assert len(places) > len(MODULES)
    assert [place for place in places if not place.startswith((str(unpacked), str(tmp_path)))] == []


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
    started = start_run(samples, bundle_uri, tmp_path / "out", tmp_path / "run.log", *settings, profile="cluster")
    # Its JVM deletes the archive and what it has unpacked of it, 1.4 GB, unless it is killed before.
    wait_for("the end of the run and of its JVM", lambda: not started.process.members())
    run = started.finish()
    assert (run.summary["ok"], run.summary["failed"]) == (60, 4), run.errors
    assert "over 1 slots" in run.errors  # the cluster has one core, of which Spark says two
    task = pipeline.make_task(str(samples), bundle_uri, str(tmp_path / "unused"), load_config("local"))
    listed = ingest.list_images(task.source, load_config("local")).images
    alone = pa.Table.from_batches(task.results(listed.to_batches())).sort_by("path").to_pylist()
    assert run.rows() == alone
    assert list(cluster.folder.glob("work*/app-*/*/environment/bin/python"))


@pytest.fixture
def small_archive(tmp_path) -> Path:
    """What takes the place of 700 MB that driver and executor unpack: in it, Python is this environment's."""
    start = tmp_path / "python"
    start.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    start.chmod(0o755)
    with tarfile.open(tmp_path / "small.tar.gz", "w:gz") as tar:
        tar.add(start, "./bin/python")
    return tmp_path / "small.tar.gz"


def test_the_recipe_for_yarn_runs_on_such_a_cluster(cluster, samples, bundle_uri, small_archive, tmp_path, monkeypatch):
    """The script as it is: another master, an executor as small as the cluster's worker."""
    monkeypatch.delenv("PYSPARK_PYTHON", raising=False)
    small = {
        "MASTER": cluster.url,
        "ARCHIVE": str(small_archive),
        "CORES": "1",
        "EXECUTORS": "1",
        "HEAP": "512m",
        "OVERHEAD": "384m",
    }
    for name, value in {**small, "SPARK_LOCAL_IP": LOOPBACK, "SPARK_SUBMIT_OPTS": local_options()}.items():
        monkeypatch.setenv(name, value)
    options = ["--set", "pictures=3", "--conf", f"spark.executor.extraJavaOptions={local_options()}"]
    command = ["sh", "conf/yarn.sh", str(samples), bundle_uri, str(tmp_path / "out"), *options]
    before = list(cluster.folder.glob("work*/app-*/*/environment/bin/python"))
    process = Process(command, tmp_path / "run.log")
    run = Run(tmp_path / "out", process).finish()
    assert (run.summary["ok"], run.summary["failed"]) == (60, 4), run.errors
    assert len(run.rows()) == 64 and len(list((tmp_path / "out" / "pictures").iterdir())) == 3
    assert len(list(cluster.folder.glob("work*/app-*/*/environment/bin/python"))) > len(before)


def test_a_driver_that_owns_nothing_but_its_working_directory_runs_from_the_archive(unpacked, samples, bundle_uri):
    """On a machine without Python: of this one's it has Java and Spark, and of the project the archive alone."""
    if os.geteuid() or not shutil.which("setpriv"):
        pytest.skip("only root can be another user, by setpriv")
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        place.chmod(0o755)
        shutil.copytree(samples, place / "samples", copy_function=shutil.copyfile)
        shutil.copytree(bundle_uri, place / "model", copy_function=shutil.copyfile)
        for path in (*place.glob("samples/**"), *place.glob("model/**")):  # folders, which pytest keeps to itself
            path.chmod(0o755)
        working = place / "working"
        working.mkdir()
        os.chown(working, NOBODY, NOBODY)
        libraries = place / "spark"  # where everybody may read it
        libraries.mkdir()
        for file in (SPARK_HOME / "python" / "lib").glob("*.zip"):
            shutil.copyfile(file, libraries / file.name)
        shutil.copytree(SPARK_HOME / "jars", libraries / "jars")
        shutil.copytree(SPARK_HOME / "bin", libraries / "bin")
        environment = {"PATH": f"{Path(find_java() or '').parent}:/usr/bin:/bin", "SPARK_HOME": str(libraries)}
        environment |= {"TMPDIR": str(working), "PYTHONPATH": ":".join(map(str, libraries.glob("*.zip")))}
        environment |= {"HELPERS_PATHS__RUNS": str(working / "runs")}
        command = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "env", f"--chdir={working}"]
        command += [str(unpacked / "bin/python"), str(unpacked / "conf/submit.py"), "run"]
        command += ["--profile", "local", "--set", "spark.master=local[2]", "--source", str(place / "samples")]
        command += ["--model", str(place / "model"), "--output", str(working / "out")]
        process = Process(command, place / "run.log", environment, inherits=False)
        run = Run(working / "out", process).finish()
        assert (run.summary["ok"], run.summary["failed"]) == (60, 4), run.errors
        assert len(run.rows()) == 64 and "Traceback" not in run.errors
        assert list(working.glob("runs/pipeline/*/events*")), run.errors
        assert "window.vegaEmbed" in (working / "out" / "report" / "index.html").read_text(encoding="utf-8")


def test_the_image_for_kubernetes_is_of_sparks_and_an_archive():
    """Of Spark's image less than all is copied: jars and tools that a run has no use for stay behind."""
    lines = dockerfile()
    (base,) = [line.split()[1] for line in lines if re.match("FROM .* AS spark$", line)]
    assert base.startswith(f"apache/spark:{importlib.metadata.version('pyspark')}-")
    copied = [line for line in lines if line.startswith("COPY ")]
    assert copied and [line for line in copied if not line.startswith("COPY --from=spark ")] == []
    (chosen,) = [line.partition("=")[2] for line in lines if line.startswith("ARG ARCHIVE=")]
    (added,) = [line.split()[1] for line in lines if line.startswith("ADD ")]
    assert PROJECT / added.replace("${ARCHIVE}", chosen) == pack.ARCHIVE
    assert not [line for line in lines if re.search("pip|apt", line)]
    assert (PROJECT / ".dockerignore").read_text().splitlines()[1:] == ["*", f"!{added.replace('${ARCHIVE}', '*')}"]


def test_what_the_image_leaves_out_of_sparks_is_there():
    """Else a pattern of a jar that a new release of Spark names in another way would leave it in."""
    text = (PROJECT / "conf" / "Dockerfile").read_text()
    patterns = re.findall(r"(\S+[-_]\*)", text.partition("cd jars")[2].partition("\nFROM ")[0])
    assert len(patterns) > 5
    assert [pattern for pattern in patterns if not list((SPARK_HOME / "jars").glob(f"{pattern}.jar"))] == []


def test_the_user_of_the_pods_may_write_where_it_works_and_has_its_home_there():
    """All else in the image is root's."""
    lines = dockerfile()
    (user,) = [line.split()[1] for line in lines if line == "USER 185"]
    (made,) = [line.split() for line in lines if " useradd " in line]
    (work,) = [line.split()[1] for line in lines if line.startswith("WORKDIR ")]
    assert made[made.index("--gid") + 1] == made[made.index("--uid") + 1] == user
    assert made[made.index("--home-dir") + 1] == work
    assert made[made.index("-o") + 1] == user and made[made.index("0775") + 1] == work


def dockerfile() -> list[str]:
    """Its instructions, each in one line."""
    return (PROJECT / "conf" / "Dockerfile").read_text().replace("\\\n", "").splitlines()


def test_an_archive_that_is_not_there_has_a_remedy():
    with pytest.raises(HostError, match=r"nowhere\.tar\.gz.*make pack"):
        find_environment(load_config("cluster", **{"spark.environment": "out/nowhere.tar.gz"}))


def test_an_archive_in_a_store_is_left_to_spark():
    config = load_config("cluster", **{"spark.environment": "hdfs://name/vision.tar.gz"})
    assert find_environment(config) == "hdfs://name/vision.tar.gz"


def test_what_a_package_asks_of_another_by_an_extra_is_packed(monkeypatch):
    """As torch asks for CUDA's libraries."""
    needs = {"torch": ["toolkit[blas]", 'rocm; platform_system == "No"'], "toolkit": ['blas; extra == "blas"']}
    needs["toolkit"] += ['solver; extra == "solver"', "finder"]
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: needs.get(name))
    assert pack.closure(["torch"]) == {"torch", "toolkit", "blas", "finder"}


def test_what_a_run_leaves_out_is_packed_where_another_package_needs_it():
    assert "pillow" not in pack.distributions()
    assert {"pillow", "matplotlib", "numpy"} <= {*pack.distributions(["matplotlib"])}


@pytest.mark.parametrize("train", [False, True])
def test_what_trains_has_the_programs_with_it(tmp_path, train):
    pack._copy_project(tmp_path, train)
    assert (tmp_path / "helpers" / "cli.py").exists()
    programs = {path.name for path in (tmp_path / "notebooks" / "programs").rglob("*.py")}
    assert {"fashion_mnist.py", "fashion_data.py", "train_yolact.py"} <= programs if train else not programs


def test_a_package_that_is_not_installed_is_named(tmp_path):
    assert "numpy" in pack.closure(["pyarrow", "numpy"])
    with pytest.raises(HostError, match=r"no-such-package.*make setup"):
        pack.pack(tmp_path / "vision.tar.gz", others=["no-such-package"])
