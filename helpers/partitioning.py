"""Divide images among tasks by their bytes, so that all tasks end at about the same time.

Pure: no Spark, no storage.
"""

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class PartitionPlan:
    """Which partition each image goes to."""

    assignment: np.ndarray  # int32 `[images]`, the partition of each
    files: np.ndarray  # int64 `[partitions]`, images in each
    bytes: np.ndarray  # int64 `[partitions]`, their bytes
    slots: int  # how many tasks run at once

    @property
    def partitions(self) -> int:
        """How many tasks there will be."""
        return len(self.files)

    @property
    def waves(self) -> int:
        """How many tasks the busiest slot runs."""
        return math.ceil(self.partitions / self.slots)

    def __str__(self) -> str:
        if not self.partitions:
            return "no images, no partitions"
        megabytes = self.bytes / 2**20
        return (
            f"{self.files.sum()} images ({megabytes.sum():.1f} MiB) in {self.partitions} partitions over {self.slots} "
            f"slots: {self.files.min()} to {self.files.max()} images and {megabytes.min():.2f} to "
            f"{megabytes.max():.2f} MiB each, {self.waves} a slot; a slot waits at the end for at most one partition, "
            f"{self.bytes.max() / max(1, self.bytes.sum()):.1%} of the bytes"
        )


def plan_partitions(
    lengths: Sequence[int],
    slots: int,
    *,
    target_bytes: int = 32 * 2**20,
    target_images: int = 1000,
    partitions: int | None = None,
    in_order: np.ndarray | None = None,
    at_least: int = 0,
) -> PartitionPlan:
    """Assign images to partitions, the longest first, each to the partition with the fewest bytes so far.

    Frames of videos come last and fill the partitions up one after the other, in their order: a partition has a few
    ranges of frames, because to decode one alone takes what lies before it. They cost their mean: how many bytes a
    frame has says more about what it shows than about the time it takes.

    The number of partitions is the smallest multiple of `slots` that keeps a partition within both targets, and never
    more than there are images. Longest-processing-time-first leaves the largest partition within 4/3 - 1/(3m) of the
    best possible (Graham, 1969, theorem 3). An image costs its bytes plus a fixed part for opening and inferring it,
    taken as the mean length, so that many tiny files do not gather in one partition.

    Args:
        lengths: bytes of each image; 0 for a file that will be an error row.
        slots: tasks that run at once.
        target_bytes: of a partition, about.
        target_images: likewise.
        partitions: their number, if it is not to be planned.
        in_order: bool `[images]`, which are frames; by default none.
        at_least: as many partitions, where they are planned, so that slots that come later find work.

    Raises:
        ValueError: a negative length, or slots, targets or partitions below 1.
    """
    sizes = np.asarray(lengths, dtype=np.int64).reshape(-1)
    if min(slots, target_bytes, target_images, 1 if partitions is None else partitions) < 1 or (sizes < 0).any():
        raise ValueError("lengths must not be negative; slots, targets and partitions must be at least 1")
    if not sizes.size:
        return PartitionPlan(np.zeros(0, np.int32), np.zeros(0, np.int64), np.zeros(0, np.int64), slots)
    needed = max(math.ceil(int(sizes.sum()) / target_bytes), math.ceil(sizes.size / target_images), at_least, 1)
    count = min(partitions or slots * math.ceil(needed / slots), sizes.size)
    costs = sizes + max(1, int(sizes.mean()))
    assignment = np.empty(sizes.size, np.int32)
    heap = [(0, partition) for partition in range(count)]
    apart = np.zeros(sizes.size, bool) if in_order is None else np.asarray(in_order, bool)
    whole = np.flatnonzero(~apart)
    # Images of one length are interchangeable, so the loads do not depend on the listing's order.
    for image in whole[np.argsort(-costs[whole], kind="stable")]:
        load, partition = heap[0]
        assignment[image] = partition
        heapq.heapreplace(heap, (load + int(costs[image]), partition))
    if apart.any():
        loads = np.array([load for load, _ in sorted(heap, key=lambda item: item[1])])
        assignment[apart] = _fill(loads, np.full(apart.sum(), costs[apart].mean()))
    files = np.bincount(assignment, minlength=count)
    return PartitionPlan(assignment, files, np.bincount(assignment, sizes, count).astype(np.int64), slots)


def _fill(loads: np.ndarray, costs: np.ndarray) -> np.ndarray:
    """Cut a sequence among partitions that are loaded already, so that all that take part end with the same load."""
    levels = np.sort(loads)
    # The level when the k least loaded take all that there is; the right k has the highest level below the next load.
    means = (np.cumsum(levels) + costs.sum()) / np.arange(1, len(levels) + 1)
    room = np.maximum(0, means.min() - loads)
    middles = np.cumsum(costs) - costs / 2
    return np.searchsorted(np.cumsum(room)[:-1], middles, side="right")
