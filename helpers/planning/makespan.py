"""When the last of many about equal tasks ends, in closed form.

A simulation of the stage, event by event, gives the same (`tests/test_planner.py`). Pure: numpy only.
"""

import heapq
import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np


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
        last: seconds of the tasks of a last wave that leaves slots idle; None for no others. It counts where all slots
            are equal, because otherwise there are no waves.
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
