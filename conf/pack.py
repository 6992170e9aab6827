"""Pack Python, the packages of driver and executors, `helpers` and `conf` into one archive: `make pack`.

    python conf/pack.py [PACKAGE ...]        out/pack/vision.tar.gz, with more packages that are installed here
    python conf/pack.py --train              out/pack/train.tar.gz, with torch and the programs, to train on Kubernetes

The archive holds this environment's interpreter and the packages of inference in the versions installed here, without
Spark, which a cluster has, and without torch unless it is to train. Executors of every cluster get it by
`spark.environment` (`helpers.session`) or by spark-submit (`yarn.sh`), and the image for Kubernetes holds it
(`Dockerfile`). Machines need no Python, but the same processor family and a C library at least as new as this one's.
"""

import argparse
import importlib.metadata
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from helpers.config import PROJECT
from helpers.errors import HostError
from helpers.tracking.page import PACKED, charts

ARCHIVE = PROJECT / "out" / "pack" / "vision.tar.gz"
# The pins in requirements.txt that a run imports, some of them late: its tasks those of the first line, its driver all.
PACKAGES = re.compile(
    r"^(numpy|pyarrow|opencv-python-headless|openvino|av|pycocotools|obstore|azure-[\w-]+|"
    r"pandas|deltalake|pydantic|PyYAML|tqdm|psutil|tensorboard)==",
    re.MULTILINE,
)
# What programs of `notebooks/programs` import beside these, as ranks of a training.
TRAINING = ("torch", "torchvision", "matplotlib", "mlflow-skinny")
# What only the server of TensorBoard's page needs; a run writes its event files.
SERVING = {"grpcio", "markdown", "pillow", "setuptools", "tensorboard-data-server", "werkzeug"}
IMPORTS = """
import helpers.cli, helpers.doctor, helpers.pipeline.task, av, cv2, deltalake, obstore, pycocotools.mask
import azure.identity, azure.keyvault.secrets, azure.storage.filedatalake, openvino as ov
from tensorboard.summary.writer.event_file_writer import EventFileWriter
ov.Core().available_devices
"""
IMPORTS_OF_TRAINING = "import torch.distributed, torch.utils.tensorboard, torchvision, matplotlib.figure, mlflow"
# Tests and sources, devices other than the CPU, formats other than OpenVINO's own, Arrow's network services, and what
# TensorBoard's page shows.
LEFT_OUT = re.compile(
    r"/tests?/|/include/|/cmake/|\.(pyx|pxi|pxd|pyi|pyc|h|hpp|lib|a)$|^\.\./|tensorboard/(webfiles\.zip|.*\.(js|html)$)|"
    r"openvino/(libs/(cache\.json|libopenvino_(intel_[gn]pu_plugin|(onnx|tensorflow|pytorch|paddle|gguf|jax)\w*_frontend))|"
    r"frontend/(onnx|tensorflow|pytorch|paddle|jax)/)|"
    r"pyarrow/(src/|lib\w*_flight|_flight|libarrow_python\w*\.so(\.\d+\.\d+\.\d+)?$)"
)
# Modules for a screen or for tests, and those whose system library a cluster's machine may not have in this version.
NOT_OF_THE_LIBRARY = (
    *("test", "idlelib", "lib2to3", "pydoc_data", "tkinter", "turtle.py", "turtledemo", "ensurepip"),
    *("*-packages", "config-*", "*.opt-?.pyc"),
    *("_tkinter.*", "_curses*", "readline.*", "nis.*", "_crypt.*", "_dbm.*", "_gdbm.*", "_test*"),
)
# Libraries that belong to the C library of each machine; the interpreter brings all others along.
OF_THE_SYSTEM = re.compile(r"(ld-linux|linux-vdso|lib(c|m|dl|rt|util|pthread|resolv)\.so|libpython)")
# FFmpeg's libraries in the wheels of PyAV and OpenCV, and what only OpenCV's needs.
FFMPEG = re.compile(r"(lib(?:avcodec|avformat|avutil|swresample|swscale))-\w+(\.so\.\d+)")
OF_FFMPEG = re.compile(r"lib(vpx|ssl|crypto)-")
# Python finds its library by its own location, but a shared libpython only by this variable.
START = """#!/bin/sh
here=$(dirname "$(readlink -f "$0")")
export LD_LIBRARY_PATH="$here/../lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
export PYTHONPATH="$here/../packages:$here/..${PYTHONPATH:+:$PYTHONPATH}"
exec "$here/%s" "$@"
"""


def pack(archive: Path = ARCHIVE, compression: int = 6, others: Sequence[str] = (), train: bool = False) -> Path:
    """Write the archive; takes some seconds.

    Args:
        archive: the file.
        compression: 0 to 9; the time to compress it harder weighs more than half a second per worker that unpacks it.
        others: packages installed here that it is to hold beside those of a run, such as `mlflow-skinny`.
        train: whether it is to hold torch and the programs, too.

    Raises:
        HostError: a package is missing here, or the packed environment does not start.
    """
    names = distributions([*others, *(TRAINING if train else ())])
    archive.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=archive.parent) as temporary:
        folder = Path(temporary, "environment")
        _copy_interpreter(folder)
        for name in names:
            _copy_package(name, folder / "packages")
        _copy_project(folder, train)
        _share_ffmpeg(folder / "packages" / "av.libs", folder / "packages" / "opencv_python_headless.libs")
        _strip(folder)
        command = [str(folder / "bin" / "python"), "-c", IMPORTS + (IMPORTS_OF_TRAINING if train else "")]
        tried = subprocess.run(command, env={}, cwd=folder, capture_output=True, text=True, check=False)
        if tried.returncode:
            raise HostError(f"the packed environment does not start:\n{tried.stderr}")
        unfinished = Path(temporary, archive.name)
        with tarfile.open(unfinished, "w:gz", compresslevel=compression) as tar:
            tar.add(folder, ".", filter=_of_root)
        unfinished.replace(archive)
    return archive


