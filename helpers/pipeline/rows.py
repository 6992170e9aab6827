"""Which rows of the results an image has, and whether they still hold; plain functions of Arrow tables.

An image is known by its path, length and modification time (`KEY`). Paths of tens of millions of images have more than
2 GiB, which is more than an Arrow array of the type `string` holds.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable
from functools import reduce

import pyarrow as pa
import pyarrow.compute as pc

from helpers.images.archive import split_members
from helpers.images.boundary import LASTING
from helpers.images.video import split_paths
from helpers.pipeline.schemas import ERROR, KEY, KEY_NAMES

LONG_BYTES = 2**30  # of paths that are cast to a type without a limit, which copies them
ROWS_SCHEMA = pa.schema([*KEY, ERROR, pa.field("model", pa.string()), pa.field("file", pa.string())])


class Statistics:
    """What Delta's log says of a file's rows: how many, the first and the last path and model, and nulls per column."""

    def __init__(self) -> None:
        self._rows = 0
        self._bounds: dict[str, tuple[str, str]] = {}
        self._nulls = Counter[str]()

    @classmethod
    def of(cls, rows: pa.Table) -> "Statistics":
        """Those of one table."""
        statistics = cls()
        statistics.add(rows)
        return statistics

    def add(self, rows: pa.Table) -> None:
        """Count more rows, which have at least the columns of `ROWS_SCHEMA` but for the file."""
        for name in ("path", "model") if rows.num_rows else ():
            values = [*self._bounds.get(name, ()), *pc.min_max(rows[name]).as_py().values()]
            self._bounds[name] = min(values), max(values)
        self._rows += rows.num_rows
        self._nulls.update({name: rows[name].null_count for name in ROWS_SCHEMA.names[:-1]})

    def to_json(self) -> str:
        """In the form of the log."""
        first, last = ({name: bounds[end] for name, bounds in self._bounds.items()} for end in (0, 1))
        return json.dumps({"numRecords": self._rows, "minValues": first, "maxValues": last, "nullCount": self._nulls})


def settled(rows: pa.Table, models: int = 1) -> pa.Table:
    """The rows that stay as they are until their image changes: without an error, or with one of the image itself.

    Any other error (of reading, memory, a permission, a limit that is set) can pass without a change of the image. An
    image without a settled row of each of a run's models is worked on again, and all its rows are replaced.
    """
    if rows["error"].null_count < rows.num_rows:  # else a copy is saved
        rows = rows.filter(pc.or_kleene(pc.is_null(rows["error"]), is_lasting(rows["error"])))
    if models == 1:
        return rows
    images = pa.table([_large(rows["path"]), *(rows[name] for name in KEY_NAMES[1:])], names=KEY_NAMES)
    images = images.append_column("model", rows["model"]).group_by(KEY_NAMES).aggregate([("model", "count_distinct")])
    complete = images.filter(pc.equal(images["model_count_distinct"], models))
    return rows.filter(is_among(rows.set_column(0, "path", _large(rows["path"])), complete))


def is_lasting(errors: pa.ChunkedArray) -> pa.ChunkedArray:
    """Whether each error is one of the image itself; null where there is none."""
    return pc.match_substring_regex(errors, f"^({'|'.join(map(re.escape, LASTING))})")


def path_range(images: pa.Table, *files: pa.Table) -> tuple[str, str] | None:
    """The first and the last path that images may have, and what is in files of videos and archives; None of none."""
    tables = [table["path"] for table in (images, *files) if table.num_rows]
    bounds = [bound for paths in tables for bound in pc.min_max(paths).as_py().values()]
    # `FILE#frame=N` and `FILE#member=NAME` come after FILE, and before anything that begins with `FILE$`.
    bounds += [f"{pc.max(table['path']).as_py()}$" for table in files if table.num_rows]
    return (min(bounds), max(bounds)) if bounds else None


def file_paths(paths: pa.ChunkedArray) -> pa.ChunkedArray:
    """The paths of the files that images are in: their own, or that of a video or an archive."""
    return split_members(split_paths(paths)[0])[0]


def without(images: pa.Table, rows: pa.Table, key: list[str] = KEY_NAMES) -> pa.Table:
    """The images whose path, length and modification time, or another key, are not among the rows."""
    if not rows.num_rows:  # a copy is saved
        return images
    return images.filter(pc.invert(is_among(images, rows, key)))


def is_new(rows: pa.Table, others: pa.Table, models: int = 1) -> pa.ChunkedArray:
    """Whether each row adds something to others: its image is not settled there, or has another key.

    An image that failed for want of something is settled once it has been tried with success; another such failure adds
    nothing.
    """
    return pc.invert(
        pc.if_else(rows["error"].is_null(), is_among(rows, settled(others, models)), is_among(rows, others))
    )


def outdated(rows: pa.Table, images: pa.Table, videos: pa.Table, archives: pa.Table) -> pa.Table:
    """The rows of videos and archives that have changed: the new version may have fewer images, or none.

    All but the rows are listed now, the videos' frames and the archives' members among the images.
    """
    kinds = [
        (videos, split_paths, KEY_NAMES),
        (archives, split_members, ["path", "modified"]),  # the length is the member's own
    ]
    wrong = [
        _outdated(rows, images, listed, *split(rows["path"]), key) for listed, split, key in kinds if listed.num_rows
    ]
    return rows.filter(reduce(pc.or_, wrong)) if wrong else rows.slice(0, 0)


def _outdated(
    rows: pa.Table, images: pa.Table, listed: pa.Table, files: pa.ChunkedArray, parts: pa.ChunkedArray, key: list[str]
) -> pa.ChunkedArray:
    """Whether each row is outdated, for one kind of files, `listed` now and known by a key.

    Of each row's path there is the file, and the part of it, null where the path is the file's own.
    """
    now = rows.select(KEY_NAMES).set_column(0, "path", files)
    same = is_among(now, listed, key)
    changed = pc.and_(is_in(files, listed["path"]), pc.invert(same))
    # The other way round, a file of which nothing could be read, or not all, and now can.
    mended = pc.and_(pc.and_(pc.is_null(parts), same), pc.invert(is_among(now, images)))
    return pc.or_(changed, mended)


def rows_of_later_runs(rows: pa.Table, run: str) -> pa.Table:
    """The rows in files of runs that began after one; names begin with that time."""
    later = [file for file in count_values(rows["file"]) if file.rpartition("/")[2][: len(run)] > run]
    return rows.filter(is_in(rows["file"], pa.chunked_array([later], pa.string())))


def in_first_file(rows: pa.Table, files: Iterable[str]) -> pa.Table:
    """Of each image the rows in the first of some files that has any of it."""
    columns = pa.schema([("file", pa.string()), ("order", pa.int64())])
    names = list(files)
    ordered = rows.join(pa.table([names, range(len(names))], schema=columns), "file")
    ordered = ordered.join(ordered.group_by("path").aggregate([("order", "min")]), "path")
    return ordered.filter(pc.equal(ordered["order"], ordered["order_min"])).select(rows.schema.names)


def count_values(values: pa.ChunkedArray) -> dict[str, int]:
    """How often each value is there."""
    return {count["values"]: count["counts"] for count in values.value_counts().to_pylist()}


def is_among(table: pa.Table, rows: pa.Table, key: list[str] = KEY_NAMES) -> pa.ChunkedArray:
    """Whether path, length and modification time of each row, or another key, are those of one of the others."""
    path, *others = key
    if not table.num_rows:  # else all rows would be counted
        return pa.chunked_array([], pa.bool_())
    if pc.count_distinct(rows[path]).as_py() == rows.num_rows:  # takes a third of a join's memory
        places = index_in(table[path], rows[path])
        same = [pc.equal(table[name], rows[name].take(places)) for name in others]
        return pc.fill_null(reduce(pc.and_, same, pc.is_valid(places)), False)
    positions = table.select(key).append_column("position", pa.array(range(table.num_rows), pa.int64()))
    matches = positions.join(rows.select(key), keys=key, join_type="left semi")["position"]
    return is_in(positions["position"], matches)


def is_in(values: pa.ChunkedArray, others: pa.ChunkedArray) -> pa.ChunkedArray:
    """Whether each value is one of the others."""
    if not len(values):  # else a hash table of the others would be made
        return pa.chunked_array([], pa.bool_())
    values, others = _alike(values, others)
    return pc.is_in(values, value_set=others)


def index_in(values: pa.ChunkedArray, others: pa.ChunkedArray) -> pa.ChunkedArray:
    """Where each value is first among the others; null where it is not."""
    values, others = _alike(values, others)
    return pc.index_in(values, value_set=others)


def _alike(values: pa.ChunkedArray, others: pa.ChunkedArray) -> tuple[pa.ChunkedArray, pa.ChunkedArray]:
    """Both in a type that has no limit of 2 GiB, where they come near it or one of them has it."""
    types = {values.type, others.type}
    is_text = types <= {pa.string(), pa.large_string()}
    if is_text and (len(types) > 1 or max(values.nbytes, others.nbytes) > LONG_BYTES):
        return _large(values), _large(others)
    return values, others


def _large(paths: pa.ChunkedArray) -> pa.ChunkedArray:
    """Paths in a type that has no limit of 2 GiB."""
    return paths.cast(pa.large_string())
