"""Stage 1 on the driver: list images, videos and archives and plan the tasks. Paths travel, bytes stay put.

A listing comes in slices, so that the driver's memory does not depend on how many files there are.
"""

import hashlib
import logging
import math
import zlib
from collections import Counter
from collections.abc import Collection, Container, Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from helpers.config import Config
from helpers.errors import RunError
from helpers.images.archive import MARK
from helpers.images.boundary import too_long
from helpers.images.video import split_paths
from helpers.partitioning import PartitionPlan, plan_partitions
from helpers.pipeline.schemas import ASSIGNED_SCHEMA, LISTED_SCHEMA, conform
from helpers.storage import Storage
from helpers.storage.interface import Entry, Files

log = logging.getLogger(__name__)

CHUNK_FILES, MAX_CHUNK_FILES = 2**14, 2**16  # of a chunk: the mean, and the most
CONTAINER_IMAGES = 1000  # for how many images a video or an archive stands, whose own number is not known yet
UNLISTED = "folders that cannot be listed"
LIKE_MEMBERS = f"with {MARK} in the path, which is for members of archives"
WAVES = 64  # tasks per slot, beyond which more of them do no good
WARNINGS = 10  # of such folders, at most


class Chunk(NamedTuple):
    """Files that follow one another in a listing; the digest is of their paths, lengths, times and errors.

    Where one chunk ends and the next begins depends on the paths there alone: a new file changes one chunk, and not all
    that come after it.
    """

    digest: str
    paths: pa.Array


@dataclass(frozen=True)
class Listing:
    """Images, videos and archives below a location (`LISTED_SCHEMA`), and how many files were left out, by reason.

    `error` is set where the listing has found out that a file cannot be used. A slice has the chunks that its files
    were in, and the digests of those that are left out because the caller knows them; it counts what was left out up to
    its end, earlier slices included.
    """

    images: pa.Table
    left_out: dict[str, int]
    videos: pa.Table = field(default_factory=LISTED_SCHEMA.empty_table)
    archives: pa.Table = field(default_factory=LISTED_SCHEMA.empty_table)
    chunks: tuple[Chunk, ...] = ()
    known: tuple[str, ...] = ()
    is_last: bool = True

    def __str__(self) -> str:
        left = ", ".join(f"{count} {reason}" for reason, count in sorted(self.left_out.items()))
        others = {"videos": self.videos.num_rows, "archives": self.archives.num_rows}
        counts = [f"{self.images.num_rows} images", *(f"{count} {kind}" for kind, count in others.items() if count)]
        return ", ".join(counts) + (f"; left out: {left}" if left else "")


def list_images(storage: Storage, config: Config) -> Listing:
    """All of `list_slices` in this process's memory; raises what that does."""
    slices = list(list_slices(storage, config))
    images, videos, archives = (
        pa.concat_tables([getattr(part, kind) for part in slices]) for kind in ("images", "videos", "archives")
    )
    return Listing(images, slices[-1].left_out, videos, archives)


def list_slices(
    storage: Storage,
    config: Config,
    skip: Collection[str] = (),
    known: Container[str] = frozenset(),
    arrived: Iterable[Entry] | None = None,
) -> Iterator[Listing]:
    """List the files with the suffix of an image, a video or an archive, nested folders included, a slice at a time.

    Hidden files and other suffixes are left out and counted. A folder with an image's suffix is listed too: it becomes
    an error row instead of passing unseen. A folder that cannot be listed is told and counted, as `UNLISTED`. A file
    whose path could be that of an archive's member is left out and counted, because a path stands for one image.

    A slice has `partitioning.slice_images` images, for `CONTAINER_IMAGES` of which a video or an archive counts. `skip`
    are folders to leave out, such as a run's own below its source, and `known` digests of chunks. Files that `arrived`
    (`arrivals`) take the place of all that the storage lists; then there may be none, unless the run starts over.

    Yields:
        Slices in the storage's order, of whole chunks. Only the last one may be empty.

    Raises:
        RunError: there is no image, no video and no archive.
        StorageError: the location cannot be listed.
    """
    most = config.partitioning.slice_images
    left_out: Counter[str] = Counter()
    waiting: list[tuple[str, pa.Table]] = []
    digests: list[str] = []
    size = total = 0
    entries = arrived
    if entries is None:
        entries = storage.list(directories=True, skip=skip, tolerant=True, outside_links=config.ingest.outside_links)
    for digest, files in _chunks(entries, storage.root, config, left_out):
        total += files.num_rows
        if digest in known:
            digests.append(digest)
            continue
        images = files.num_rows + (CONTAINER_IMAGES - 1) * pc.sum(pc.not_equal(files["kind"], "image")).as_py()
        if waiting and size + images > most:
            yield _slice(waiting, left_out, digests, is_last=False)
            waiting, digests, size = [], [], 0
        waiting.append((digest, files))
        size += images
    last = _slice(waiting, left_out, digests, is_last=True)
    if not total and (arrived is None or not config.resume):
        suffixes = (", ".join(names) for names in _suffixes(config).values())
        raise RunError(
            "{} below {}; images are files that end in {}, videos in {}, archives in {}".format(
                last, storage.root, *(names or "nothing" for names in suffixes)
            )
        )
    yield last


def check_any(images: int, listed: str, storage: Files, config: Config) -> None:
    """Raise RunError where archives are all that is listed, and there is no image in them."""
    if not images:
        raise RunError(
            f"{listed} below {storage.root}, and none of the archives has an image: those are members that end in "
            f"{', '.join(config.ingest.suffixes)}"
        )


