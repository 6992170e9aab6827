"""The loop of every training: epochs of steps, from where the last checkpoint left it, watched by a dashboard."""

import time
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import torch.distributed as dist

from helpers.training.checkpoints import Checkpoints, Progress
from helpers.training.dashboards import Dashboard
from helpers.training.optimization import Optimization
from helpers.training.workers import RunSettings, Worker


class Run(Protocol):
    """What a training has of its own."""

    unit: str  # what it learns from: images, scenes
    optimization: Optimization

    def batches(self, epoch: int, first: int) -> Iterator[Any]:
        """This worker's share of each batch of an epoch, from a step on."""

    def step(self, batch: Any) -> dict[str, float]:
        """Learn from a batch; measures by name, those named `...loss` are averaged over the epoch."""

    def evaluate(self, steps: int) -> dict[str, float]:
        """Measure the network after so many steps, with the other processes."""


def run_epochs(
    run: Run,
    settings: RunSettings,
    worker: Worker,
    progress: Progress,
    checkpoints: Checkpoints | None,
    dashboard: Dashboard | None,
) -> Iterator[dict[str, float]]:
    """Train until the last epoch; yields what each came to, once its checkpoint is written.

    Args:
        run: what to train.
        settings: how long, and how often to write a checkpoint.
        worker: this process.
        progress: where to begin; is kept up to date.
        checkpoints: where to write them; None: nowhere.
        dashboard: of rank 0.

    Yields:
        The mean of each loss as `train_NAME`, `UNIT_per_second`, and what `run.evaluate` gave.
    """
    rate = f"{run.unit}_per_second"
    while progress.epoch < settings.epochs:
        seconds, waited, first = 0.0, 0.0, progress.batches
        started = time.perf_counter()
        for batch in run.batches(progress.epoch, first):
            measures = run.step(batch)
            took = time.perf_counter() - started
            seconds, waited = seconds + took, waited + run.optimization.waited
            measures[rate] = settings.batch_size / took
            progress.add_step(measures)
            if dashboard:
                dashboard.log_step(progress.steps, measures)
            if settings.checkpoint_steps and progress.steps % settings.checkpoint_steps == 0:
                _save(checkpoints, progress, dashboard)
            started = time.perf_counter()
        share = (progress.batches - first) * settings.batch_size / worker.processes
        _log_ranks(worker, progress.steps, dashboard, share, seconds, waited)
        evaluation = run.evaluate(progress.steps)
        if dashboard:
            dashboard.log_epoch(progress.steps, evaluation)
        progress.add_epoch({**_summarise(progress, rate), **evaluation})
        _save(checkpoints, progress, dashboard)
        yield progress.epochs[-1]


def _summarise(progress: Progress, rate: str) -> dict[str, float]:
    measured = progress.measured
    means = {f"train_{name}": float(np.mean([m[name] for m in measured])) for name in measured[0] if "loss" in name}
    # Every step has the same number of images, so the mean of the rates is the harmonic one.
    return {**means, rate: float(1 / np.mean([1 / m[rate] for m in measured]))}


def _log_ranks(
    worker: Worker, steps: int, dashboard: Dashboard | None, share: float, seconds: float, waited: float
) -> None:
    own = (share / (seconds - waited), waited / seconds) if seconds else (0.0, 0.0)
    ranks = [own] * worker.processes
    if worker.processes > 1:
        dist.all_gather_object(ranks, own)
    if dashboard and share:
        dashboard.log_ranks(steps, ranks)


def _save(checkpoints: Checkpoints | None, progress: Progress, dashboard: Dashboard | None) -> None:
    # Events that a killed process had in memory would be missing before the step that its successor goes on from.
    if dashboard:
        dashboard.publish()
    if checkpoints:
        checkpoints.save(progress)
