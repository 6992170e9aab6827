"""Labelled images for training: each process reads its own share of each batch, from where the data set lies.

There are three kinds of place: Fashion-MNIST's own files, a folder of image files, and the shards of `shards`. Seed,
epoch and rank alone decide who reads what, so no process asks another, and nothing is pickled into a task.
"""

import json
import signal
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch.utils.data import DataLoader

from helpers.data import fashion_mnist
from helpers.errors import DataError
from helpers.images import decoding
from helpers.models.bundle import InputSpec
from helpers.models.fashion_cnn import MEAN, STD
from helpers.storage import open_storage
from helpers.storage.prefetch import map_groups
from helpers.training.shards import INDEX
from helpers.training.workers import RunSettings, Worker, batches_of

LABELS = "labels.parquet"  # of an image folder: file string, label int
SHUFFLED = 4  # shards whose images are mixed, and which a process holds in memory
MAX_PIXELS = 178_956_970  # a larger image is a decompression bomb; ingest.max_pixels has the same
GREY = InputSpec(28, 28, "gray", (MEAN,), (STD,))

Batch = tuple[torch.Tensor, torch.Tensor]


class LabelledImages(Protocol):
    """A data set, any part of which can be read without the rest."""

    def __len__(self) -> int:
        """How many images there are."""

    def __getitems__(self, indices: torch.Tensor) -> Batch:
        """Images, uint8 `[B, 28, 28]`, and labels, int64 `[B]`, of indices `[B]`."""

    def batches(self, settings: RunSettings, worker: Worker, epoch: int, first: int) -> Iterator[torch.Tensor]:
        """This worker's share, indices, of each batch of an epoch, from a step on; every worker's has one size."""


def open_images(settings: RunSettings, place: str | None, root: str, count: int | None = None) -> LabelledImages:
    """Open a training set.

    Args:
        settings: how object storage is reached.
        place: a folder with `labels.parquet` and `images`, or the target of `write_shards`; None for Fashion-MNIST.
        root: where `fashion_mnist.download` put that.
        count: take the first only; shards are taken whole.

    Raises:
        DataError: the data set is not there.
    """
    if place is None:
        return MappedImages(*fashion_mnist.map_files(root, train=True), count)
    return Shards(place, settings) if open_storage(place, settings).exists(INDEX) else Folder(place, settings, count)


def read_batches(images: Any, batches: Iterable[torch.Tensor], settings: RunSettings, worker: Worker) -> Iterator[Any]:
    """Read batches, ahead of their use where `settings.loaders` are to do so.

    Args:
        images: has `__getitems__`, as `LabelledImages` does.
        batches: indices, as its `batches` gives them.
        settings: how many loaders.
        worker: with a GPU, batches are put where it fetches them fastest.
    """
    pinned = worker.device.type == "cuda"
    # A generator of its own: else each epoch would draw from the one that the training's own randomness comes from.
    loader = DataLoader(
        images,
        batch_sampler=batches,  # type: ignore[arg-type] # tensors instead of lists of integers
        collate_fn=_unchanged,
        num_workers=settings.loaders,
        pin_memory=pinned,
        generator=torch.Generator(),
    )
    handler = signal.getsignal(signal.SIGCHLD)
    iterator = iter(loader)
    if signal.getsignal(signal.SIGCHLD) is not handler:
        # Torch's handler stays for good. With AMX registers in use a signal's frame does not fit onto faulthandler's
        # stack, where it would run, and the kernel ends this process as soon as any child ends. Without it a lost
        # loader is noticed some seconds later.
        signal.signal(signal.SIGCHLD, handler)
    return iterator


