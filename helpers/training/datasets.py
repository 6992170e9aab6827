"""Images for training: each rank reads its own share of each batch, from where the data set lies.

There are three kinds of place: arrays, a folder of image files, and the shards of `shards`. Seed, epoch and rank alone
decide who reads what, so no rank asks another, and nothing is pickled into a task. A program's `Form` says what is made
of a stored image: it gets a label, or the masks of what is on it.
"""

import json
import signal
from collections.abc import Iterable, Iterator, Sized
from functools import lru_cache
from typing import Any, Protocol, TypeVar

import numpy as np
import pyarrow as pa
import torch
from torch.utils.data import DataLoader, DistributedSampler

from helpers.errors import DataError, TrainingError
from helpers.images import boundary, decoding
from helpers.images.headers import Size
from helpers.images.spec import InputSpec
from helpers.storage import open_storage
from helpers.storage.parquet import read_table
from helpers.storage.prefetch import map_groups
from helpers.training.group import Group
from helpers.training.shards import INDEX

LABELED = ("file", "label", "content")  # columns of shards whose index does not name them
SHUFFLED = 4  # shards whose images are mixed, and which a rank holds in memory
OPENCV_PIXELS = 2**30  # OpenCV decodes no larger image, unless its environment says so

Batch = tuple[torch.Tensor, torch.Tensor]  # images, uint8, and labels, int64 [B]
B_co = TypeVar("B_co", covariant=True)


class DataSet(Protocol[B_co]):
    """A data set whose parts can be read one by one."""

    def __len__(self) -> int:
        """Return the number of images per epoch."""

    def __getitems__(self, indices: torch.Tensor) -> B_co:
        """The images of indices `[B]`, and what is known of them."""

    def shares(self, group: Group, batch_size: int, seed: int, epoch: int, first: int = 0) -> Iterator[torch.Tensor]:
        """This rank's share, indices, of each batch of an epoch, from a step on; every rank's has one size.

        By default they are in random order of all images.
        """
        return share_batches(len(self), group, batch_size, seed, epoch, first)


class Form(Protocol):
    """What a stored image becomes for a training."""

    columns: frozenset[str]  # that it needs of an image's row

    def make(self, content: memoryview, row: dict[str, Any]) -> Any:
        """Of one image: its file's content, and its row, whose `file` names it in errors."""

    def join(self, items: list[Any]) -> Any:
        """Of a batch."""


def count_steps(images: Sized, batch_size: int, group: Group) -> int:
    """How many steps an epoch has; the last, incomplete batch is left out.

    Raises TrainingError if there is not one batch, or no share of it for each rank.
    """
    if batch_size % group.world_size:
        raise TrainingError(f"batch size {batch_size} does not divide over {group.world_size} ranks")
    if len(images) < batch_size:
        raise TrainingError(f"{len(images)} training images are fewer than one batch of {batch_size}")
    return len(images) // batch_size


