"""The images that `fashion_mnist.py` trains and evaluates on: Fashion-MNIST, or your own in its place."""

import argparse
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

import fashion_data
from helpers.errors import DataError, TrainingError
from helpers.images.spec import InputSpec
from helpers.storage import open_storage
from helpers.training import Batch, DataSet, Folder, MappedImages, Shards, is_sharded, load_image

LABELS = "labels.parquet"  # of a folder of images: file string, label int
VALIDATION_SEED = 1  # the held-out images are the same for every seed of a training
GRAY = InputSpec(28, 28, "gray", (0.0,), (1.0,))


def open_sets(options: argparse.Namespace, config: Any = None) -> tuple[DataSet[Batch], MappedImages]:
    """The images to train on and those to evaluate on: test images or held-out training images.

    Args:
        options: of the program; `training_set`, `data`, `train_images`, `validation_images` and `test_images`.
        config: as for `open_images`.

    Raises:
        TrainingError: images of a stored training set are to be held out.
        DataError: there is no data set.
    """
    if not options.validation_images:
        training_set = open_images(options.training_set, options.data, options.train_images, config)
        return training_set, MappedImages(*fashion_data.load(options.data, train=False), options.test_images)
    if options.training_set:
        raise TrainingError(f"validation images come from Fashion-MNIST alone: take them out of {options.training_set}")
    images, labels = fashion_data.load(options.data, train=True)
    order = np.random.default_rng(VALIDATION_SEED).permutation(len(labels))
    held_out, rest = order[: options.validation_images], np.sort(order[options.validation_images :])
    rest = rest[: options.train_images]
    return MappedImages(images[rest], labels[rest]), MappedImages(images[held_out], labels[held_out])


def open_images(place: str | None, root: str, count: int | None = None, config: Any = None) -> DataSet[Batch]:
    """Open a training set.

    Args:
        place: a folder with `labels.parquet` and `images`, or the target of `write_shards`; None for Fashion-MNIST.
        root: where `fashion_data.download` put Fashion-MNIST.
        count: take the first only.
        config: its `storage` says how object storage is reached.

    Raises:
        DataError: the data set is not there.
    """
    if place is None:
        return MappedImages(*fashion_data.load(root, train=True), count)
    if is_sharded(place, config):
        return Shards(place, Labeled(), count, config)
    return Folder(place, Labeled(), _read_labels(place, config).slice(0, count), LABELS, config)


class Labeled:
    """A stored image as training takes it: 28x28 gray pixels and its class."""

    columns = frozenset(("label",))

    def make(self, content: memoryview, row: dict[str, Any]) -> tuple[np.ndarray, int]:
        """An image, uint8 `[28, 28]`, and its label."""
        return load_image(content, GRAY, row["file"])[0][..., 0], row["label"]

    def join(self, items: list[tuple[np.ndarray, int]]) -> Batch:
        """Images, uint8 `[B, 28, 28]`, and labels, int64 `[B]`."""
        return torch.from_numpy(np.stack([image for image, _ in items])), torch.tensor([label for _, label in items])


def _read_labels(place: str, config: Any) -> pa.Table:
    try:
        content = open_storage(place, config).read(LABELS)
    except OSError:
        raise DataError(
            f"{place} is no training set: it has neither {LABELS}, a table of file and label beside the folder "
            "images, nor the shards that write_shards makes"
        ) from None
    return pq.read_table(pa.BufferReader(content), columns=["file", "label"])