def plan(
    images: pa.Table, slots: int, config: Config, image_seconds: float | None = None, expected: int = 0
) -> PartitionPlan:
    """Plan the partitions of a listing, as the `partitioning` section says.

    Where a slot would have more than `WAVES` of them, they take more time and bytes than their targets, and no more
    images: further ones would hardly end closer to each other, and each leaves a file that the driver has to know.

    `images` are those listed, or with frames and members (`frames.ROWS_SCHEMA`), which take so many seconds each, by
    default what one without a model does. `expected` are the slots that there may be later.
    """
    settings, most = config.partitioning, WAVES * slots
    in_time = round(settings.target_seconds / (image_seconds or settings.image_seconds))
    column = images["bytes" if "bytes" in images.schema.names else "length"]
    sizes = pc.if_else(images["error"].is_null(), column, 0).to_numpy()  # what is not read takes no time
    return plan_partitions(
        sizes,
        slots,
        target_bytes=max(settings.target_bytes, math.ceil(sizes.sum() / most)),
        target_images=max(1, min(settings.target_images, max(in_time, math.ceil(len(sizes) / most)))),
        partitions=settings.partitions,
        in_order=split_paths(images["path"])[1].is_valid().to_numpy(),
        at_least=expected,
    )


def assign(images: pa.Table, plan: PartitionPlan) -> pa.Table:
    """The images with their partitions (`ASSIGNED_SCHEMA`), each partition's images in the listing's order."""
    order = np.argsort(plan.assignment, kind="stable")
    return conform(
        images.append_column("partition", pa.array(plan.assignment, pa.int32())).take(order), ASSIGNED_SCHEMA
    )


def _suffixes(config: Config) -> dict[str, tuple[str, ...]]:
    settings = {"image": config.ingest.suffixes, "video": config.video.suffixes, "archive": config.ingest.archives}
    return {kind: tuple(suffix.lower() for suffix in suffixes) for kind, suffixes in settings.items()}


def _chunks(
    entries: Iterable[Entry], root: str, config: Config, left_out: Counter[str]
) -> Iterator[tuple[str, pa.Table]]:
    """The files to work on, a chunk at a time with its digest: `LISTED_SCHEMA` and their `kind`; counts all others."""
    within, kinds = len(root) - 1, _suffixes(config)
    suffixes, images, videos = sum(kinds.values(), ()), kinds["image"], kinds["video"]
    most, max_bytes = min(MAX_CHUNK_FILES, config.partitioning.slice_images), config.max_image_bytes
    rows = list[tuple]()
    for entry in entries:
        unlisted = entry.is_directory and entry.error is not None
        name = entry.path.lower()
        if not unlisted and not name.endswith(suffixes):
            kind = "not followed or unreadable" if entry.error else "with another suffix"
            left_out[kind] += not entry.is_directory
        elif entry.path.find("/.", within) >= 0:
            left_out["hidden"] += 1
        elif unlisted:
            left_out[UNLISTED] += 1
            if left_out[UNLISTED] <= WARNINGS:
                log.warning("%s: %s; its images are missing", entry.path, entry.error)
        elif MARK in entry.path:
            left_out[LIKE_MEMBERS] += 1
        else:
            kind = "image" if name.endswith(images) else "video" if name.endswith(videos) else "archive"
            error = entry.error or (too_long(entry.length, max_bytes) if kind == "image" else None)
            rows.append((entry.path, entry.length, entry.modified, error, kind))
            if len(rows) == most or _ends_chunk(entry.path):
                yield _chunk(rows)
                rows = []
    if rows:
        yield _chunk(rows)


def _ends_chunk(path: str) -> bool:
    """True for one path in `CHUNK_FILES`."""
    # The product mixes the sum's bits, of which names that differ in some digits only would set few.
    return zlib.crc32(path.encode()) * 2_654_435_761 % 2**32 < 2**32 // CHUNK_FILES


def _chunk(rows: list[tuple]) -> tuple[str, pa.Table]:
    schema = LISTED_SCHEMA.append(pa.field("kind", pa.string()))
    arrays = [pa.array(column, field.type) for column, field in zip(zip(*rows, strict=True), schema, strict=True)]
    batch = pa.RecordBatch.from_arrays(arrays, schema=schema)
    digest = hashlib.blake2b(memoryview(batch.serialize()), digest_size=12)
    return digest.hexdigest(), pa.Table.from_batches([batch])


def _slice(chunks: list[tuple[str, pa.Table]], left_out: Counter[str], known: list[str], is_last: bool) -> Listing:
    """A slice of some chunks."""
    files = pa.concat_tables([files for _, files in chunks]) if chunks else None
    images, videos, archives = (_of_kind(files, kind) for kind in ("image", "video", "archive"))
    paths = tuple(Chunk(digest, files["path"].chunk(0)) for digest, files in chunks)
    listed = Listing(images, dict(+left_out), videos, archives, paths, tuple(known), is_last)
    log.info("%s", listed)
    return listed


def _of_kind(files: pa.Table | None, kind: str) -> pa.Table:
    if files is None:
        return LISTED_SCHEMA.empty_table()
    is_kind = pc.equal(files["kind"], kind)
    files = files.drop_columns("kind")
    return files if pc.all(is_kind).as_py() else files.filter(is_kind)
