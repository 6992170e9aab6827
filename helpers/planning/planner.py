"""What N images will take on K executors, and into how many partitions to divide them.

    run time = session + listing + start of the pass + the slots' work, their overhead and their tail + publishing

What each part takes comes from the records of a short run (`cost_model`). When the last task ends is known in closed
form; a simulation of the stage, event by event, gives the same (`tests/test_planner.py`). Pure: numpy and pandas only;
`plot_curve` draws with matplotlib.
"""

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from helpers.planning.cost_model import CostModel

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CANDIDATES = 60  # numbers of partitions that are tried
PARTS = ("session", "listing", "start", "work", "overhead", "retries", "tail", "publish")


@dataclass(frozen=True)
class Cluster:
    """Executors and their slots."""

    executors: int
    cores: int = 1  # tasks at once of each
    speeds: tuple[float, ...] = (1.0,)  # of the executors, in turn: 1 is as fast as where the model was calibrated
    executors_per_machine: int = 1  # which has a core for each task that they run at once
    price: float = 0.0  # of one executor for an hour, in whatever money

    def __post_init__(self) -> None:
        if min(self.executors, self.cores, self.executors_per_machine) < 1 or self.price < 0:
            raise ValueError("executors, cores and executors of a machine must be at least 1, and the price at least 0")
        if not self.speeds or min(self.speeds) <= 0:
            raise ValueError("speeds must be positive")

    @property
    def slots(self) -> int:
        """Tasks at once."""
        return self.executors * self.cores

    def share_of_cores(self, tasks: int) -> float:
        """Tasks at once that are spread over all machines, a core: of the machine that has most of them."""
        machines = math.ceil(self.executors / self.executors_per_machine)
        return math.ceil(tasks / machines) / (self.cores * min(self.executors, self.executors_per_machine))

    def slot_speeds(self, model: CostModel) -> np.ndarray:
        """Speed of each slot beside its neighbors: float64 `[slots]`; an executor's slots are not next to each other.

        Spark offers a free core of each executor in turn.
        """
        neighbors = self.cores * min(self.executors, self.executors_per_machine)
        slowdown = (1 + model.contention * (neighbors - 1)) / (1 + model.contention * (model.concurrency - 1))
        executors = np.resize(np.asarray(self.speeds, float), self.executors)
        return np.tile(executors, self.cores) / slowdown


@dataclass(frozen=True)
class Prediction:
    """A run that was not made; seconds of its phases, which add up to `seconds`.

    `work` is what the slots would take together without any overhead or waiting, `overhead` the tasks' and workers'
    fixed parts on them, `retries` what failed attempts cost, `tail` the time from there to the end of the last task.
    """

    images: int
    cluster: Cluster
    partitions: int
    session: float
    listing: float
    start: float
    work: float
    overhead: float
    retries: float
    tail: float
    publish: float

    @property
    def pass_seconds(self) -> float:
        """Of the distributed pass, which `images_per_second` of a run counts."""
        return self.start + self.work + self.overhead + self.retries + self.tail

    @property
    def seconds(self) -> float:
        """Of the whole run."""
        return self.session + self.listing + self.pass_seconds + self.publish

    @property
    def cost(self) -> float:
        """Of all executors for the whole time."""
        return self.cluster.price * self.cluster.executors * self.seconds / 3600

    def summary(self) -> dict[str, float]:
        """The figures as plain values."""
        values = {name: getattr(self, name) for name in ("seconds", "pass_seconds", "cost")}
        values |= {"images_per_second": self.images / self.pass_seconds}
        values |= {f"{name}_seconds": getattr(self, name) for name in PARTS}
        rounded = {name: round(float(value), 3) for name, value in values.items()}
        return {"images": self.images, "partitions": self.partitions, **rounded}

    def report(self) -> str:
        """A few lines for a reader."""
        cost = f", cost {self.cost:,.2f}" if self.cluster.price else ""
        parts = ", ".join(f"{name} {getattr(self, name):,.1f} s" for name in PARTS if getattr(self, name) >= 0.05)
        return (
            f"{self.images:,} images on {self.cluster.executors:,} executors of {self.cluster.cores} cores: "
            f"{duration(self.seconds)}{cost}, {self.images / self.pass_seconds:,.1f} images/s\n"
            f"of this: {parts}\n"
            f"partitions: {self.partitions:,}, of {self.images / self.partitions:,.0f} images each "
            f"(--set partitioning.partitions={self.partitions})\n"
        )


