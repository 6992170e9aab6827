"""Images for training: each process reads its own share of each batch, from where the data set lies.

There are three kinds of place: Fashion-MNIST's own files, a folder of image files, and the shards of `shards`. Seed,
epoch and rank alone decide who reads what, so no process asks another, and nothing is pickled into a task. What is made
of a stored image is a `Form`'s to say: here it gets its label, in `yolact.datasets` the masks of what is on it.
"""

import json
import signal
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import Any, Protocol, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch.utils.data import DataLoader

from helpers.data import fashion_mnist
from helpers.errors import DataError
from helpers.images import boundary, decoding
from helpers.images.headers import Size
from helpers.models.bundle import InputSpec
from helpers.models.fashion_cnn import MEAN, STD
from helpers.storage import open_storage
from helpers.storage.prefetch import map_groups
from helpers.training.shards import INDEX
from helpers.training.workers import RunSettings, Worker, batches_of

LABELS = "labels.parquet"  # of an image folder: file string, label int
LABELLED = ("file", "label", "content")  # columns of shards whose index does not name them
SHUFFLED = 4  # shards whose images are mixed, and which a process holds in memory
MAX_PIXELS = 178_956_970  # a larger image is a decompression bomb; ingest.max_pixels has the same
GREY = InputSpec(28, 28, "gray", (MEAN,), (STD,))

Batch = tuple[torch.Tensor, torch.Tensor]  # images, uint8 [B, 28, 28], and labels, int64 [B]
B_co = TypeVar("B_co", covariant=True)


class DataSet(Protocol[B_co]):
    """A data set, any part of which can be read without the rest."""

    def __len__(self) -> int:
        """How many images an epoch has."""

    def __getitems__(self, indices: torch.Tensor) -> B_co:
        """The images of indices `[B]`, and what is known of them."""

    def batches(self, settings: RunSettings, worker: Worker, epoch: int, first: int) -> Iterator[torch.Tensor]:
        """This worker's share, indices, of each batch of an epoch, from a step on; every worker's has one size."""


LabelledImages = DataSet[Batch]


class Form(Protocol):
    """What training is given of stored images."""

    columns: frozenset[str]  # that it needs of an image's row

    def make(self, content: memoryview, row: dict[str, Any]) -> Any:
        """Of one image: its file's content, and its row, whose `file` names it in errors."""

    def join(self, made: list[Any]) -> Any:
        """Of a batch."""


def open_images(settings: RunSettings, place: str | None, root: str, count: int | None = None) -> LabelledImages:
    """Open a training set.

    Args:
        settings: how object storage is reached.
        place: a folder with `labels.parquet` and `images`, or the target of `write_shards`; None for Fashion-MNIST.
        root: where `fashion_mnist.download` put that.
        count: take the first only.

    Raises:
        DataError: the data set is not there.
    """
    if place is None:
        return MappedImages(*fashion_mnist.map_files(root, train=True), count)
    if open_storage(place, settings).exists(INDEX):
        return Shards(place, settings, _Labelled(), count)
    return Folder(place, settings, _Labelled(), _read_labels(place, settings).slice(0, count), LABELS)


