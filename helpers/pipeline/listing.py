"""Stage 1 on the driver: list images, videos and archives and plan the tasks. Paths travel, bytes stay put.

A listing comes in slices, so that the driver's memory does not depend on how many files there are.
"""

import hashlib
import json
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
from helpers.images.boundary import LASTING, too_long
from helpers.images.video import are_frames
from helpers.partitioning import PartitionPlan, plan_partitions
from helpers.pipeline.results import Seen
from helpers.pipeline.rows import file_paths, index_in, is_in, is_lasting
from helpers.pipeline.schemas import ASSIGNED_SCHEMA, LISTED_SCHEMA, conform
from helpers.pipeline.task import error_kind
from helpers.storage import Storage
from helpers.storage.interface import Entry, Files

log = logging.getLogger(__name__)

CHUNK_FILES, MAX_CHUNK_FILES = 2**14, 2**16  # of a chunk: the mean, and the most
CONTAINER_IMAGES = 1000  # for how many images a video or an archive stands, whose own number is not known yet
FIRST_IMAGES = 20_000  # of the first slice, if its first chunk is not larger: work begins early, and so do results
UNLISTED = "folders that cannot be listed"
LIKE_MEMBERS = f"with {MARK} in the path, which is for members of archives"
WAVES = 64  # tasks per slot, beyond which more of them do no good
MOST_CHUNKS = 4000  # that a commit tells: 65 million files
MOST_KINDS = 5  # of errors in a chunk
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


def list_images(storage: Storage, config: Config, skip: Collection[str] = ()) -> Listing:
    """All of `list_slices` in this process's memory; takes and raises what that does."""
    slices = list(list_slices(storage, config, skip))
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

    A slice has `partitioning.slice_images` images, and the first one `FIRST_IMAGES`; a video or an archive counts for
    `CONTAINER_IMAGES`. `skip` are folders to leave out, such as a run's own below its source, and `known` digests of
    chunks. Files that `arrived` (`arrivals`) take the place of all that the storage lists; then there may be none,
    unless the run starts over.

    Yields:
        Slices in the storage's order, of whole chunks. Only the last one may be empty.

    Raises:
        RunError: there is no image, no video and no archive.
        StorageError: the location cannot be listed.
    """
    most = min(FIRST_IMAGES, config.partitioning.slice_images)
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
            digests, size, most = [], 0, config.partitioning.slice_images
        waiting.append((digest, files))
        size += images
    last = _slice(waiting, left_out, digests, is_last=True)
    if not total and (arrived is None or not config.resume):
        ends = (", ".join(suffixes) or "nothing" for suffixes in _suffixes(config).values())
        kinds = "images are files that end in {}, videos in {}, archives in {}".format(*ends)
        raise RunError(f"{last} below {storage.root}; {kinds}")
    yield last


def check_any(images: int, listed: str, storage: Files, config: Config) -> None:
    """Raise RunError where archives are all that is listed, and there is no image in them."""
    if not images:
        wanted = f"those are members that end in {', '.join(config.ingest.suffixes)}"
        raise RunError(f"{listed} below {storage.root}, and none of the archives has an image: {wanted}")


def plan(
    images: pa.Table, slots: int, config: Config, image_seconds: float | None = None, expected: int = 0
) -> PartitionPlan:
    """Plan the partitions of a listing, as the `partitioning` section says.

    Where a slot would have more than `WAVES` of them, they take more time and bytes than their targets, and no more
    images: further ones would hardly end closer to each other, and each leaves a file that the driver has to know.

    `images` are those listed, or with frames and members (`reading.ROWS_SCHEMA`), which take so many seconds each, by
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
        in_order=are_frames(images["path"]).to_numpy(),
        at_least=expected,
    )


def assign(images: pa.Table, plan: PartitionPlan) -> pa.Table:
    """The images with their partitions (`ASSIGNED_SCHEMA`), each partition's images in the listing's order."""
    partitions = pa.array(plan.assignment, pa.int32())
    order = np.argsort(plan.assignment, kind="stable")
    return conform(images.append_column("partition", partitions).take(order), ASSIGNED_SCHEMA)


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
            # One path in `CHUNK_FILES` ends a chunk. The product mixes the bits of its sum, of which names that differ
            # in some digits only would set few.
            mixed = zlib.crc32(entry.path.encode()) * 2_654_435_761 % 2**32
            if len(rows) == most or mixed < 2**32 // CHUNK_FILES:
                yield _chunk(rows)
                rows = []
    if rows:
        yield _chunk(rows)


def _chunk(rows: list[tuple]) -> tuple[str, pa.Table]:
    schema = LISTED_SCHEMA.append(pa.field("kind", pa.string()))
    arrays = [pa.array(column, field.type) for column, field in zip(zip(*rows, strict=True), schema, strict=True)]
    batch = pa.RecordBatch.from_arrays(arrays, schema=schema)
    digest = hashlib.blake2b(memoryview(batch.serialize()), digest_size=12)
    return digest.hexdigest(), pa.Table.from_batches([batch])


