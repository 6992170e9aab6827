"""What this host has of what the project needs, and for each thing that is missing the one step that mends it."""

import importlib.metadata
import os
import re
import socket
import sys
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from helpers.config import DISTRIBUTION, INSTALLED, PROJECT, Config, detect_profile
from helpers.errors import TRAIN_REMEDY, HostError, UserError
from helpers.java import check_java
from helpers.session import check_answers, check_master, choose_mode, count_cores, find_environment, shown_master
from helpers.storage import open_storage

MINIMUM_PYTHON = (3, 11)
ABSENT = "not installed"
PIN = re.compile(r"^([\w.-]+)(?:\[\w+\])?==([^\s;]+)", re.MULTILINE)
FASHION_MNIST = {"train-images-idx3-ubyte": 47_040_016, "train-labels-idx1-ubyte": 60_008}  # bytes of each file
FASHION_MNIST |= {"t10k-images-idx3-ubyte": 7_840_016, "t10k-labels-idx1-ubyte": 10_008}


@dataclass(frozen=True)
class Finding:
    """One line of the report: what was looked at, whether it will do, and what was found or how to mend it."""

    name: str
    ok: bool
    detail: str

    def __str__(self) -> str:
        return f"{'ok     ' if self.ok else 'missing'}  {self.name:<9} {self.detail}"


def examine(config: Config, names: Collection[str] = ()) -> list[Finding]:
    """Look at everything, or at what is named, in the order in which a newcomer should mend it."""
    checks = [_python, _packages, _java, _spark, _workers, _openvino, _data, _models, _secret, _storage, _machine]
    by_name = {check.__name__.removeprefix("_"): check for check in checks}
    return [_look(name, check, config) for name, check in by_name.items() if not names or name in names]


def _look(name: str, check: Callable[[Config], str], config: Config) -> Finding:
    try:
        return Finding(name, True, check(config))
    except ImportError as error:
        return Finding(name, False, f"{error}: {_install(config)}")
    except (UserError, OSError) as error:
        return Finding(name, False, str(error))


def _python(config: Config) -> str:
    if sys.version_info < MINIMUM_PYTHON:
        newer = ".".join(map(str, MINIMUM_PYTHON))
        raise UserError(f"Python {sys.version.split()[0]} is too old; install {newer} or newer")
    return sys.version.split()[0]


def _packages(config: Config) -> str:
    pins = _pins()
    versions = {name: _version(name) for name, _, _ in pins}
    wrong = [f"{name} {versions[name]} (pinned {pin})" for name, pin, _ in pins if versions[name].split("+")[0] != pin]
    if any(versions[name] == ABSENT for name, _, train in pins if not train):
        raise UserError(f"{', '.join(wrong)}: {_install(config)}")
    if any(version == ABSENT for version in versions.values()):
        return f"what a run needs is installed; to train and to convert models, {TRAIN_REMEDY} ({', '.join(wrong)})"
    return f"{len(pins)} pinned packages are installed" + (f"; other versions: {', '.join(wrong)}" if wrong else "")


def _pins() -> list[tuple[str, str, bool]]:
    """Name and version of each required package, and whether a run does without it."""
    if INSTALLED:
        lines = importlib.metadata.requires(DISTRIBUTION) or []
        run, train = ("\n".join(line for line in lines if ("extra ==" in line) == extra) for extra in (False, True))
    else:
        run, _, train = (PROJECT / "requirements.txt").read_text(encoding="utf-8").partition("# Train, ")
    return [(*pin, text is train) for text in (run, train) for pin in PIN.findall(text)]


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ABSENT


def _install(config: Config) -> str:
    if config.profile in ("colab", "databricks"):
        return "run the first cell of a notebook"
    return "run `make setup` or `pip install -r requirements.txt`"


def _java(config: Config) -> str:
    mode, _ = choose_mode(config)
    if mode == "sail":
        return "is not here; runs do without, trainings on Spark need it"
    if mode == "databricks" or config.spark.master.startswith("sc://"):
        return f"not needed here in mode {mode}"
    return check_java()


