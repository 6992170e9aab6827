"""Whether predictions are distributed as in earlier runs: how often each class is found, and with which scores.

Each task counts its own rows, and the driver adds the counts up and leaves them in the table's history. Two of them are
compared by the Jensen-Shannon distance to base 2 (Lin, IEEE Transactions on Information Theory 37, 1991, section IV): 0
where they are alike, 1 where they have nothing in common, and no class has to be in both. What chance alone makes of
samples of their sizes is taken off, so that few images raise no alarm. Executors import this module.
"""

import json
import logging
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from helpers.pipeline.rows import count_values

log = logging.getLogger(__name__)

BINS = 10  # of scores from 0 to 1
CLASSES = 100  # that are counted by name, the most frequent ones
OTHERS = "(others)"
DEVIATIONS = 3.0  # of what chance makes, in standard deviations


@dataclass
class Distribution:
    """Counts of predictions."""

    classes: Counter[str] = field(default_factory=Counter)
    scores: list[int] = field(default_factory=lambda: [0] * BINS)

    def add(self, other: "Distribution") -> None:
        """Count those of another too."""
        self.classes.update(other.classes)
        self.scores = [a + b for a, b in zip(self.scores, other.scores, strict=True)]


class Distributions(dict[str, Distribution]):
    """By model."""

    def add(self, rows: pa.Table) -> None:
        """Count the predictions of rows of the results."""
        for model in count_values(rows["model"]):
            of_model = rows.filter(pc.equal(rows["model"], model))
            predictions = pc.list_flatten(of_model["predictions"])
            scores = pc.drop_null(pc.struct_field(predictions, "score")).to_numpy()
            labels = pc.fill_null(pc.struct_field(predictions, "label"), "")
            histogram = np.histogram(np.clip(scores, 0, 1), BINS, (0, 1))[0]
            counts = Distribution(Counter(count_values(labels)), histogram.tolist())
            self.setdefault(model, Distribution()).add(counts)

    def merge(self, texts: Iterable[str]) -> "Distributions":
        """Count what `to_json` has written, and return this."""
        for text in texts:
            for model, counts in json.loads(text).items():
                more = Distribution(Counter(counts["classes"]), counts["scores"])
                self.setdefault(model, Distribution()).add(more)
        return self

    def to_json(self) -> str:
        """As text of bounded length; classes beyond the most frequent ones are one."""
        values = {}
        for model, counts in self.items():
            classes = dict(counts.classes.most_common(CLASSES))
            if rest := counts.classes.total() - sum(classes.values()):
                classes[OTHERS] = classes.get(OTHERS, 0) + rest
            values[model] = {"classes": classes, "scores": counts.scores}
        return json.dumps(values)

    def distances(self, others: "Distributions") -> dict[str, dict[str, float]]:
        """How far each model's classes and scores are from others', for models that are in both."""
        found = {}
        for model in self.keys() & others.keys():
            one, other = self[model], others[model]
            scores = (dict(enumerate(counts.scores)) for counts in (one, other))
            found[model] = {"classes": distance(*_same(one.classes, other.classes)), "scores": distance(*scores)}
        return found

    def compare(self, earlier: Iterable[str], limit: float) -> dict[str, dict[str, float]]:
        """`distances` from what earlier runs have written by `to_json`; the log warns of those beyond a limit."""
        found = self.distances(Distributions().merge(earlier))
        for model, parts in found.items():
            for part, value in parts.items():
                if value > limit:
                    log.warning(
                        "the %s that %s finds are distributed otherwise than in earlier runs: their Jensen-Shannon "
                        "distance is %.2f, more than tracking.drift=%g; look at the images", part, model, value, limit,
                    )  # fmt: skip
        return found


def distance(one: Mapping, other: Mapping) -> float:
    """The Jensen-Shannon distance of two counts to base 2, less what chance makes; 0 where one of them has none."""
    names = sorted(name for name in {*one, *other} if one.get(name, 0) + other.get(name, 0))
    sizes = sum(one.values()), sum(other.values())
    if not all(sizes):
        return 0.0
    p, q = (np.array([counts.get(name, 0) for name in names]) / sum(counts.values()) for counts in (one, other))
    mean = (p + q) / 2
    divergence = sum(float(np.sum(part[part > 0] * np.log2(part[part > 0] / mean[part > 0]))) for part in (p, q)) / 2
    # Of two samples of one distribution, 8 ln 2 times the divergence is, about, (1/n + 1/m) of a chi-squared variable.
    degrees = len(names) - 1
    chance = (degrees + DEVIATIONS * math.sqrt(2 * degrees)) * (1 / sizes[0] + 1 / sizes[1]) / (8 * math.log(2))
    return math.sqrt(max(divergence - chance, 0.0))


def _same(one: Counter[str], other: Counter[str]) -> tuple[Counter[str], ...]:
    """Counts of the same classes, where one of them does not name all of its own."""
    if not (one[OTHERS] or other[OTHERS]):
        return one, other
    names = one.keys() & other.keys() - {OTHERS}
    rests = [counts.total() - sum(counts[name] for name in names) for counts in (one, other)]
    both = zip((one, other), rests, strict=True)
    return tuple(Counter({name: counts[name] for name in names} | {OTHERS: rest}) for counts, rest in both)