def duration(seconds: float) -> str:
    """Seconds as a reader says them."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes, hours = seconds / 60, seconds / 3600
    return f"{minutes:.1f} min" if minutes < 120 else f"{hours:,.1f} h"


def predict(
    model: CostModel,
    images: int,
    cluster: Cluster,
    partitions: int | None = None,
    *,
    image_bytes: float | None = None,
    failure_rate: float = 0.0,
) -> Prediction:
    """Predict a run of some images on a cluster, by a model that was fitted on runs like it.

    Partitions are by default the best number of them, and bytes of a mean image those of the calibration. The failure
    rate is of tasks' attempts.
    """
    if image_bytes is not None:
        model = replace(model, image_bytes=image_bytes)
    if partitions is None:
        partitions = best_partitions(model, images, cluster, failure_rate)
    partitions = max(1, min(partitions, images))
    speeds = cluster.slot_speeds(model)
    total = speeds.sum()
    task = model.task_seconds + model.mean_image_seconds * images / partitions  # of its share, on a slot of speed 1
    workers = min(partitions, cluster.slots)
    work = model.mean_image_seconds * images / total
    overhead = (model.task_seconds * partitions + model.worker_seconds * workers) / total
    wasted = failure_rate / (1 - failure_rate) * task * partitions / 2 / total
    idle = (1 - max(model.alone, cluster.share_of_cores(partitions % cluster.slots))) * (task - model.task_seconds)
    last = task - idle
    end = expected_makespan(partitions, task, speeds, model.worker_seconds, model.variation, failure_rate, last)
    return Prediction(
        images,
        cluster,
        partitions,
        session=model.session_seconds,
        listing=model.open_seconds + model.image_list_seconds * images,
        start=model.start_seconds,
        work=work,
        overhead=overhead,
        retries=wasted,
        tail=end - work - overhead - wasted + model.finish_seconds,
        publish=model.log_seconds + model.task_publish_seconds * partitions,
    )


def best_partitions(model: CostModel, images: int, cluster: Cluster, failure_rate: float = 0.0) -> int:
    """The number of partitions with which a run is predicted to end first: few cost a tail, many their overhead."""
    slots = min(cluster.slots, images)
    last_exponent = math.log2(max(1, images // slots))
    waves = np.unique(np.round(2 ** np.linspace(0, last_exponent, CANDIDATES)).astype(int))
    counts = [min(images, slots * int(wave)) for wave in waves]
    return min(counts, key=lambda n: predict(model, images, cluster, n, failure_rate=failure_rate).seconds)


def curve(
    model: CostModel, images: int, cluster: Cluster, image_bytes: float | None = None, failure_rate: float = 0.0
) -> pd.DataFrame:
    """Time and cost against the number of executors, each with its best partitions, up to twice the cluster's.

    Returns:
        A row for each number of executors: `executors`, `slots`, `partitions`, the parts of a `Prediction` in seconds,
        `seconds`, `images_per_second`, `efficiency` (the speed-up over one executor, of their number) and `cost`.
    """
    steps = np.geomspace(1, 2 * cluster.executors, 9).round().astype(int).tolist()
    rows = []
    for executors in sorted({*steps, cluster.executors}):
        other = replace(cluster, executors=executors)
        one = predict(model, images, other, image_bytes=image_bytes, failure_rate=failure_rate)
        row = {"executors": executors, "slots": other.slots, "partitions": one.partitions}
        row |= {name: getattr(one, name) for name in PARTS} | {"seconds": one.seconds}
        rows.append(row | {"images_per_second": images / one.pass_seconds, "cost": one.cost})
    table = pd.DataFrame(rows)
    table["efficiency"] = table["seconds"].iloc[0] / table["seconds"] / table["executors"]
    return table


def plot_curve(table: pd.DataFrame, executors: int, price: float = 0.0) -> "Figure":
    """Draw time, and cost where an executor has a price, against executors (`curve`), with a mark at one number."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, ScalarFormatter

    figure = Figure(figsize=(8.0, 3.4), layout="constrained")
    axis = figure.subplots()
    unit, scale = next(
        (u, s) for u, s in (("h", 3600), ("min", 60), ("s", 1)) if table["seconds"].min() >= 2 * s or s == 1
    )
    axis.plot(table["executors"], table["seconds"] / scale, marker="o", label="time")
    axis.axvline(executors, color="gray", linestyle=":")
    axis.set(xlabel="executors", ylabel=f"time, {unit}", xscale="log", yscale="log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter(ScalarFormatter())
    axis.set_xticks(table["executors"], [str(n) for n in table["executors"]])
    axis.minorticks_off()
    row = table.set_index("executors").loc[executors]
    title = f"{executors} executors take {row['seconds'] / scale:.1f} {unit}"
    if price:
        right = axis.twinx()
        right.plot(table["executors"], table["cost"], marker="s", color="C1", label="cost")
        right.set(ylabel="cost", ylim=(0, 1.2 * table["cost"].max()))
        title += f" for {row['cost']:,.2f}"
        axis.legend(handles=[axis.get_lines()[0], right.get_lines()[0]], loc="upper center")
    axis.set_title(f"{title}, at an efficiency of {row['efficiency']:.0%}")
    return figure


# ------------------------------------------------------------ when the last of many about equal tasks ends


def equal_makespan(
    tasks: int, seconds: float, speeds: Sequence[float] | np.ndarray, ready: Sequence[float] | np.ndarray | float = 0.0
) -> float:
    """When the last of equal tasks ends on slots of different speeds: exactly what the simulation gives.

    A slot's tasks begin at `ready + k seconds / speed`; those that begin first are the ones that run. All but the last
    two a slot are counted, and only those are played.
    """
    pace = np.asarray(speeds, float)
    begin = np.broadcast_to(np.asarray(ready, float), pace.shape)
    if (pace == pace[0]).all() and (begin == begin[0]).all():
        return float(begin[0] + math.ceil(tasks / pace.size) * seconds / pace[0]) if tasks else 0.0
    late = _level((tasks - pace.size) * seconds, pace, begin)
    done = np.floor(np.maximum(0.0, late - begin) * pace / seconds).astype(int) if seconds else np.zeros(pace.size, int)
    free = [(float(b + k * seconds / p), slot) for slot, (b, k, p) in enumerate(zip(begin, done, pace, strict=True))]
    end = max((time for time, slot in free if done[slot]), default=0.0)
    heapq.heapify(free)
    for _ in range(tasks - int(done.sum())):
        time, slot = free[0]
        last = time + seconds / pace[slot]
        heapq.heapreplace(free, (last, slot))
        end = max(end, last)
    return float(end)


def expected_makespan(
    tasks: int,
    seconds: float,
    speeds: np.ndarray,
    start: float = 0.0,
    variation: float = 0.0,
    failure_rate: float = 0.0,
    last: float | None = None,
) -> float:
    """When the last task ends, on average, where tasks fluctuate and fail.

    Whole waves of equal tasks leave no tail. Fluctuation lets a slot end later by what the largest of as many normal
    deviations is, until slots are out of step; then what is left of the tasks under way when the last one begins is
    uniform on their time, and the largest rest counts. A failure near the end adds half a task.

    Args:
        tasks: how many.
        seconds: of each on a slot of speed 1.
        speeds: of the slots.
        start: seconds until a slot of speed 1 can take its first task.
        variation: standard deviation of a task's time, as a share of it.
        failure_rate: of a task's attempts.
        last: seconds of the tasks of a last wave that leaves slots idle, where there are waves: all slots are equal.
    """
    pace = np.asarray(speeds, float)
    alike = bool((pace == pace[0]).all())
    saved = (seconds - last) / pace[0] if last is not None and alike and tasks % pace.size else 0.0
    end = equal_makespan(tasks, seconds, pace, start / pace) - saved
    again = failure_rate / (1 - failure_rate) * seconds * tasks / 2 / pace.sum()
    busy = pace[:tasks]
    late = seconds / (busy if tasks <= pace.size else pace).mean() / 2 * (1 - (1 - failure_rate) ** busy.size)
    if tasks <= pace.size:
        return end + variation * _largest(tasks) * seconds / busy.min() + again + late
    level, mean = _level(tasks * seconds, pace, start / pace), seconds / pace.mean()
    in_step = variation * _largest(pace.size) * math.sqrt(tasks / pace.size) * mean
    values, counts = np.unique(pace, return_counts=True)
    kinds = zip(values.tolist(), counts.tolist(), strict=True)
    out_of_step = max(seconds / v * (n / (n + 1) + variation * _largest(n)) for v, n in kinds) - mean / 2
    return max(end, level + min(in_step, out_of_step)) + again + late


def _largest(count: int) -> float:
    """The expected largest of normal deviations (Blom, 1958)."""
    return NormalDist().inv_cdf((count - 0.375) / (count + 0.25)) if count > 1 else 0.0


def _level(work: float, pace: np.ndarray, begin: np.ndarray) -> float:
    """When slots that begin one after another have done some work together, if it could be divided at will."""
    order = np.argsort(begin, kind="stable")
    speed, weighted = np.cumsum(pace[order]), np.cumsum((pace * begin)[order])
    levels = (work + weighted) / speed
    later = np.append(begin[order][1:], np.inf)
    return float(levels[np.argmax(levels <= later)])