def _slice(chunks: list[tuple[str, pa.Table]], left_out: Counter[str], known: list[str], is_last: bool) -> Listing:
    """Make a slice of some chunks and empty their list, so that only whoever works on the slice holds it."""
    files = pa.concat_tables([files for _, files in chunks]) if chunks else None
    images, videos, archives = (_of_kind(files, kind) for kind in ("image", "video", "archive"))
    paths = tuple(Chunk(digest, files["path"].chunk(0)) for digest, files in chunks)
    chunks.clear()
    listed = Listing(images, dict(+left_out), videos, archives, paths, tuple(known), is_last)
    log.info("%s", listed)
    return listed


def _of_kind(files: pa.Table | None, kind: str) -> pa.Table:
    if files is None:
        return LISTED_SCHEMA.empty_table()
    is_kind = pc.equal(files["kind"], kind)
    files = files.drop_columns("kind")
    return files if pc.all(is_kind).as_py() else files.filter(is_kind)


# ------------------------------------------------------------ what earlier runs have settled


class Known:
    """What runs remember of a listing: the chunks that a run need not look at, and those that the next one need not.

    A run's commit tells the digests of the chunks of which every image is settled in the version that it makes, with
    the number of their images and the errors among them. The next run lists all files, which no storage saves it, and
    leaves out the chunks that it knows: it reads no row of theirs.

    A digest counts as long as nothing else has changed the table. So a run believes the newest commit only, forgets all
    when another run has committed meanwhile, and what it tells itself is what it has seen settled since. What is told
    is some kilobytes per million images; more than `MOST_CHUNKS` are not told, and are looked at by every run.
    """

    def __init__(self, seen: Seen, models: Iterable[str], config: Config):
        """Believe what the newest commit tells, if it is of the same models and settings."""
        settings = [*models, *LASTING, config.ingest.model_dump_json(), config.video.model_dump_json()]
        settings.append(str(config.max_image_bytes))
        self._settings = hashlib.blake2b("\n".join(settings).encode(), digest_size=12).hexdigest()
        told = json.loads(seen.listed or "{}")
        self._chunks: dict[str, list] = {}
        self._earlier: dict[str, list] = told["chunks"] if told.get("settings") == self._settings else {}
        self.commit = (seen.change, seen.listed)  # after which all of this holds

    def __contains__(self, digest: object) -> bool:
        return digest in self._earlier

    def __len__(self) -> int:
        return len(self._earlier)

    @property
    def has_news(self) -> bool:
        """Whether this run knows something that the newest commit does not tell."""
        told = json.loads(self.commit[1] or "{}")
        return bool(self._chunks) and (told.get("settings"), told.get("chunks")) != (self._settings, self._chunks)

    def take(self, digests: Iterable[str]) -> tuple[int, Counter[str]]:
        """Count the images of chunks that are known, and the errors among them."""
        images, errors = 0, Counter[str]()
        for digest in digests:
            self._chunks[digest] = chunk = self._earlier[digest]
            images += chunk[0]
            errors.update(chunk[1])
        return images, errors

    def look(self, seen: Seen) -> None:
        """Forget everything if another run has changed the table since this one has looked."""
        if (seen.change, seen.listed) != self.commit:
            self._earlier, self._chunks = {}, {}
            self.commit = (seen.change, seen.listed)

    def add(self, listed: Listing, images: pa.Table, failed: pa.Table) -> None:
        """Remember chunks of which every image is settled when the next commit is made.

        A video or an archive that cannot be read, or not to its end, is looked at by every run. `images` are all in the
        slice (`KEY`), and `failed` path and error of those with one, of which an image may have several.
        """
        chunks = listed.chunks
        if not chunks:
            return
        starts = np.cumsum([0, *(len(chunk.paths) for chunk in chunks)])
        paths = pa.chunked_array([chunk.paths for chunk in chunks], pa.string())

        def places(table: pa.Table) -> np.ndarray:
            if table.num_rows == len(paths) and table["path"].equals(paths):  # all are images, and this saves memory
                return np.repeat(np.arange(len(chunks)), np.diff(starts))
            if not table.num_rows:
                return np.zeros(0, np.int64)
            positions = index_in(file_paths(table["path"]), paths)
            return np.searchsorted(starts, positions.to_numpy(), side="right") - 1

        counts = np.bincount(places(images), minlength=len(chunks)).tolist()
        errors: list[dict[str, str]] = [{} for _ in chunks]
        rows = zip(places(failed), failed["path"].to_pylist(), failed["error"].to_pylist(), strict=True)
        for place, path, error in rows:
            errors[place][path] = error_kind(error)
        files = [is_in(failed["path"], part["path"]) for part in (listed.videos, listed.archives)]
        is_open = pc.or_(pc.or_(*files), pc.invert(is_lasting(failed["error"])))
        unsettled = set(places(failed.filter(is_open)).tolist())
        for number, chunk in enumerate(chunks):
            kinds = dict(Counter(errors[number].values()))
            if number not in unsettled and len(kinds) <= MOST_KINDS and len(self._chunks) < MOST_CHUNKS:
                self._chunks[chunk.digest] = [counts[number], kinds]

    def tell(self, run: str) -> str:
        """What the next commit is to tell; no two commits tell the same."""
        return json.dumps({"run": run, "settings": self._settings, "chunks": self._chunks})

    def told(self, listed: str, seen: Seen) -> None:
        """Expect the next look to find what a commit has told, which was made on a version that was seen."""
        self.commit = (max(seen.version, 0) + 1, listed)