def _spark(config: Config) -> str:
    master = config.spark.master
    if config.spark.mode == "databricks" and detect_profile() != "databricks":
        raise HostError("mode databricks is for a Databricks notebook or job: name another --profile here")
    check_master(config)
    if config.spark.mode == "connect":
        check_answers(master)
    if config.spark.mode == "cluster":
        _check_master(master)
    where = "the session of this host" if config.spark.mode == "databricks" else shown_master(config)
    mode, why = choose_mode(config, "a run of files")
    return f"pyspark {_version('pyspark')}, mode {mode} ({why}), {where} (profile {config.profile})"


def _check_master(master: str) -> None:
    url = urlsplit(master.removeprefix("k8s://"))
    if master == "yarn" and not {"HADOOP_CONF_DIR", "YARN_CONF_DIR"} & set(os.environ):
        raise HostError("YARN is found through its configuration: set HADOOP_CONF_DIR to the folder with yarn-site.xml")
    if url.hostname:
        port = url.port or (443 if url.scheme == "https" else 7077)
        try:
            socket.create_connection((url.hostname, port), timeout=10).close()
        except OSError as error:
            reason = error.strerror or error
            raise HostError(
                f"no master answers at {url.hostname}:{port} ({reason}): start it, or correct spark.master"
            ) from None


def _workers(config: Config) -> str:
    if config.spark.mode != "cluster":
        is_own = config.spark.mode in ("local", "sail", "auto")
        return "have the packages of this environment" if is_own else "are the host's"
    if config.spark.environment:
        return f"get {find_environment(config)}"
    python = os.environ.get("PYSPARK_PYTHON", sys.executable)
    remedy = "`make pack` and set spark.environment"
    return f"must have the packages of requirements.txt and {python}; if they have not, {remedy}"


def _openvino(config: Config) -> str:
    import openvino as ov

    core = ov.Core()
    precisions = core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    return f"{ov.__version__.split('-')[0]}, devices {', '.join(core.available_devices)}, CPU: {', '.join(precisions)}"


def _data(config: Config) -> str:
    folder = Path(config.paths.data, "FashionMNIST", "raw")
    sizes = {file.name: file.stat().st_size for file in folder.glob("*-ubyte")}
    if sizes != FASHION_MNIST:
        remedy = "run notebook 04" if config.profile in ("colab", "databricks") else "run `make setup`"
        raise UserError(f"Fashion-MNIST is not in {config.paths.data}, or is damaged there: {remedy}")
    return f"Fashion-MNIST in {config.paths.data}"


def _models(config: Config) -> str:
    storage = open_storage(config.paths.models, config)
    entries = storage.list() if storage.exists("") else ()
    names = sorted({e.path.split("/")[-2] for e in entries if e.path.endswith("/manifest.json")})
    if not names:
        return f"none yet in {storage.root}: notebooks 01 and 03 make them (`make run`), and `python -m helpers export`"
    return f"{', '.join(names)} in {storage.root}"


def _secret(config: Config) -> str:
    from helpers.storage.credentials import fetch

    reference = config.storage.credential
    if reference == "default":
        return "default: looked for when a location of Azure, AWS or GCP is opened"
    fetch(reference)
    return f"{reference} is there"


def _storage(config: Config) -> str:
    storage = open_storage(config.paths.results, config)
    volume = re.match(r"/Volumes/[^/]+/[^/]+/[^/]+", storage.root)
    if volume and not Path(volume[0]).is_dir():
        raise UserError(
            f"there is no Volume {volume[0]}: make it with `databricks bundle deploy`, or set paths.results"
        )
    probe = f".doctor-{os.getpid()}"
    storage.write(probe, b"")
    storage.delete(probe)
    return f"{storage.root} can be written to"


def _machine(config: Config) -> str:
    import psutil

    memory, disk = psutil.virtual_memory(), psutil.disk_usage(str(PROJECT))
    return (
        f"{count_cores()} cores, {memory.available / 2**30:.1f} of {memory.total / 2**30:.1f} GiB of "
        f"memory free, {disk.free / 2**30:.0f} GiB of disk free"
    )
