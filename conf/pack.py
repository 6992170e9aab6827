"""Pack what executors import into one archive, for workers that lack it: `make pack`.

The archive holds this environment's Python interpreter and the packages of inference in the versions installed here,
without torch. `spark.environment` ships it (`helpers.session`). Workers need no Python, but the same processor family
and a C library at least as new as this machine's.
"""

import importlib.metadata
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from helpers.config import PROJECT
from helpers.errors import HostError

ARCHIVE = PROJECT / "out" / "pack" / "executors.tar.gz"
# The pins in requirements.txt that tasks import, some of them late.
PACKAGES = re.compile(
    r"^(numpy|pyarrow|opencv-python-headless|openvino|av|pycocotools|obstore|azure-[\w-]+)==", re.MULTILINE
)
IMPORTS = "import helpers.pipeline.task, av, cv2, azure.identity, azure.storage.filedatalake, obstore, openvino as ov; \
ov.Core().available_devices"
# Tests and sources, devices other than the CPU, formats other than OpenVINO's own, and Arrow's network services.
LEFT_OUT = re.compile(
    r"/tests?/|/include/|/cmake/|\.(pyx|pxi|pxd|pyi|h|hpp|lib|a)$|^\.\./|"
    r"openvino/libs/(cache\.json|libopenvino_(intel_[gn]pu_plugin|(onnx|tensorflow|pytorch|paddle|gguf|jax)\w*_frontend))|"
    r"pyarrow/(src/|lib\w*_flight|_flight|libarrow_python\w*\.so(\.\d+\.\d+\.\d+)?$)"
)
NOT_OF_THE_LIBRARY = ("test", "idlelib", "tkinter", "turtledemo", "ensurepip", "*-packages", "config-*", "*.opt-?.pyc")
# Python finds its library by its own location, but a shared libpython only by this variable.
START = """#!/bin/sh
here=$(dirname "$(readlink -f "$0")")
export LD_LIBRARY_PATH="$here/../lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
export PYTHONPATH="$here/../packages${PYTHONPATH:+:$PYTHONPATH}"
exec "$here/%s" "$@"
"""


def pack(archive: Path = ARCHIVE) -> Path:
    """Write the archive; takes some seconds.

    Raises:
        HostError: a package is missing here, or the packed environment does not start.
    """
    archive.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=archive.parent) as temporary:
        folder = Path(temporary, "environment")
        _copy_interpreter(folder)
        for name in sorted(closure(executor_packages())):
            _copy_package(name, folder / "packages")
        command = [str(folder / "bin" / "python"), "-c", IMPORTS]
        tried = subprocess.run(command, env={"PYTHONPATH": str(PROJECT)}, capture_output=True, text=True, check=False)
        if tried.returncode:
            raise HostError(f"the packed environment does not start:\n{tried.stderr}")
        unfinished = Path(temporary, archive.name)
        # The time to compress it harder weighs more than half a second per worker that unpacks it.
        with tarfile.open(unfinished, "w:gz", compresslevel=4) as tar:
            tar.add(folder, ".")
        unfinished.replace(archive)
    return archive


def executor_packages() -> list[str]:
    """The packages of `requirements.txt` that tasks import."""
    return PACKAGES.findall((PROJECT / "requirements.txt").read_text(encoding="utf-8"))


def closure(names: list[str]) -> set[str]:
    """The packages and everything that they require here.

    Raises:
        HostError: one of them is not installed.
    """
    found: set[str] = set()
    pending = [*names]
    while pending:
        name = canonicalize_name(pending.pop())
        if name in found:
            continue
        try:
            needs = [Requirement(line) for line in importlib.metadata.requires(name) or []]
        except importlib.metadata.PackageNotFoundError:
            raise HostError(f"{name} is not installed here, so it cannot be packed: run `make setup`") from None
        found.add(name)
        pending += [need.name for need in needs if need.marker is None or need.marker.evaluate({"extra": ""})]
    return found


def _copy_interpreter(folder: Path) -> None:
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    executable = Path(sys.base_prefix, "bin", version)
    (folder / "bin").mkdir(parents=True)
    shutil.copy2(executable, folder / "bin" / version)
    start = folder / "bin" / "python"
    start.write_text(START % version)
    start.chmod(0o755)
    library = Path(sysconfig.get_path("stdlib", vars={"installed_base": sys.base_prefix}))
    shutil.copytree(library, folder / "lib" / version, ignore=shutil.ignore_patterns(*NOT_OF_THE_LIBRARY))
    for shared in Path(sys.base_prefix, "lib").glob(f"lib{version}.so.*"):
        shutil.copy2(shared, folder / "lib" / shared.name)


def _copy_package(name: str, folder: Path) -> None:
    for file, source in _files(name):
        target = folder / file
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source, target)


def _files(name: str) -> Iterator[tuple[str, Path]]:
    for path in importlib.metadata.files(name) or []:
        source = Path(str(path.locate()))
        if not LEFT_OUT.search(str(path)) and source.is_file():
            yield str(path), source


if __name__ == "__main__":
    made = pack()
    print(f"{made.relative_to(PROJECT)}: {made.stat().st_size / 2**20:.0f} MiB")
