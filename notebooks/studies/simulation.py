"""Spark's scheduling of one stage, event by event: the slot, start and end of each attempt of a task.

A free slot takes the first waiting task (list scheduling: Graham, 1966). A failed task goes to the front of
the queue, as in `TaskSetManager`. With speculation, an idle slot runs a copy of a task that takes much longer than the
median, and the first to end counts. Locality is ignored. `helpers.planning.planner` has the mean in closed form.
"""

import bisect
import heapq
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count

import numpy as np

from helpers.planning.cost_model import CostModel
from helpers.planning.planner import Cluster

COLUMNS = ("task", "slot", "start", "end")


@dataclass(frozen=True)
class Speculation:
    """Spark's settings of the same names, with the defaults of Spark 4."""

    quantile: float = 0.9  # of the tasks that must have ended before a copy is made of any
    multiplier: float = 3.0  # of the median time, which a task must have taken before it is copied


@dataclass(frozen=True)
class Schedule:
    """The attempts, one entry each, in the order of their ends.

    Attributes:
        task: int64, which task.
        slot: int64, where it ran.
        start: float64, seconds.
        end: float64, seconds.
        outcome: `ended`, `failed` or `stopped` (the other copy of the task had ended).
        aborted: a task failed as often as Spark allows, which ends the job.
    """

    task: np.ndarray
    slot: np.ndarray
    start: np.ndarray
    end: np.ndarray
    outcome: np.ndarray
    aborted: bool = False

    @property
    def makespan(self) -> float:
        """Seconds until the last attempt ends."""
        return float(self.end.max(initial=0.0))


def simulate(
    seconds: Sequence[float] | np.ndarray,
    speeds: Sequence[float] | np.ndarray,
    *,
    ready: float | Sequence[float] | np.ndarray = 0.0,
    failures: Sequence[int] | np.ndarray | None = None,
    failure_point: float = 0.5,
    max_failures: int = 4,
    speculation: Speculation | None = None,
) -> Schedule:
    """Run tasks, in their order, on slots.

    Args:
        seconds: of each task on a slot of speed 1.
        speeds: of each slot; a task takes its seconds divided by the speed.
        ready: seconds until a slot can take its first task, of each or of all.
        failures: how many attempts of each task fail before one succeeds; None for no failure.
        failure_point: the share of its time after which an attempt fails.
        max_failures: of one task, with which the job ends (`spark.task.maxFailures`).
        speculation: None, as is Spark's default, for none.

    Raises:
        ValueError: no slot, a speed that is not positive, or a negative time.
    """
    work, pace = np.asarray(seconds, float), np.asarray(speeds, float)
    begin = np.broadcast_to(np.asarray(ready, float), pace.shape)
    if not pace.size or (pace <= 0).any() or (work < 0).any() or (begin < 0).any():
        raise ValueError("there must be a slot, speeds must be positive, and times must not be negative")
    if failures is None and speculation is None:
        return _without_trouble(work, pace, begin)
    repeats = np.zeros(work.size, int) if failures is None else np.asarray(failures, int)
    return _Stage(work, pace, repeats, failure_point, max_failures, speculation).run(begin)


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
    """Simulate the pass of a run whose tasks fluctuate as they did in the calibration, from its first task on.

    A slot's speed stays the same from beginning to end, although real tasks are faster beside idle cores.
    """
    rng = np.random.default_rng(seed)
    spread = math.sqrt(math.log1p(model.variation**2))
    mean = model.task_seconds + model.mean_image_seconds * images / partitions
    seconds = mean * rng.lognormal(-(spread**2) / 2, spread, partitions)
    speeds = cluster.slot_speeds(model)
    return simulate(
        seconds,
        speeds,
        ready=model.worker_seconds / speeds,
        failures=draw_failures(failure_rate, partitions, rng) if failure_rate else None,
        speculation=speculation,
    )


def draw_failures(rate: float, tasks: int, rng: np.random.Generator) -> np.ndarray:
    """How many attempts of each task fail, where each fails with the same probability: int64 `[tasks]`."""
    return rng.geometric(1 - rate, tasks) - 1


def _without_trouble(work: np.ndarray, pace: np.ndarray, begin: np.ndarray) -> Schedule:
    """The same with ends as the only events: a million tasks in a second."""
    free = [(float(time), slot) for slot, time in enumerate(begin)]
    heapq.heapify(free)
    divisors, slots, starts, ends = pace.tolist(), [], [], []
    for seconds in work.tolist():
        start, slot = free[0]
        end = start + seconds / divisors[slot]
        heapq.heapreplace(free, (end, slot))
        slots.append(slot)
        starts.append(start)
        ends.append(end)
    order = np.argsort(ends, kind="stable")
    tasks, begins = np.arange(work.size)[order], np.array(starts, float)[order]
    outcome = np.full(work.size, "ended")
    return Schedule(tasks, np.array(slots, int)[order], begins, np.array(ends, float)[order], outcome)


