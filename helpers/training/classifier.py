"""Training the classifier, on one process or on many; see `workers` and `distributed`."""

import dataclasses
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass
from torch import nn

from helpers.data import fashion_mnist
from helpers.models.fashion_cnn import FashionCNN, compute_logits, normalise, predict
from helpers.training.checkpoints import Checkpoints
from helpers.training.dashboards import TrainingDashboard
from helpers.training.datasets import Batch, LabelledImages, MappedImages, open_images, read_batches
from helpers.training.loop import run_epochs
from helpers.training.optimization import Optimization
from helpers.training.workers import (
    PROGRESS,
    Positive,
    RunSettings,
    Worker,
    average_buffers,
    check_batch,
    choose_precision,
    join_workers,
    save,
)


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class TrainingSettings(RunSettings):
    """Everything that decides the outcome of a training run."""

    channels: tuple[Positive, Positive] = (16, 32)
    training_set: str | None = None  # a folder with labels, or shards: see `datasets.open_images`; None: Fashion-MNIST
    train_images: Positive | None = None  # from the first; None: all
    test_images: Positive | None = None  # from the first; None: all 10,000


def train(settings: TrainingSettings, data_root: str, run_dir: str) -> dict[str, Any]:
    """Train and evaluate; on its own, or in each process that torchrun or TorchDistributor started.

    Rank 0 writes to the run directory: TensorBoard events, `checkpoint.pt` (a state_dict) and `result.json`; and
    until then `checkpoints`, from which a second call goes on where the first was interrupted.

    Args:
        settings: what to do.
        data_root: where Fashion-MNIST is, or will be put.
        run_dir: a folder for this run alone; what a finished run left in it is replaced.

    Returns:
        What `result.json` holds: the test accuracy (0 to 1) and loss, those of each epoch, images/s, settings.

    Raises:
        HostError: a GPU is asked for and there is none.
        TrainingError: the batch does not divide over the processes, there is less than one batch, or an unfinished run
            with other settings is there.
        DataError: there is no data set.
    """
    started = time.perf_counter()
    with join_workers(settings) as worker:
        fashion_mnist.download(data_root)
        training_set = open_images(settings, settings.training_set, data_root, settings.train_images)
        test_set = MappedImages(*fashion_mnist.map_files(data_root, train=False), settings.test_images)
        check_batch(settings, worker, len(training_set))
        torch.manual_seed(settings.seed)
        model = FashionCNN(settings.channels).to(worker.device).to(memory_format=torch.channels_last)
        run = _Run(settings, worker, model, training_set, test_set)
        checkpoints = Checkpoints(settings, worker, run_dir, {"model": model, **run.optimization.parts})
        progress = checkpoints.restore()
        dashboard = TrainingDashboard(run_dir, progress.steps) if worker.rank == 0 else None
        for measures in run_epochs(run, settings, worker, progress, checkpoints, dashboard):
            if dashboard:
                _print_progress(progress.epoch, settings.epochs, measures)
        seconds = time.perf_counter() - started
        result = _summarise(settings, worker, model, progress.epochs, seconds) | {"resumed_at": progress.resumed_at}
        if dashboard:
            probabilities = predict(model, torch.from_numpy(np.array(test_set.images)).to(worker.device))
            dashboard.log_final(model, test_set.images, test_set.labels, probabilities, _hyperparameters(settings))
            dashboard.close()
            save(model, result, run_dir)
            checkpoints.clear()
        return result


class _Run:
    """What the training of a classifier has of its own; see `loop.Run`."""

    unit = "images"

    def __init__(
        self, settings: TrainingSettings, worker: Worker, model: nn.Module, training_set: LabelledImages,
        test_set: MappedImages,
    ):  # fmt: skip
        self.settings, self.worker, self.model = settings, worker, model
        self.training_set, self.test_set = training_set, test_set
        optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay)
        total_steps = settings.epochs * (len(training_set) // settings.batch_size)
        self.optimization = Optimization(settings, worker, model, optimizer, total_steps)

    def batches(self, epoch: int, first: int) -> Iterator[Batch]:
        indices = self.training_set.batches(self.settings, self.worker, epoch, first)
        return read_batches(self.training_set, indices, self.settings, self.worker)

    def step(self, batch: Batch) -> dict[str, float]:
        images, labels = (part.to(self.worker.device, non_blocking=True) for part in batch)
        logits = self.optimization.forward(normalise(images))
        loss = nn.functional.cross_entropy(logits.float(), labels)
        descent = self.optimization.descend(loss)
        correct = (logits.argmax(dim=1) == labels).float().mean()
        return {"loss": loss.item(), "accuracy": correct.item(), **descent}

    def evaluate(self, steps: int) -> dict[str, float]:
        return _evaluate(self.worker, self.model, self.test_set)


def _evaluate(worker: Worker, model: nn.Module, test_set: MappedImages) -> dict[str, float]:
    share = slice(worker.rank, None, worker.processes)
    labels = torch.from_numpy(test_set.labels).to(worker.device)
    average_buffers(worker, model)
    own = compute_logits(model, torch.from_numpy(np.array(test_set.images[share])).to(worker.device))
    # Zeros elsewhere, so that the sum over the workers is everyone's logits in order.
    logits = own.new_zeros((len(test_set), own.shape[1]))
    logits[share] = own
    if worker.processes > 1:
        dist.all_reduce(logits)
    loss = nn.functional.cross_entropy(logits, labels).item()
    return {"test_loss": loss, "test_accuracy": (logits.argmax(dim=1) == labels).float().mean().item()}


def _print_progress(epoch: int, epochs: int, measures: dict[str, float]) -> None:
    print(
        f"{PROGRESS}{epoch}/{epochs}: training loss {measures['train_loss']:.3f}, "
        f"test accuracy {measures['test_accuracy']:.4f}, {measures['images_per_second']:,.0f} images/s",
        flush=True,
    )


def _summarise(
    settings: TrainingSettings,
    worker: Worker,
    model: nn.Module,
    epochs: list[dict[str, float]],
    seconds: float,
) -> dict[str, Any]:
    return {
        "test_accuracy": epochs[-1]["test_accuracy"],
        "test_loss": epochs[-1]["test_loss"],
        "images_per_second": float(np.median([epoch["images_per_second"] for epoch in epochs])),
        "seconds": seconds,
        "processes": worker.processes,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "precision": choose_precision(settings),
        "epochs": epochs,
        "settings": dataclasses.asdict(settings),
    }


def _hyperparameters(settings: TrainingSettings) -> dict[str, float | str]:
    # TensorBoard's table takes numbers and text.
    values = dataclasses.asdict(settings) | {"channels": str(settings.channels)}
    return {name: value for name, value in values.items() if isinstance(value, int | float | str)}