def read_batches(images: Any, batches: Iterable[torch.Tensor], settings: RunSettings, worker: Worker) -> Iterator[Any]:
    """Read batches, ahead of their use where `settings.loaders` are to do so.

    Args:
        images: has `__getitems__`, as a `DataSet` does.
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


class Folder:
    """Image files below FOLDER/images, and a table with a row for each."""

    def __init__(self, place: str, settings: RunSettings, form: Form, table: pa.Table, source: str):
        """Read no image.

        Args:
            place: the folder.
            settings: how object storage is reached.
            form: what to make of an image.
            table: `file` string, relative to FOLDER/images, and what the form needs.
            source: what the table was read from, for errors.
        """
        self.storage, self.form, self.source = open_storage(f"{place}/images", settings), form, source
        self.table = table.combine_chunks()  # Arrow's: millions of Python objects would take ten times the memory

    def __len__(self) -> int:
        return self.table.num_rows

    def batches(self, settings: RunSettings, worker: Worker, epoch: int, first: int) -> Iterator[torch.Tensor]:
        """Of a random order of all."""
        return batches_of(settings, worker, len(self), epoch, first)

    def __getitems__(self, indices: Any) -> Any:
        rows = self.table.take(pa.array(np.asarray(indices))).to_pylist()
        (made,) = map_groups(self._make, [rows], self.storage.concurrent_reads)
        return self.form.join(made)

    def _make(self, row: dict[str, Any]) -> Any:
        file = self.storage.join(row["file"])
        try:
            content = memoryview(self.storage.read(row["file"]))
        except OSError as error:
            raise DataError(f"{file}: {boundary.reason(error)}; mend it, or take it out of {self.source}") from None
        return self.form.make(content, {**row, "file": file})


class Shards:
    """What `write_shards` has written: each process reads the shards that its share of an epoch lies in, one by one.

    The order is random over shards and over the images of a few at a time. With another number of processes an epoch
    has other batches.
    """

    def __init__(self, place: str, settings: RunSettings, form: Form, count: int | None = None):
        """Read the index, and take the first images only where a count is given.

        Raises:
            DataError: the shards are of another kind.
        """
        self.storage, self.form = open_storage(place, settings), form
        index = json.loads(self.storage.read(INDEX))
        missing = form.columns - set(index.get("columns", LABELLED))
        if missing:
            raise DataError(
                f"{place} has shards of another kind, without {', '.join(sorted(missing))}: write them from rows "
                "that have it"
            )
        self.labels = tuple(index.get("labels", ()))
        self.files = [shard["file"] for shard in index["shards"]]
        starts = np.concatenate([[0], np.cumsum([shard["rows"] for shard in index["shards"]])])
        self.starts = starts if count is None else np.minimum(starts, count)
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

    def __getitems__(self, indices: Any) -> Any:
        numbers = np.asarray(indices)
        shards = np.searchsorted(self.starts, numbers, side="right") - 1
        return self.form.join([*map(self._make, shards.tolist(), (numbers - self.starts[shards]).tolist())])

    def _make(self, shard: int, number: int) -> Any:
        table = self._table(shard)
        row = {name: table[name][number].as_py() for name in table.column_names if name != "content"}
        return self.form.make(memoryview(table["content"][number].as_buffer()), row)

    def _read(self, shard: int) -> pa.Table:
        content = pa.BufferReader(self.storage.read(self.files[shard]))
        return pq.read_table(content).combine_chunks()


class _Labelled:
    """An image of any size, made 28x28 grey, and its class."""

    columns = frozenset(("label",))

    def make(self, content: memoryview, row: dict[str, Any]) -> tuple[np.ndarray, int]:
        return load(content, GREY, row["file"])[0][..., 0], row["label"]

    def join(self, made: list[tuple[np.ndarray, int]]) -> Batch:
        return torch.from_numpy(np.stack([image for image, _ in made])), torch.tensor([label for _, label in made])


def load(content: memoryview, spec: InputSpec, file: str) -> tuple[np.ndarray, Size]:
    """Decode and resize as `decoding.load` does.

    Raises:
        DataError: the image cannot be read; names it.
    """
    try:
        return decoding.load(content, spec, MAX_PIXELS)
    except boundary.UnreadableImageError as error:
        raise DataError(f"{file}: {error}; remove it from the training set") from None


def _read_labels(place: str, settings: RunSettings) -> pa.Table:
    try:
        content = open_storage(place, settings).read(LABELS)
    except OSError:
        raise DataError(
            f"{place} is no training set: it has neither {LABELS}, a table of file and label beside the folder "
            f"images, nor {INDEX}, which write_shards makes"
        ) from None
    return pq.read_table(pa.BufferReader(content), columns=["file", "label"])


def _unchanged(batch: Any) -> Any:
    return batch
