"""Training the classifier, on one process or on many; see `workers` and `distributed`."""

import dataclasses
import time
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from helpers.data import fashion_mnist
from helpers.models.fashion_cnn import FashionCNN, compute_logits, normalise, predict
from helpers.training.dashboards import TrainingDashboard
from helpers.training.workers import (
    PROGRESS,
    Positive,
    RunSettings,
    Worker,
    average_buffers,
    batches_of,
    check_batch,
    computes_bf16,
    join_workers,
    make_schedule,
    save,
)


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class TrainingSettings(RunSettings):
    """Everything that decides the outcome of a training run."""

    channels: tuple[Positive, Positive] = (16, 32)
    train_images: Positive | None = None  # from the first; None: all 60,000
    test_images: Positive | None = None  # from the first; None: all 10,000


def train(settings: TrainingSettings, data_root: str, run_dir: str) -> dict[str, Any]:
    """Train and evaluate; on its own, or in each process that torchrun or TorchDistributor started.

    Rank 0 writes to the run directory: TensorBoard events, `checkpoint.pt` (a state_dict) and `result.json`.

    Args:
        settings: what to do.
        data_root: where Fashion-MNIST is, or will be put.
        run_dir: a folder for this run alone; earlier events in it are replaced.

    Returns:
        What `result.json` holds: the test accuracy (0 to 1) and loss, those of each epoch, images/s, settings.

    Raises:
        HostError: a GPU is asked for and there is none.
        TrainingError: the batch does not divide over the processes, or there is less than one batch.
        DataError: there is no data set.
    """
    started = time.perf_counter()
    with join_workers(settings) as worker:
        fashion_mnist.download(data_root)
        training_set = _load_tensors(data_root, True, settings.train_images, worker.device)
        test_set = _load_tensors(data_root, False, settings.test_images, worker.device)
        check_batch(settings, worker, len(training_set[0]))
        torch.manual_seed(settings.seed)
        model = FashionCNN(settings.channels).to(worker.device).to(memory_format=torch.channels_last)
        dashboard = TrainingDashboard(run_dir) if worker.rank == 0 else None
        epochs = _train_epochs(settings, worker, model, training_set, test_set, dashboard)
        result = _summarise(settings, worker, model, epochs, time.perf_counter() - started)
        if dashboard:
            probabilities = predict(model, test_set[0])
            dashboard.log_final(
                model,
                test_set[0].cpu().numpy(),
                test_set[1].cpu().numpy(),
                probabilities,
                _hyperparameters(settings),
            )
            dashboard.close()
            save(model, result, run_dir)
        return result


def _load_tensors(root: str, train: bool, count: int | None, device: torch.device) -> tuple[torch.Tensor, ...]:
    # The whole set is 47 MB as bytes, so it stays in memory and no loader process is needed.
    images, labels = fashion_mnist.load(root, train)
    return torch.as_tensor(images[:count]).to(device), torch.as_tensor(labels[:count]).to(device)


def _train_epochs(
    settings: TrainingSettings,
    worker: Worker,
    model: nn.Module,
    training_set: tuple[torch.Tensor, ...],
    test_set: tuple[torch.Tensor, ...],
    dashboard: TrainingDashboard | None,
) -> list[dict[str, float]]:
    steps = len(training_set[0]) // settings.batch_size
    step_function = _Step(settings, worker, model, steps * settings.epochs)
    epochs = []
    for epoch in range(settings.epochs):
        started = time.perf_counter()
        losses = []
        for indices in batches_of(settings, worker, len(training_set[0]), epoch):
            measures = step_function(training_set[0][indices], training_set[1][indices])
            losses.append(measures["loss"])
            if dashboard:
                dashboard.log_step(step_function.steps_done, measures)
        rate = steps * settings.batch_size / (time.perf_counter() - started)
        test = _evaluate(worker, model, *test_set)
        epochs.append({"train_loss": float(np.mean(losses)), **test, "images_per_second": rate})
        if dashboard:
            dashboard.log_epoch(step_function.steps_done, test)
            _print_progress(epoch + 1, settings.epochs, epochs[-1])
    return epochs


class _Step:
    """One optimisation step after another, on this worker's share of each batch."""

    def __init__(self, settings: TrainingSettings, worker: Worker, model: nn.Module, total_steps: int):
        self.settings = settings
        self.steps_done = 0
        self.bf16 = computes_bf16(settings)
        # Batch norm's statistics differ between processes until `_evaluate` averages them, so they need no
        # broadcast at every step.
        self.model = DistributedDataParallel(model, forward_sync_buffers=False) if worker.processes > 1 else model
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay
        )
        self.schedule = make_schedule(settings, self.optimizer, total_steps)

    def __call__(self, images: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
        started = time.perf_counter()
        learning_rate = self.schedule.get_last_lr()[0]
        self.model.train()
        with torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=self.bf16):
            logits = self.model(normalise(images))
        loss = nn.functional.cross_entropy(logits.float(), labels)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        self.steps_done += 1
        correct = (logits.argmax(dim=1) == labels).float().mean()
        return {
            "loss": loss.item(),
            "accuracy": correct.item(),
            "learning_rate": learning_rate,
            "images_per_second": self.settings.batch_size / (time.perf_counter() - started),
        }


def _evaluate(worker: Worker, model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    share = slice(worker.rank, None, worker.processes)
    average_buffers(worker, model)
    own = compute_logits(model, images[share])
    # Zeros elsewhere, so that the sum over the workers is everyone's logits in order.
    logits = own.new_zeros((len(images), own.shape[1]))
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
        "bf16": computes_bf16(settings),
        "epochs": epochs,
        "settings": dataclasses.asdict(settings),
    }


def _hyperparameters(settings: TrainingSettings) -> dict[str, float | str]:
    # TensorBoard's table takes numbers and text.
    values = dataclasses.asdict(settings) | {"channels": str(settings.channels)}
    return {name: value for name, value in values.items() if value is not None}
