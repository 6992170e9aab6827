"""A table of results counted, and a sample of its images chosen by class, score and error.

The table is read file by file, and only the columns that are short: memory is that of a file and of `HELD_ROWS`.
"""

from collections import Counter
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from helpers.images.archive import split_members
from helpers.images.drawing import DRAWN_SCORE
from helpers.images.video import split_paths
from helpers.pipeline.task import error_kind
from helpers.storage import Storage
from helpers.storage.parquet import read_table
from helpers.storage.prefetch import map_each

COLUMNS = ["path", "error", "model"]
COLUMNS += [f"predictions.list.element.{name}" for name in ("class_id", "label", "score", "box.x1")]

BANDS = 20  # of scores, in what is counted
STRATA = 4  # of scores, in what is sampled
HELD_ROWS = 400_000  # of the table that a sample is chosen from; of a longer one, so many by chance
CONTAINERS = 8  # videos and archives that a sample is of, because each is read as a whole
ERRORS_SHARE, DIFFERING_SHARE = 0.2, 0.4  # of a sample, where there are so many
EXAMPLES = 5  # paths of each error
NO_PREDICTION = 2  # where others have a score

Outputs = list[tuple[Storage, list[str]]]  # with the files of each


@dataclass
class Side:
    """The results of one model in one output, counted."""

    store: int  # number of the output
    model: str  # as the results name it
    images: int = 0
    is_boxed: bool = False
    # Predictions by the class's number, in each of `BANDS` of the score; of a classification the best alone.
    counts: dict[int, np.ndarray] = field(default_factory=dict)
    errors: Counter[str] = field(default_factory=Counter)  # images by what `error_kind` says
    examples: dict[str, list[str]] = field(default_factory=dict)  # paths of each

    @property
    def predictions(self) -> int:
        """How many were counted."""
        return int(sum(counts.sum() for counts in self.counts.values()))