class MappedImages:
    """Images in an array, which may be a mapped file."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, count: int | None = None):
        self.images, self.labels = images[:count], labels[:count]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, indices: Any) -> Batch:
        return torch.from_numpy(np.array(self.images[indices])), torch.from_numpy(self.labels[indices])

    def batches(self, settings: RunSettings, worker: Worker, epoch: int, first: int) -> Iterator[torch.Tensor]:
        """Of a random order of all."""
        return batches_of(settings, worker, len(self), epoch, first)


class Folder(MappedImages):
    """Image files of any size below FOLDER/images, their classes in FOLDER/labels.parquet; decoded to 28x28 grey."""

    def __init__(self, place: str, settings: RunSettings, count: int | None = None):
        """Read the table of labels, and no image.

        Raises:
            DataError: there is none.
        """
        self.storage = open_storage(f"{place}/images", settings)
        try:
            content = open_storage(place, settings).read(LABELS)
        except OSError:
            raise DataError(
                f"{place} is no training set: it has neither {LABELS}, a table of file and label beside the folder "
                f"images, nor {INDEX}, which write_shards makes"
            ) from None
        table = pq.read_table(pa.BufferReader(content), columns=["file", "label"]).slice(0, count)
        self.files = table["file"].combine_chunks()  # millions of Python strings would take ten times the memory
        self.labels = table["label"].to_numpy().astype(np.int64)

    def __getitems__(self, indices: Any) -> Batch:
        files = self.files.take(pa.array(np.asarray(indices))).to_pylist()
        (images,) = map_groups(self._read, [files], self.storage.concurrent_reads)
        return torch.from_numpy(np.stack(images)), torch.from_numpy(self.labels[np.asarray(indices)])

    def _read(self, file: str) -> np.ndarray:
        try:
            return _decode(self.storage.read(file), self.storage.join(file))
        except OSError as error:
            raise DataError(f"{self.storage.join(file)}: {decoding.reason(error)}; its row is in {LABELS}") from None


class Shards:
    """What `write_shards` has written: each process reads the shards that its share of an epoch lies in, one by one.

    The order is random over shards and over the images of a few at a time. With another number of processes an epoch
    has other batches.
    """

    def __init__(self, place: str, settings: RunSettings):
        """Read the index."""
        self.storage = open_storage(place, settings)
        shards = json.loads(self.storage.read(INDEX))["shards"]
        self.files = [shard["file"] for shard in shards]
        self.starts = np.concatenate([[0], np.cumsum([shard["rows"] for shard in shards])])
        self._table = lru_cache(SHUFFLED + 1)(self._read)

    def __len__(self) -> int:
        return int(self.starts[-1])

    def batches(self, settings: RunSettings, worker: Worker, epoch: int, first: int) -> Iterator[torch.Tensor]:
        """Of a stretch of the shards in random order, as long for every worker to within one image."""
        order = np.random.default_rng([settings.seed, epoch]).permutation(len(self.files))
        lengths, each = np.diff(self.starts)[order], len(self) // worker.processes
        first_of = np.cumsum(lengths) - lengths - worker.rank * each  # counted from where this worker's stretch begins
        begins, ends = np.clip(first_of, 0, each), np.clip(first_of + lengths, 0, each)
        stretches = zip(begins, ends, self.starts[order] - first_of, strict=True)
        parts = [np.arange(begin, end) + offset for begin, end, offset in stretches if begin < end]
        rng = np.random.default_rng([settings.seed, epoch, worker.rank])
        mixed = [rng.permutation(np.concatenate(parts[i : i + SHUFFLED])) for i in range(0, len(parts), SHUFFLED)]
        share = torch.from_numpy(np.concatenate(mixed)).split(settings.batch_size // worker.processes)
        yield from share[first : len(self) // settings.batch_size]

    def __getitems__(self, indices: Any) -> Batch:
        numbers = np.asarray(indices)
        shards = np.searchsorted(self.starts, numbers, side="right") - 1
        images, labels = [], []
        for shard, row in zip(shards.tolist(), (numbers - self.starts[shards]).tolist(), strict=True):
            table = self._table(shard)
            images.append(_decode(table["content"][row].as_buffer(), table["file"][row].as_py()))
            labels.append(table["label"][row].as_py())
        return torch.from_numpy(np.stack(images)), torch.tensor(labels)

    def _read(self, shard: int) -> pa.Table:
        content = pa.BufferReader(self.storage.read(self.files[shard]))
        return pq.read_table(content).combine_chunks()


def _decode(content: Any, file: str) -> np.ndarray:
    try:
        return decoding.load(memoryview(content), GREY, MAX_PIXELS)[0][..., 0]
    except decoding.UnreadableImageError as error:
        raise DataError(f"{file}: {error}; remove it from the training set") from None


def _unchanged(batch: Any) -> Any:
    return batch
