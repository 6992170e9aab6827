import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest

import fashion_data
from helpers.errors import DataError
from studies.samples import write_images


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """A host with neither Debian's package nor a network."""
    monkeypatch.setattr(fashion_data, "DEBIAN_FOLDER", tmp_path / "no-package")
    monkeypatch.setattr("torchvision.datasets.FashionMNIST.mirrors", ["http://localhost:9/"])


def test_sets_have_their_sizes_types_and_balanced_classes(fashion_mnist_root):
    for train, count in ((True, 60_000), (False, 10_000)):
        images, labels = fashion_data.load(fashion_mnist_root, train)
        assert images.shape == (count, 28, 28) and images.dtype == np.uint8
        assert labels.shape == (count,) and labels.dtype == np.int64
        assert np.bincount(labels).tolist() == [count // 10] * len(fashion_data.CLASSES)


def test_class_names_are_those_of_torchvision():
    from torchvision.datasets import FashionMNIST

    assert list(fashion_data.CLASSES) == FashionMNIST.classes


def test_a_damaged_file_is_fetched_again(fashion_mnist_root, tmp_path):
    raw = tmp_path / "FashionMNIST" / "raw"
    shutil.copytree(Path(fashion_mnist_root, "FashionMNIST", "raw"), raw)
    labels = raw / "t10k-labels-idx1-ubyte"
    content = labels.read_bytes()
    labels.write_bytes(content[:-1] + b"\x00")  # a wrong label: same length, still readable
    fashion_data.download(str(tmp_path))
    assert labels.read_bytes() == content


def test_whole_files_are_kept_without_any_source(fashion_mnist_root, offline):
    assert fashion_data.download(fashion_mnist_root).is_dir()


def test_without_a_source_the_error_has_both_remedies(offline, tmp_path):
    with pytest.raises(DataError) as error:
        fashion_data.download(str(tmp_path))
    assert "network" in str(error.value)
    assert "apt-get install --reinstall dataset-fashion-mnist" in str(error.value)
    assert not list(tmp_path.rglob("*ubyte"))


def test_a_damaged_package_is_refused(offline, monkeypatch, tmp_path, fashion_mnist_root):
    package = tmp_path / "package"
    package.mkdir()
    for name in fashion_data.CHECKSUMS:
        (package / f"{name}.gz").write_bytes(b"\x1f\x8b not an archive")
    monkeypatch.setattr(fashion_data, "DEBIAN_FOLDER", package)
    with pytest.raises(DataError, match="neither source"):
        fashion_data.download(str(tmp_path / "data"))


def test_two_downloads_at_once_both_succeed(fashion_mnist_root, monkeypatch, tmp_path):
    with ThreadPoolExecutor(2) as pool:
        folders = list(pool.map(fashion_data.download, [str(tmp_path)] * 2))
    assert folders[0] == folders[1]
    assert sorted(file.name for file in folders[0].iterdir()) == sorted(fashion_data.CHECKSUMS)
    assert [file.name for file in folders[0].parent.iterdir()] == ["raw"]


def test_loading_before_downloading_says_what_to_call(tmp_path):
    with pytest.raises(DataError, match="download"):
        fashion_data.load(str(tmp_path), train=False)


def test_png_files_and_labels_table_equal_the_arrays(fashion_mnist_root, tmp_path):
    folder = write_images(fashion_mnist_root, str(tmp_path), count=1005)
    images, labels = fashion_data.load(fashion_mnist_root, train=False)
    table = pq.read_table(tmp_path / "labels.parquet")
    files = table["file"].to_pylist()
    assert files[0] == "00/00000.png" and files[-1] == "01/01004.png"
    assert sorted(str(path.relative_to(folder)) for path in folder.rglob("*.*")) == files
    assert str(table["label"].type) == "int32"
    np.testing.assert_array_equal(table["label"].to_numpy(), labels[:1005])
    decoded = [cv2.imread(str(folder / file), cv2.IMREAD_UNCHANGED) for file in files]
    np.testing.assert_array_equal(decoded, images[:1005])


def test_images_are_written_once_and_mended_when_incomplete(fashion_mnist_root, tmp_path):
    folder = write_images(fashion_mnist_root, str(tmp_path), count=20)
    first = folder / "00" / "00000.png"
    written = first.stat().st_mtime_ns
    write_images(fashion_mnist_root, str(tmp_path), count=20)
    assert first.stat().st_mtime_ns == written
    first.unlink()
    write_images(fashion_mnist_root, str(tmp_path), count=20)
    assert first.exists()
    write_images(fashion_mnist_root, str(tmp_path), count=10)
    assert len(list(folder.rglob("*.png"))) == 10