class Survey:
    """What some outputs have in their tables, and the rows that a sample is chosen from."""

    def __init__(self, outputs: Outputs):
        """Count the rows in the files of each output."""
        self.sides: list[Side] = []  # of each model in each output
        self.classes: dict[str, int] = {}  # numbers of all by their labels
        self._kinds: dict[str, int] = {}  # numbers of the kinds of errors, from 1
        self._marks = np.zeros(0, np.uint64)  # a number by chance for each class
        self._most = np.uint64(2**64 - 1)  # of a path's hash, so that few enough rows are held
        self._held: list[pd.DataFrame] = []
        for number, (storage, files) in enumerate(outputs):
            read = map_each(partial(read_table, storage, columns=COLUMNS), files, storage.concurrent_reads)
            for place, table in enumerate(read):
                self._add(table, number, place)

    def choose(self, number: int) -> pd.DataFrame:
        """A sample of so many images: `hash` of the path, `side`, `file` and `row` of each of their rows.

        Images with errors, and those of which two sides name other classes, have a share of it. All others are chosen
        so that each class has images with each certainty, whatever the table has most of. The choice is by a hash of
        the path, and so the same for the same images.
        """
        if not self._held:
            return pd.DataFrame(columns=["hash", "side", "file", "row"])
        rows = pd.concat(self._held, ignore_index=True).sort_values("hash", kind="stable")
        containers = np.unique(rows["container"])
        rows = rows[rows["container"].isin([0, *containers[containers > 0][:CONTAINERS]])]
        stratum = ["side", "kind", "class", (rows["certainty"] * STRATA).astype(np.int8).rename("band")]
        rows = rows.assign(turn=rows.groupby(stratum).cumcount()).sort_values(["turn", "hash"], kind="stable")
        failed = rows.loc[rows["kind"] > 0, "hash"].unique()[: int(number * ERRORS_SHARE)]
        differing = rows.loc[rows["hash"].isin(self._differing(rows)), "hash"].unique()[: int(number * DIFFERING_SHARE)]
        rest = rows.loc[rows["kind"] == 0, "hash"].unique()
        chosen = pd.unique(np.concatenate([failed, differing, rest, rows["hash"]]))[:number]
        return rows.loc[rows["hash"].isin(chosen), ["hash", "side", "file", "row"]]

    @property
    def pair(self) -> tuple[int, int]:
        """The two sides to be compared: the first, and of another output its model's, else the next one."""
        first = self.sides[0]
        others = [number for number, side in enumerate(self.sides) if side.store != first.store]
        same = [number for number in others if self.sides[number].model == first.model]
        return 0, (same or others or [1])[0]

    def differing(self) -> tuple[int, int]:
        """How many images the `pair` has in common, and in how many of them it shows other classes.

        Of a table of more than `HELD_ROWS`, these are estimates from the rows that are held.
        """
        rows = pd.concat(self._held, ignore_index=True)
        share = float(self._most) / 2**64
        counts = rows[rows["side"].isin(self.pair)]["hash"].duplicated().sum(), len(self._differing(rows))
        common, differing = (round(count / share) for count in counts)
        return common, differing

    def _differing(self, rows: pd.DataFrame) -> np.ndarray:
        """Hashes of the images in which the `pair` shows other classes, or other numbers of them."""
        first, second = (rows[rows["side"] == side].set_index("hash")["signature"] for side in self.pair)
        both = pd.concat([first, second], axis=1, join="inner", keys=["first", "second"])
        return both.index[both["first"] != both["second"]].to_numpy()

    def _add(self, table: pa.Table, store: int, file: int) -> None:
        for model in table["model"].unique().to_pylist():
            places = pc.indices_nonzero(pc.equal(table["model"], model)).to_numpy()
            side = next((side for side in self.sides if (side.store, side.model) == (store, model)), None)
            if side is None:
                side = Side(store, model)
                self.sides.append(side)
            part = table if len(places) == table.num_rows else table.take(places)
            rows = self._count(part.combine_chunks(), side)
            rows = rows.assign(side=np.int16(self.sides.index(side)), file=np.int32(file), row=places.astype(np.int32))
            self._held.append(rows[rows["hash"] <= self._most])
        while sum(map(len, self._held)) > HELD_ROWS:
            self._most //= np.uint64(2)
            self._held = [rows[rows["hash"] <= self._most] for rows in self._held]

    def _count(self, table: pa.Table, side: Side) -> pd.DataFrame:
        """Count some rows of a side, and return what the sample is chosen by.

        A prediction is shown if it has a box and is probable enough, or is the best of a classification. The least
        probable one shown says how certain an image is.
        """
        size, lists = table.num_rows, table["predictions"].chunk(0)
        side.images += size
        found = pc.list_flatten(lists)
        label, identity, score, box = (pc.struct_field(found, name) for name in ("label", "class_id", "score", "box"))
        lengths = pc.fill_null(pc.list_value_length(lists), 0).to_numpy()
        row = np.repeat(np.arange(size), lengths)
        is_first = np.arange(len(row)) == np.repeat(np.cumsum(lengths) - lengths, lengths)
        is_boxed = pc.struct_field(box, "x1").is_valid().to_numpy(zero_copy_only=False)
        classes, scores = self._number(label, identity), np.nan_to_num(score.to_numpy(zero_copy_only=False))
        bands = np.clip((scores * BANDS).astype(np.int64), 0, BANDS - 1)
        is_counted, width = is_boxed | is_first, len(self.classes) * BANDS
        counts = np.bincount(classes[is_counted] * BANDS + bands[is_counted], minlength=width).reshape(-1, BANDS)
        for number in np.flatnonzero(counts.any(axis=1)).tolist():
            side.counts[number] = side.counts.get(number, 0) + counts[number]
        side.is_boxed |= bool(is_boxed.any())
        is_shown = np.where(is_boxed, scores >= DRAWN_SCORE, is_first)
        row, classes, scores = row[is_shown], classes[is_shown], scores[is_shown]
        certainty, signature = np.full(size, NO_PREDICTION, np.float32), np.zeros(size, np.uint64)
        np.minimum.at(certainty, row, scores)
        np.add.at(signature, row, self._marks[classes])  # alike for the same classes, in whatever order
        totals = np.array([np.sum(side.counts.get(number, 0)) for number in range(len(self.classes))], np.int64)
        order = np.lexsort((totals[classes], row))
        shown_rows, first = np.unique(row[order], return_index=True)
        rarest = np.full(size, -1, np.int32)  # an image stands for the rarest class on it
        rarest[shown_rows] = classes[order][first]
        return pd.DataFrame(
            {
                "hash": _hash(table["path"]),
                "container": _containers(table["path"]),
                "kind": self._count_errors(table, side),
                "class": rarest,
                "certainty": certainty,
                "signature": signature,
            }
        )

    def _count_errors(self, table: pa.Table, side: Side) -> np.ndarray:
        """Count the errors of some rows, and return the number of each one's kind, 0 for none."""
        kinds = np.zeros(table.num_rows, np.int32)
        places = pc.indices_nonzero(table["error"].is_valid())
        failed = table.select(["path", "error"]).take(places)
        for place, path, error in zip(places.to_pylist(), *failed.to_pydict().values(), strict=True):
            kind = error_kind(error)
            kinds[place] = self._kinds.setdefault(kind, len(self._kinds) + 1)
            side.errors[kind] += 1
            examples = side.examples.setdefault(kind, [])
            if len(examples) < EXAMPLES:
                examples.append(path)
        return kinds

    def _number(self, labels: pa.Array, identities: pa.Array) -> np.ndarray:
        """Numbers of classes, one for each label; a class without a label is called by its id."""
        missing = pc.fill_null(pc.equal(labels, ""), True)
        names = pc.binary_join_element_wise("class", identities.cast(pa.string()), " ")
        encoded = pc.if_else(missing, names, labels).dictionary_encode()
        numbers = [self.classes.setdefault(name, len(self.classes)) for name in encoded.dictionary.to_pylist()]
        if len(self._marks) < len(self.classes):
            self._marks = np.random.default_rng(0).integers(0, 2**64, 2 * len(self.classes), np.uint64)
        return np.array(numbers, np.int64)[encoded.indices.to_numpy()]


def _containers(paths: pa.ChunkedArray) -> np.ndarray:
    """A hash of the video or archive that each path is of a part of; 0 for other files."""
    files, frames = split_paths(paths)
    files, members = split_members(files)
    is_part = pc.or_(frames.is_valid(), members.is_valid()).to_numpy()
    return np.where(is_part, _hash(files), np.uint64(0)) if is_part.any() else np.zeros(len(paths), np.uint64)


def _hash(texts: pa.ChunkedArray) -> np.ndarray:
    """A uint64 of each text, the same in every process."""
    return pd.util.hash_array(texts.to_numpy(), categorize=False)
