"""What this host has of what the project needs, and for each thing that is missing the one step that mends it."""

import importlib.metadata
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from helpers.config import PROJECT, Config
from helpers.errors import UserError
from helpers.java import check_java
from helpers.storage import open_storage

MINIMUM_PYTHON = (3, 11)


@dataclass(frozen=True)
class Finding:
    """One line of the report: what was looked at, whether it will do, and what was found or how to mend it."""

    name: str
    ok: bool
    detail: str

    def __str__(self) -> str:
        return f"{'ok     ' if self.ok else 'missing'}  {self.name:<9} {self.detail}"


def examine(config: Config) -> list[Finding]:
    """Look at everything, in the order in which a newcomer should mend it."""
    checks: list[tuple[str, Callable[[Config], str]]] = [
        ("python", _python),
        ("packages", _packages),
        ("java", _java),
        ("spark", _spark),
        ("openvino", _openvino),
        ("data", _data),
        ("storage", _storage),
        ("machine", _machine),
    ]
    return [_look(name, check, config) for name, check in checks]


def _look(name: str, check: Callable[[Config], str], config: Config) -> Finding:
    try:
        return Finding(name, True, check(config))
    except (UserError, ImportError, OSError) as error:
        return Finding(name, False, str(error))


def _python(config: Config) -> str:
    if sys.version_info < MINIMUM_PYTHON:
        raise UserError(
            f"Python {sys.version.split()[0]} is too old; install {'.'.join(map(str, MINIMUM_PYTHON))} or newer"
        )
    return sys.version.split()[0]


def _packages(config: Config) -> str:
    pins = re.findall(r"^([\w.-]+)(?:\[\w+\])?==(\S+)", (PROJECT / "requirements.txt").read_text(), re.MULTILINE)
    wrong = [f"{name} {_version(name)} (pinned {pin})" for name, pin in pins if _version(name).split("+")[0] != pin]
    if any("not installed" in line for line in wrong):
        raise UserError(f"{', '.join(wrong)}: run `make setup` or `pip install -r requirements.txt`")
    return f"{len(pins)} pinned packages are installed" + (f"; other versions: {', '.join(wrong)}" if wrong else "")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _java(config: Config) -> str:
    if config.spark.mode in ("connect", "databricks"):
        return f"not needed here in mode {config.spark.mode}"
    return check_java()


def _spark(config: Config) -> str:
    return f"pyspark {_version('pyspark')}, mode {config.spark.mode}, {config.spark.master} (profile {config.profile})"


def _openvino(config: Config) -> str:
    import openvino as ov

    core = ov.Core()
    precisions = core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    return f"{ov.__version__.split('-')[0]}, devices {', '.join(core.available_devices)}, CPU: {', '.join(precisions)}"


def _data(config: Config) -> str:
    from helpers.fashion_mnist import is_whole

    if not is_whole(config.paths.data):
        raise UserError(f"Fashion-MNIST is not in {config.paths.data}, or is damaged there: run `make setup`")
    return f"Fashion-MNIST, checksums verified, in {config.paths.data}"


def _storage(config: Config) -> str:
    storage = open_storage(config.paths.results, config)
    probe = f".doctor-{os.getpid()}"
    storage.write(probe, b"")
    storage.delete(probe)
    return f"{storage.root} can be written to"


def _machine(config: Config) -> str:
    import psutil

    memory, disk = psutil.virtual_memory(), psutil.disk_usage(str(Path(PROJECT)))
    return (
        f"{len(os.sched_getaffinity(0))} cores, {memory.available / 2**30:.1f} of {memory.total / 2**30:.1f} GiB of "
        f"memory free, {disk.free / 2**30:.0f} GiB of disk free"
    )
