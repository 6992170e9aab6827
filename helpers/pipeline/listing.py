"""Stage 1 on the driver: list images, videos and archives and plan the tasks. Paths travel, bytes stay put."""

import logging
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from helpers.config import Config
from helpers.errors import RunError
from helpers.images.archive import MARK
from helpers.images.boundary import too_long
from helpers.images.video import split_paths
from helpers.partitioning import PartitionPlan, plan_partitions
from helpers.pipeline.schemas import ASSIGNED_SCHEMA, ERROR, KEY, conform
from helpers.storage import Storage

log = logging.getLogger(__name__)

LISTED_SCHEMA = pa.schema([*KEY, ERROR])
ROWS_PER_CHUNK = 65_536
UNLISTED = "folders that cannot be listed"
LIKE_MEMBERS = f"with {MARK} in the path, which is for members of archives"
WARNINGS = 10  # of such folders, at most


@dataclass(frozen=True)
class Listing:
    """Images, videos and archives below a location (`LISTED_SCHEMA`), and how many files were left out, by reason.

    `error` is set where the listing has found out that a file cannot be used.
    """

    images: pa.Table
    left_out: dict[str, int]
    videos: pa.Table = field(default_factory=LISTED_SCHEMA.empty_table)
    archives: pa.Table = field(default_factory=LISTED_SCHEMA.empty_table)

    def __str__(self) -> str:
        left = ", ".join(f"{count} {reason}" for reason, count in sorted(self.left_out.items()))
        others = {"videos": self.videos.num_rows, "archives": self.archives.num_rows}
        counts = [f"{self.images.num_rows} images", *(f"{count} {kind}" for kind, count in others.items() if count)]
        return ", ".join(counts) + (f"; left out: {left}" if left else "")


def list_images(storage: Storage, config: Config, skip: Collection[str] = ()) -> Listing:
    """List the files with the suffix of an image, a video or an archive, nested folders included.

    Hidden files and other suffixes are left out and counted. A folder with an image's suffix is listed too: it becomes
    an error row instead of passing unseen. A folder that cannot be listed is told and counted, as `UNLISTED`. A file
    whose path could be that of an archive's member is left out and counted, because a path stands for one image.

    Args:
        storage: where to look.
        config: its `ingest` and `video` sections name the suffixes, which links are followed, and how long an image
            may be.
        skip: folders to leave out, such as a run's own below its source.

    Raises:
        RunError: there is no image, no video and no archive.
        StorageError: the location cannot be listed.
    """
    suffixes = tuple(suffix.lower() for suffix in config.ingest.suffixes)
    video_suffixes = tuple(suffix.lower() for suffix in config.video.suffixes)
    archive_suffixes = tuple(suffix.lower() for suffix in config.ingest.archives)
    left_out: Counter[str] = Counter()
    chunks: list[pa.RecordBatch] = []
    rows, videos, archives = list[tuple](), list[tuple](), list[tuple]()
    entries = storage.list(directories=True, skip=skip, tolerant=True, outside_links=config.ingest.outside_links)
    for entry in entries:
        unlisted = entry.is_directory and entry.error is not None
        if not unlisted and not entry.path.lower().endswith(suffixes + video_suffixes + archive_suffixes):
            kind = "not followed or unreadable" if entry.error else "with another suffix"
            left_out[kind] += not entry.is_directory
        elif any(part.startswith(".") for part in entry.path.removeprefix(storage.root).split("/")):
            left_out["hidden"] += 1
        elif unlisted:
            left_out[UNLISTED] += 1
            if left_out[UNLISTED] <= WARNINGS:
                log.warning("%s: %s; its images are missing", entry.path, entry.error)
        elif MARK in entry.path:
            left_out[LIKE_MEMBERS] += 1
        elif not entry.path.lower().endswith(suffixes):
            files = videos if entry.path.lower().endswith(video_suffixes) else archives
            files.append((entry.path, entry.length, entry.modified, entry.error))
        else:
            error = entry.error or too_long(entry.length, config.max_image_bytes)
            rows.append((entry.path, entry.length, entry.modified, error))
            if len(rows) == ROWS_PER_CHUNK:
                chunks.append(_chunk(rows))
                rows = []
    images = pa.Table.from_batches([*chunks, _chunk(rows)])
    listed = Listing(images, +left_out, *(pa.Table.from_batches([_chunk(files)]) for files in (videos, archives)))
    log.info("%s", listed)
    if not (images.num_rows or videos or archives):
        raise RunError(
            f"{listed} below {storage.root}; images are files that end in {', '.join(suffixes)}, "
            f"videos in {', '.join(video_suffixes)}, archives in {', '.join(archive_suffixes) or 'nothing'}"
        )
    return listed


def plan(
    images: pa.Table, slots: int, config: Config, image_seconds: float | None = None, expected: int = 0
) -> PartitionPlan:
    """Plan the partitions of a listing, as the `partitioning` section says.

    Args:
        images: what was listed, or with the frames of videos and the members of archives (`frames.ROWS_SCHEMA`).
        slots: tasks that run at once.
        config: its `partitioning` section.
        image_seconds: what an image takes; by default what one without a model does.
        expected: slots that there may be later.
    """
    settings = config.partitioning
    seconds = image_seconds or settings.image_seconds
    sizes = images["bytes" if "bytes" in images.schema.names else "length"]
    return plan_partitions(
        pc.if_else(images["error"].is_null(), sizes, 0).to_numpy(),  # what is not read takes no time
        slots,
        target_bytes=settings.target_bytes,
        target_images=max(1, min(settings.target_images, round(settings.target_seconds / seconds))),
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


def _chunk(rows: list[tuple]) -> pa.RecordBatch:
    columns = zip(*rows, strict=True) if rows else [()] * len(LISTED_SCHEMA)
    arrays = [pa.array(column, field.type) for column, field in zip(columns, LISTED_SCHEMA, strict=True)]
    return pa.RecordBatch.from_arrays(arrays, schema=LISTED_SCHEMA)
