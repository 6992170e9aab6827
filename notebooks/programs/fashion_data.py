"""Fashion-MNIST: 60,000 training and 10,000 test images of 28x28 gray pixels in ten classes.

Fetched from Debian's package or the network, checked, and mapped into arrays; or images of your own in their place.
"""

import argparse
import gzip
import hashlib
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from helpers.errors import DataError, TrainingError
from helpers.models.bundle import InputSpec
from helpers.storage import open_storage
from helpers.training import Batch, DataSet, Folder, MappedImages, Shards, is_sharded, load_image

DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")  # of the package dataset-fashion-mnist
CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)

# SHA-256 of the unpacked files. Debian's archives differ from the original ones, whose MD5s torchvision knows, only
# in the name and time of the gzip header: with those restored, all four give torchvision's MD5.
CHECKSUMS = {
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
LABELS = "labels.parquet"  # of a folder of images: file string, label int
VALIDATION_SEED = 1  # which images are held out stays the same, whatever the seed of a training
GRAY = InputSpec(28, 28, "gray", (0.0,), (1.0,))


def download(root: str) -> Path:
    """Fetch the data set unless it is there whole; two processes may do so at once.

    Returns:
        The folder of the four unpacked files, laid out as torchvision does: `ROOT/FashionMNIST/raw`.

    Raises:
        DataError: neither Debian's package nor the network gave it whole; the message has both remedies.
    """
    raw = Path(root, "FashionMNIST", "raw")
    if not is_whole(root):
        raw.mkdir(parents=True, exist_ok=True)
        # Checked files are moved into place one by one, so no reader ever meets half a file.
        with tempfile.TemporaryDirectory(dir=raw.parent, prefix=".download-") as staging:
            source = _fetch(Path(staging))
            for name in CHECKSUMS:
                (source / name).replace(raw / name)
    return raw


def is_whole(root: str) -> bool:
    """Whether all files are there and are what they should be; fetches nothing."""
    return not _damaged_files(Path(root, "FashionMNIST", "raw"))


def load(root: str, train: bool) -> tuple[np.ndarray, np.ndarray]:
    """Open the training or the test set.

    Returns:
        Images, uint8 `[N, 28, 28]`, 0 black to 255 white, mapped from their file: what is indexed is read, and no
        more, and what is changed is changed in memory alone. Labels, int64 `[N]`, indices into `CLASSES`.

    Raises:
        DataError: `download` has not been called for this root.
    """
    raw, part = Path(root, "FashionMNIST", "raw"), "train" if train else "t10k"
    try:
        # An IDX file is a header of 8 bytes and 4 more for each further dimension, then the values.
        images = np.memmap(raw / f"{part}-images-idx3-ubyte", np.uint8, "c", offset=16).reshape(-1, 28, 28)
        labels = np.fromfile(raw / f"{part}-labels-idx1-ubyte", np.uint8, offset=8).astype(np.int64)
    except FileNotFoundError:
        raise DataError(f"no Fashion-MNIST below {root}: call fashion_data.download({root!r}) first") from None
    return images, labels


def open_images(place: str | None, root: str, count: int | None = None, config: Any = None) -> DataSet[Batch]:
    """Open a training set.

    Args:
        place: a folder with `labels.parquet` and `images`, or the target of `write_shards`; None for Fashion-MNIST.
        root: where `download` put that.
        count: take the first only.
        config: its `storage` says how object storage is reached.

    Raises:
        DataError: the data set is not there.
    """
    if place is None:
        return MappedImages(*load(root, train=True), count)
    if is_sharded(place, config):
        return Shards(place, Labeled(), count, config)
    return Folder(place, Labeled(), _read_labels(place, config).slice(0, count), LABELS, config)


def open_sets(options: argparse.Namespace, config: Any = None) -> tuple[DataSet[Batch], MappedImages]:
    """The images to train on, and those to evaluate on, which are test images or held-out training images.

    Args:
        options: of the program; `training_set`, `data`, `train_images`, `validation_images` and `test_images`.
        config: as for `open_images`.

    Raises:
        TrainingError: images of a stored training set are to be held out.
        DataError: there is no data set.
    """
    if not options.validation_images:
        training_set = open_images(options.training_set, options.data, options.train_images, config)
        return training_set, MappedImages(*load(options.data, train=False), options.test_images)
    if options.training_set:
        raise TrainingError(f"validation images come from Fashion-MNIST alone: take them out of {options.training_set}")
    images, labels = load(options.data, train=True)
    order = np.random.default_rng(VALIDATION_SEED).permutation(len(labels))
    held_out, rest = order[: options.validation_images], np.sort(order[options.validation_images :])
    rest = rest[: options.train_images]
    return MappedImages(images[rest], labels[rest]), MappedImages(images[held_out], labels[held_out])


class Labeled:
    """What training is given of a stored image: made 28x28 gray, and its class."""

    columns = frozenset(("label",))

    def make(self, content: memoryview, row: dict[str, Any]) -> tuple[np.ndarray, int]:
        """An image, uint8 `[28, 28]`, and its label."""
        return load_image(content, GRAY, row["file"])[0][..., 0], row["label"]

    def join(self, made: list[tuple[np.ndarray, int]]) -> Batch:
        """Images, uint8 `[B, 28, 28]`, and labels, int64 `[B]`."""
        return torch.from_numpy(np.stack([image for image, _ in made])), torch.tensor([label for _, label in made])


def _read_labels(place: str, config: Any) -> pa.Table:
    try:
        content = open_storage(place, config).read(LABELS)
    except OSError:
        raise DataError(
            f"{place} is no training set: it has neither {LABELS}, a table of file and label beside the folder "
            "images, nor the shards that write_shards makes"
        ) from None
    return pq.read_table(pa.BufferReader(content), columns=["file", "label"])


def _damaged_files(raw: Path) -> list[str]:
    return [name for name, checksum in CHECKSUMS.items() if _sha256(raw / name) != checksum]


def _sha256(path: Path) -> str | None:
    if not path.is_file():
        return None
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fetch(staging: Path) -> Path:
    problems = []
    for source in (_unpack_debian, _download_with_torchvision):
        try:
            raw = source(staging)
        except (OSError, EOFError, RuntimeError) as error:
            problems.append(str(error))
            continue
        if not (damaged := _damaged_files(raw)):
            return raw
        problems.append(f"damaged files: {', '.join(damaged)}")
    raise DataError(
        f"Fashion-MNIST is in neither source: {DEBIAN_FOLDER} ({problems[0]}), the network ({problems[1]}). "
        "Two remedies: call again where there is a network, or `apt-get install --reinstall dataset-fashion-mnist`."
    )


def _unpack_debian(staging: Path) -> Path:
    for name in CHECKSUMS:
        with gzip.open(DEBIAN_FOLDER / f"{name}.gz") as packed, (staging / name).open("wb") as unpacked:
            shutil.copyfileobj(packed, unpacked)
    return staging


def _download_with_torchvision(staging: Path) -> Path:
    from torchvision.datasets import FashionMNIST

    return Path(FashionMNIST(staging, download=True).raw_folder)


if __name__ == "__main__":  # the set-up's call: fetch into the default place
    from helpers.config import load_config

    try:
        print(download(load_config().paths.data))
    except DataError as error:
        raise SystemExit(str(error)) from None
