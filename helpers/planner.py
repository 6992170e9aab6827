"""What N images will take on K executors, and into how many partitions to divide them.

    run time = session + listing + start of the pass + the slots' work, their overhead and their tail + publishing

What each part takes comes from the records of a short run (`helpers.cost_model`). Spark keeps the slots busy as
`helpers.simulation` does event by event; for tasks of about equal length, which the partition plan makes, the end of
the last one is computed here in closed form, fluctuation and failures included as expectations. Pure: numpy and
pandas only.
"""

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist

import numpy as np
import pandas as pd

from helpers.cost_model import CostModel
from helpers.simulation import Schedule, Speculation, draw_failures, simulate

CANDIDATES = 60  # numbers of partitions that are tried
PARTS = ("session", "listing", "start", "work", "overhead", "retries", "tail", "publish")


@dataclass(frozen=True)
class Cluster:
    """Executors and their slots.

    Attributes:
        executors: how many.
        cores: tasks at once of each.
        speeds: of the executors, in turn: 1 is as fast as where the model was calibrated.
        executors_a_machine: that share a machine.
        price: of one executor for an hour, in whatever money.
    """

    executors: int
    cores: int = 1
    speeds: tuple[float, ...] = (1.0,)
    executors_a_machine: int = 1
    price: float = 0.0

    def __post_init__(self) -> None:
        if min(self.executors, self.cores, self.executors_a_machine) < 1 or self.price < 0:
            raise ValueError(
                "executors, cores and executors of a machine must be at least 1, and the price not negative"
            )
        if not self.speeds or min(self.speeds) <= 0:
            raise ValueError("speeds must be positive")

    @property
    def slots(self) -> int:
        """Tasks at once."""
        return self.executors * self.cores

    def slot_speeds(self, model: CostModel) -> np.ndarray:
        """Speed of each slot beside its neighbours: float64 `[slots]`; an executor's slots are not next to each other.

        Spark offers a free core of each executor in turn.
        """
        neighbours = self.cores * min(self.executors, self.executors_a_machine)
        slowdown = (1 + model.contention * (neighbours - 1)) / (1 + model.contention * (model.concurrency - 1))
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
        names = ("images", "partitions", "seconds", "pass_seconds", "cost")
        rate = {"images_per_second": round(self.images / self.pass_seconds, 2)}
        parts = {f"{name}_seconds": round(float(getattr(self, name)), 3) for name in PARTS}
        return {**{name: round(float(getattr(self, name)), 3) for name in names}, **rate, **parts}

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
    """Predict a run.

    Args:
        model: fitted on runs like it.
        images: how many.
        cluster: where.
        partitions: how many tasks; None for the best number (`best_partitions`).
        image_bytes: of a mean image, by default as in the calibration.
        failure_rate: of a task's attempts.
    """
    if image_bytes is not None:
        model = replace(model, image_bytes=image_bytes)
    if partitions is None:
        partitions = best_partitions(model, images, cluster, failure_rate)
    partitions = max(1, min(partitions, images))
    speeds = cluster.slot_speeds(model)
    total = speeds.sum()
    task = _task_seconds(model, images, partitions)
    used = min(partitions, cluster.slots)
    work = model.mean_image_seconds * images / total
    overhead = (model.task_seconds * partitions + model.worker_seconds * used) / total
    wasted = failure_rate / (1 - failure_rate) * task * partitions / 2 / total
    end = expected_makespan(partitions, task, speeds, model.worker_seconds, model.variation, failure_rate)
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
    most = math.log2(max(1, images // slots))
    waves = np.unique(np.round(2 ** np.linspace(0, most, CANDIDATES)).astype(int))
    tried = [min(images, slots * int(wave)) for wave in waves]
    return min(tried, key=lambda n: predict(model, images, cluster, n, failure_rate=failure_rate).seconds)


def play(
    model: CostModel,
    images: int,
    cluster: Cluster,
    partitions: int,
    *,
    failure_rate: float = 0.0,
    speculation: Speculation | None = None,
    seed: int = 0,
) -> Schedule:
    """Simulate the pass of a run whose tasks fluctuate as they did in the calibration, from its first task on."""
    rng = np.random.default_rng(seed)
    spread = math.sqrt(math.log1p(model.variation**2))
    seconds = _task_seconds(model, images, partitions) * rng.lognormal(-(spread**2) / 2, spread, partitions)
    speeds = cluster.slot_speeds(model)
    return simulate(
        seconds,
        speeds,
        ready=model.worker_seconds / speeds,
        failures=draw_failures(failure_rate, partitions, rng) if failure_rate else None,
        speculation=speculation,
    )


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
        found = predict(
            model,
            images,
            replace(cluster, executors=executors),
            image_bytes=image_bytes,
            failure_rate=failure_rate,
        )
        parts = {name: getattr(found, name) for name in PARTS}
        rows.append({"executors": executors, "slots": found.cluster.slots, "partitions": found.partitions, **parts})
        rows[-1].update(seconds=found.seconds, images_per_second=images / found.pass_seconds, cost=found.cost)
    table = pd.DataFrame(rows)
    table["efficiency"] = table["seconds"].iloc[0] / table["seconds"] / table["executors"]
    return table


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
) -> float:
    """When the last task ends, on average, where tasks fluctuate and fail.

    Whole waves of equal tasks leave no tail. Fluctuation lets a slot end later by what the largest of as many normal
    deviations is, until slots are out of step; then what is left of the tasks under way when the last one begins is
    uniform on their time, and the largest rest counts. A failure near the end adds half a task.
    """
    pace = np.asarray(speeds, float)
    end = equal_makespan(tasks, seconds, pace, start / pace)
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


def _task_seconds(model: CostModel, images: int, partitions: int) -> float:
    return model.task_seconds + model.mean_image_seconds * images / partitions


def _level(work: float, pace: np.ndarray, begin: np.ndarray) -> float:
    """When slots that begin one after another have done some work together, if it could be divided at will."""
    order = np.argsort(begin, kind="stable")
    speed, weighted = np.cumsum(pace[order]), np.cumsum((pace * begin)[order])
    levels = (work + weighted) / speed
    later = np.append(begin[order][1:], np.inf)
    return float(levels[np.argmax(levels <= later)])