def packages() -> list[str]:
    """The packages of `requirements.txt` that a run imports, on the driver or in tasks."""
    return PACKAGES.findall((PROJECT / "requirements.txt").read_text(encoding="utf-8"))


def distributions(others: Sequence[str] = ()) -> list[str]:
    """All that the archive holds, by name: others may need what of a run's packages only a server needs."""
    return sorted(closure(packages()) - SERVING | closure([*others]))


def closure(names: list[str]) -> set[str]:
    """The packages and everything that they require here.

    Raises:
        HostError: one of them is not installed.
    """
    found: set[tuple[str, str]] = set()
    pending = [(name, "") for name in names]
    while pending:
        name, extra = pending.pop()
        name = canonicalize_name(name)
        if (name, extra) in found:
            continue
        try:
            needs = [Requirement(line) for line in importlib.metadata.requires(name) or []]
        except importlib.metadata.PackageNotFoundError:
            raise HostError(f"{name} is not installed here, so it cannot be packed: run `make setup`") from None
        found.add((name, extra))
        for need in needs:
            if need.marker is None or need.marker.evaluate({"extra": extra}):
                pending += [(need.name, chosen) for chosen in ("", *need.extras)]
    return {name for name, _ in found}


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
    modules = [str(path) for path in (folder / "lib" / version / "lib-dynload").glob("*.so")]
    for name, path in _needed([str(executable), *modules]):
        shutil.copy2(path, folder / "lib" / name)


def _needed(files: list[str]) -> list[tuple[str, str]]:
    """Names and places of the shared libraries that some files are linked with, those of the C library left out."""
    if not shutil.which("ldd"):  # macOS, whose archives stay on machines of its kind
        return []
    linked = subprocess.run(["ldd", *files], capture_output=True, text=True, check=False).stdout
    found = dict(re.findall(r"^\s+(\S+) => (/\S+)", linked, re.MULTILINE))
    return [(name, path) for name, path in sorted(found.items()) if not OF_THE_SYSTEM.match(name)]


def _copy_project(folder: Path, train: bool) -> None:
    """The modules of `helpers`, what they read in `conf`, and the page's charts without the package that has them."""
    conf = PROJECT / "conf"
    others = [*conf.glob("*.yaml"), *conf.glob("cards/*.yaml"), conf / "log4j2.properties", conf / "submit.py"]
    others += (PROJECT / "notebooks" / "programs").rglob("*.py") if train else []
    for source in [path for path in (PROJECT / "helpers").rglob("*") if path.suffix != ".pyc"] + others:
        if source.is_file():
            target = folder / source.relative_to(PROJECT)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target)
    (folder / PACKED.relative_to(PROJECT)).write_text(charts(), encoding="utf-8")


def _share_ffmpeg(pyav: Path, opencv: Path) -> None:
    """Give OpenCV the FFmpeg of PyAV where both have the same interfaces, for 13 MiB less; else both stay."""
    theirs = {match.groups(): path for path in pyav.glob("*") if (match := FFMPEG.match(path.name))}
    own = {match.groups(): path for path in opencv.glob("*") if (match := FFMPEG.match(path.name))}
    if not own.keys() <= theirs.keys():
        return
    for path in [*own.values(), *[path for path in opencv.glob("*") if OF_FFMPEG.match(path.name)]]:
        path.unlink()
    # A library is looked for beside the name by which the one that needs it was found.
    names = {path.name: path for path in pyav.glob("*")} | {path.name: theirs[key] for key, path in own.items()}
    for name, library in names.items():
        (opencv / name).unlink(missing_ok=True)
        (opencv / name).symlink_to(Path("..", pyav.name, library.name))


def _strip(folder: Path) -> None:
    """Leave out the symbols of libraries, which only a debugger reads; without binutils they stay.

    A wheel's `*.libs` stay as they are, because the tool that put them there lays them out in a way that strip breaks.
    """
    if sys.platform == "linux" and shutil.which("strip"):
        libraries = [str(path) for path in folder.rglob("*.so*") if path.parent.suffix != ".libs"]
        subprocess.run(["strip", "--strip-unneeded", *libraries], check=True)


def _of_root(member: tarfile.TarInfo) -> tarfile.TarInfo:
    """Whoever unpacks it owns it, and everybody may read it: the user of a container is not the one who packed."""
    member.uid = member.gid = 0
    member.uname = member.gname = "root"
    member.mode |= 0o444 | (0o111 if member.isdir() or member.mode & 0o100 else 0)
    return member


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


def main() -> None:
    """Pack what the command line names, and say how much it is."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("packages", nargs="*", metavar="PACKAGE", help="installed here, beside those of a run")
    parser.add_argument("--train", action="store_true", help="what trains, into train.tar.gz")
    options = parser.parse_args()
    archive = ARCHIVE.with_name("train.tar.gz") if options.train else ARCHIVE
    made = pack(archive, others=options.packages, train=options.train)
    print(f"{made.relative_to(PROJECT)}: {made.stat().st_size / 2**20:.0f} MiB")


if __name__ == "__main__":
    main()