@dataclass
class _Stage:
    """The state of a stage: its waiting, running and ended tasks."""

    work: np.ndarray
    pace: np.ndarray
    failures: np.ndarray
    failure_point: float
    max_failures: int
    speculation: Speculation | None
    waiting: deque[int] = field(init=False)
    free: list[int] = field(default_factory=list)  # a heap, so that the first slot is taken first
    running: dict[int, dict[int, tuple[int, float]]] = field(default_factory=dict)  # task: {attempt: (slot, start)}
    failed: dict[int, int] = field(default_factory=dict)
    ended: int = 0
    times: list[float] | None = None  # of the tasks that have ended, sorted, once copies may be made
    rows: list[tuple[int, int, float, float]] = field(default_factory=list)
    outcomes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.waiting = deque(range(self.work.size))
        self.events: list[tuple[float, int, str, int, int]] = []  # time, number, kind, task or slot, attempt
        self.numbers = count()

    def run(self, begin: np.ndarray) -> Schedule:
        for slot, time in enumerate(begin):
            heapq.heappush(self.events, (float(time), next(self.numbers), "ready", slot, 0))
        aborted = False
        while self.events and self.ended < self.work.size and not aborted:
            now = self.events[0][0]
            while self.events and self.events[0][0] == now:
                _, _, kind, subject, attempt = heapq.heappop(self.events)
                if kind == "ready":
                    heapq.heappush(self.free, subject)
                elif kind in ("ended", "failed") and attempt in self.running.get(subject, {}):
                    aborted |= self._end(now, kind, subject, attempt)
            self._assign(now)
        columns = np.array(self.rows, float).reshape(-1, len(COLUMNS)).T
        return Schedule(
            columns[0].astype(int), columns[1].astype(int), columns[2], columns[3], np.array(self.outcomes), aborted
        )

    def _end(self, now: float, kind: str, task: int, attempt: int) -> bool:
        """Free the slot, and return whether the job is to end."""
        _, start = self._stop(now, kind, task, attempt)
        if kind == "ended":
            self.ended += 1
            for copy in list(self.running[task]):
                self._stop(now, "stopped", task, copy)
            if self.times is not None:
                bisect.insort(self.times, now - start)
        elif not self.running[task]:
            self.waiting.appendleft(task)
        self.failed[task] = self.failed.get(task, 0) + (kind == "failed")
        return self.failed[task] >= self.max_failures

    def _stop(self, now: float, outcome: str, task: int, attempt: int) -> tuple[int, float]:
        slot, start = self.running[task].pop(attempt)
        heapq.heappush(self.free, slot)
        self.rows.append((task, slot, start, now))
        self.outcomes.append(outcome)
        return slot, start

    def _assign(self, now: float) -> None:
        while self.free and self.waiting:
            self._start(now, self.waiting.popleft())
        if self.speculation and self.free and self.ended >= self.speculation.quantile * self.work.size:
            self._copy(now, self.speculation.multiplier)

    def _start(self, now: float, task: int) -> None:
        slot, number = heapq.heappop(self.free), next(self.numbers)
        attempts = self.running.setdefault(task, {})
        fails = self.failed.get(task, 0) + len(attempts) < self.failures[task]
        seconds = self.work[task] / self.pace[slot] * (self.failure_point if fails else 1.0)
        attempts[number] = (slot, now)
        heapq.heappush(self.events, (now + float(seconds), number, "failed" if fails else "ended", task, number))

    def _copy(self, now: float, multiplier: float) -> None:
        """Run copies of the tasks that take long, and look again when the next one does."""
        if self.times is None:
            ended = [
                end - start for (_, _, start, end), o in zip(self.rows, self.outcomes, strict=True) if o == "ended"
            ]
            self.times = sorted(ended)
        if not self.times:
            return
        most = multiplier * self.times[len(self.times) // 2]
        alone = [(next(iter(a.values()))[1], task) for task, a in self.running.items() if len(a) == 1]
        for start, task in sorted(alone):
            if not self.free:
                return
            if start + most > now:
                heapq.heappush(self.events, (start + most, next(self.numbers), "look", task, 0))
                return
            self._start(now, task)
