"""Which rows of the results an image has, and whether they still hold; plain functions of Arrow tables.

An image is known by its path, length and modification time (`KEY`). Paths of tens of millions of images have more than
2 GiB, which is more than an Arrow array of the type `string` holds.
"""

import re

import pyarrow as pa
import pyarrow.compute as pc

from helpers.images.archive import split_members
from helpers.images.boundary import LASTING
from helpers.images.video import split_paths
from helpers.pipeline.schemas import ERROR, KEY, KEY_NAMES

ROWS_SCHEMA = pa.schema([*KEY, ERROR, pa.field("model", pa.string()), pa.field("file", pa.string())])


def settled(rows: pa.Table, models: int = 1) -> pa.Table:
    """The rows that stay as they are until their image changes: without an error, or with one of the image itself.

    Any other error (of reading, memory, a permission, a limit that is set) can pass without a change of the image.

    Args:
        rows: the results.
        models: of the run; an image without a settled row of each is worked on again, and all its rows are replaced.
    """
    lasting = pc.match_substring_regex(rows["error"], f"^({'|'.join(map(re.escape, LASTING))})")
    rows = rows.filter(pc.or_kleene(pc.is_null(rows["error"]), lasting))
    if models == 1:
        return rows
    images = pa.table([_large(rows["path"]), *(rows[name] for name in KEY_NAMES[1:])], names=KEY_NAMES)
    images = images.append_column("model", rows["model"]).group_by(KEY_NAMES).aggregate([("model", "count_distinct")])
    complete = images.filter(pc.equal(images["model_count_distinct"], models))
    return rows.filter(is_among(rows.set_column(0, "path", _large(rows["path"])), complete))


def without(images: pa.Table, rows: pa.Table) -> pa.Table:
    """The images whose path, length and modification time are not among the rows."""
    return images.filter(pc.invert(is_among(images, rows)))


def replaced(images: pa.Table, rows: pa.Table) -> pa.ChunkedArray:
    """Paths of the images that have a row, of an earlier length or modification time."""
    return images.filter(is_in(images["path"], rows["path"]))["path"]


def outdated(rows: pa.Table, images: pa.Table, videos: pa.Table, archives: pa.Table) -> pa.ChunkedArray:
    """Paths of results of videos and archives that have changed: the new version may have fewer images, or none.

    Args:
        rows: the results.
        images: what is listed now, the videos' frames and the archives' members among it.
        videos: the video files listed now.
        archives: the same of archives.
    """
    frames, members = split_paths(rows["path"]), split_members(rows["path"])
    of_videos = _outdated(rows, images, videos, *frames, KEY_NAMES)
    of_archives = _outdated(rows, images, archives, *members, ["path", "modified"])  # the length is the member's own
    return pa.chunked_array([*of_videos.chunks, *of_archives.chunks], pa.string())


def _outdated(
    rows: pa.Table, images: pa.Table, listed: pa.Table, files: pa.ChunkedArray, parts: pa.ChunkedArray, key: list[str]
) -> pa.ChunkedArray:
    """`outdated` for one kind of files: `files` and `parts` are the rows' paths, split, and `key` is of the files."""
    if not listed.num_rows:
        return rows["path"].slice(0, 0)
    now = rows.select(KEY_NAMES).set_column(0, "path", files)
    same = is_among(now, listed, key)
    changed = pc.and_(is_in(files, listed["path"]), pc.invert(same))
    # The other way round, a file of which nothing could be read, or not all, and now can.
    mended = pc.and_(pc.and_(pc.is_null(parts), same), pc.invert(is_among(now, images)))
    return rows.filter(pc.or_(changed, mended))["path"]


def older_rows(rows: pa.Table) -> pa.Table:
    """Path and file of the rows that have a newer row of their path in another file."""
    both = pa.table({"path": _large(rows["path"]), "file": rows["file"]})
    if pc.count_distinct(both["path"]).as_py() == rows.num_rows:
        return both.slice(0, 0)
    counts = both["path"].value_counts()
    doubled = counts.filter(pc.greater(counts.field("counts"), 1)).field("values")
    both = both.filter(pc.is_in(both["path"], value_set=doubled))
    both = both.join(both.group_by("path").aggregate([("file", "max")]), "path")
    return both.filter(pc.less(both["file"], both["file_max"]))  # names of files begin with their run's time


def rows_of_later_runs(rows: pa.Table, run: str) -> pa.Table:
    """The rows in files of runs that began after one; names begin with that time."""
    later = [file for file in count_values(rows["file"]) if file.rpartition("/")[2][: len(run)] > run]
    return rows.filter(is_in(rows["file"], pa.chunked_array([later], pa.string())))


def count_values(values: pa.ChunkedArray) -> dict[str, int]:
    """How often each value is there."""
    return {count["values"]: count["counts"] for count in values.value_counts().to_pylist()}


def is_among(table: pa.Table, rows: pa.Table, key: list[str] = KEY_NAMES) -> pa.ChunkedArray:
    """Whether path, length and modification time of each row, or another key, are those of one of the others."""
    positions = table.select(key).append_column("position", pa.array(range(table.num_rows), pa.int64()))
    matches = positions.join(rows.select(key), keys=key, join_type="left semi")["position"]
    return is_in(positions["position"], matches)


def is_in(values: pa.ChunkedArray, others: pa.ChunkedArray) -> pa.ChunkedArray:
    """Whether each value is one of the others."""
    if pa.types.is_string(values.type):
        values, others = _large(values), _large(others)
    return pc.is_in(values, value_set=others)


def _large(paths: pa.ChunkedArray) -> pa.ChunkedArray:
    """Paths in a type that has no limit of 2 GiB."""
    return paths.cast(pa.large_string())