def share_batches(
    images: int, group: Group, batch_size: int, seed: int, epoch: int, first: int = 0
) -> Iterator[torch.Tensor]:
    """This rank's share, int64 indices, of each batch of an epoch from step `first` on, in random order of all images.

    Together the shares of step k are the batch that a single process would take at step k.
    """
    everything: Any = range(images)  # which the sampler asks for its length alone
    sampler = DistributedSampler[int](everything, group.world_size, group.rank, seed=seed, drop_last=True)
    sampler.set_epoch(epoch)
    share = torch.tensor(list(sampler)).split(batch_size // group.world_size)
    yield from share[first : images // batch_size]


def read_batches(images: Any, shares: Iterable[torch.Tensor], group: Group, num_workers: int = 0) -> Iterator[Any]:
    """Read batches of a `DataSet`, of the indices that its `shares` gives.

    With `num_workers`, so many processes read ahead for this rank, which reads itself with 0.
    """
    # A generator of its own: else each epoch would draw from the one that the training's own randomness comes from.
    loader = DataLoader(
        images,
        batch_sampler=shares,  # type: ignore[arg-type] # tensors instead of lists of integers
        collate_fn=_unchanged,
        num_workers=num_workers,
        pin_memory=group.device.type == "cuda",
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


class MappedImages(DataSet[Batch]):
    """Images in an array, which may be a mapped file, and their labels, int64."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, count: int | None = None):
        self.images, self.labels = images[:count], labels[:count]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, indices: Any) -> Batch:
        return torch.from_numpy(np.array(self.images[indices])), torch.from_numpy(self.labels[indices])


class Folder(DataSet[Any]):
    """Image files below FOLDER/images, and a table with a row for each."""

    def __init__(self, place: str, form: Form, table: pa.Table, source: str, config: Any = None):
        """Read no image; the table has `file` string, relative to FOLDER/images, and what the form needs.

        Errors name `source`, which the table was read from. The config's `storage` says how object storage is reached.
        """
        self.storage, self.form, self.source = open_storage(f"{place}/images", config), form, source
        self.table = table.combine_chunks()  # Arrow's: millions of Python objects would take ten times the memory

    def __len__(self) -> int:
        return self.table.num_rows

    def __getitems__(self, indices: Any) -> Any:
        rows = self.table.take(pa.array(np.asarray(indices))).to_pylist()
        (items,) = map_groups(self._make, [rows], self.storage.concurrent_reads)
        return self.form.join(items)

    def _make(self, row: dict[str, Any]) -> Any:
        file = self.storage.join(row["file"])
        try:
            content = memoryview(self.storage.read(row["file"]))
        except OSError as error:
            raise DataError(f"{file}: {boundary.reason(error)}; mend it, or take it out of {self.source}") from None
        return self.form.make(content, {**row, "file": file})


class Shards:
    """What `write_shards` has written: each rank reads the shards that its share of an epoch lies in, one by one.

    The order is random over shards and over the images of a few at a time. With another number of ranks an epoch has
    other batches.
    """

    def __init__(self, place: str, form: Form, count: int | None = None, config: Any = None):
        """Read the index, and take the first images only where a count is given.

        Raises DataError if the shards are of another kind.
        """
        self.storage, self.form = open_storage(place, config), form
        index = json.loads(self.storage.read(INDEX))
        missing = form.columns - set(index.get("columns", LABELED))
        if missing:
            lacking = ", ".join(sorted(missing))
            raise DataError(f"{place} has shards of another kind, without {lacking}: write them from rows that have it")
        self.labels = tuple(index.get("labels", ()))
        self.files = [shard["file"] for shard in index["shards"]]
        starts = np.concatenate([[0], np.cumsum([shard["rows"] for shard in index["shards"]])])
        self.starts = starts if count is None else np.minimum(starts, count)
        self._table = lru_cache(SHUFFLED + 1)(lambda file: read_table(self.storage, file).combine_chunks())

    def __len__(self) -> int:
        return int(self.starts[-1])

    def shares(self, group: Group, batch_size: int, seed: int, epoch: int, first: int = 0) -> Iterator[torch.Tensor]:
        """Of a stretch of the shards in random order, as long for every rank to within one image."""
        order = np.random.default_rng([seed, epoch]).permutation(len(self.files))
        lengths, each = np.diff(self.starts)[order], len(self) // group.world_size
        first_of = np.cumsum(lengths) - lengths - group.rank * each  # counted from where this rank's stretch begins
        begins, ends = np.clip(first_of, 0, each), np.clip(first_of + lengths, 0, each)
        stretches = zip(begins, ends, self.starts[order] - first_of, strict=True)
        parts = [np.arange(begin, end) + offset for begin, end, offset in stretches if begin < end]
        rng = np.random.default_rng([seed, epoch, group.rank])
        mixed = [rng.permutation(np.concatenate(parts[i : i + SHUFFLED])) for i in range(0, len(parts), SHUFFLED)]
        share = torch.from_numpy(np.concatenate(mixed)).split(batch_size // group.world_size)
        yield from share[first : len(self) // batch_size]

    def __getitems__(self, indices: Any) -> Any:
        numbers = np.asarray(indices)
        shards = np.searchsorted(self.starts, numbers, side="right") - 1
        return self.form.join([*map(self._make, shards.tolist(), (numbers - self.starts[shards]).tolist())])

    def _make(self, shard: int, number: int) -> Any:
        table = self._table(self.files[shard])
        row = {name: table[name][number].as_py() for name in table.column_names if name != "content"}
        return self.form.make(memoryview(table["content"][number].as_buffer()), row)


def is_sharded(place: str, config: Any = None) -> bool:
    """Whether `write_shards` has written there."""
    return open_storage(place, config).exists(INDEX)


def load_image(content: memoryview, spec: InputSpec, file: str) -> tuple[np.ndarray, Size]:
    """Decode and resize a stored image as the pipeline does; raises DataError, which names it, if it cannot be read."""
    try:
        return decoding.load(content, spec, OPENCV_PIXELS)
    except boundary.UnreadableImageError as error:
        raise DataError(f"{file}: {error}; remove it from the training set") from None


def _unchanged(batch: Any) -> Any:
    return batch
