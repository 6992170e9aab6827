"""Training a classifier, on one process or on many; see `workers` and `distributed`."""

import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Annotated, Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import nn

from helpers.data import fashion_mnist
from helpers.errors import TrainingError
from helpers.models.architectures import get_architecture
from helpers.models.fashion_cnn import compute_logits, normalise
from helpers.models.fashion_resnet import FashionResNet
from helpers.training.augmentation import augment
from helpers.training.checkpoints import Checkpoints, Progress
from helpers.training.dashboards import TrainingDashboard
from helpers.training.datasets import Batch, LabelledImages, MappedImages, open_images, read_batches
from helpers.training.loop import run_epochs
from helpers.training.muon import Muon
from helpers.training.optimization import Optimization
from helpers.training.projector import log_embedding
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
    sum_cpu_seconds,
)

Report = Callable[[int, float], None]  # epoch from 1, accuracy

HELD_OUT_SEED = 1  # which images are held out stays the same, whatever the seed of a training


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class TrainingSettings(RunSettings):
    """Everything that decides the outcome of a training run; the defaults are those of notebook 01."""

    architecture: Literal["fashion_cnn", "fashion_resnet"] = "fashion_cnn"
    width: Positive | None = None  # channels of the first convolution, which the others go by; None: the network's own
    optimizer: Literal["adamw", "muon"] = "adamw"
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    mirror: bool = False  # half of the images
    shift: Annotated[int, Field(ge=0, lt=28)] = 0  # pixels, up to, either way and in both directions
    cutout: Annotated[int, Field(ge=0, le=28)] = 0  # pixels, side of a square that is blackened
    training_set: str | None = None  # a folder with labels, or shards: see `datasets.open_images`; None: Fashion-MNIST
    train_images: Positive | None = None  # from the first; None: all
    held_out: Annotated[int, Field(ge=0, lt=60_000)] = 0  # training images, to evaluate on instead of the test images
    test_images: Positive | None = None  # from the first; None: all 10,000
    evaluate_every: Positive = 1  # epochs; after the last in any case


def train(
    settings: TrainingSettings, data_root: str, run_dir: str | None, report: Report | None = None
) -> dict[str, Any]:
    """Train and evaluate; on its own, or in each process that torchrun or TorchDistributor started.

    Rank 0 writes to the run directory: TensorBoard events, `checkpoint.pt` (a state_dict) and `result.json`; and
    until then `checkpoints`, from which a second call goes on where the first was interrupted.

    Args:
        settings: what to do.
        data_root: where Fashion-MNIST is, or will be put.
        run_dir: a folder for this run alone; what a finished run left in it is replaced. None: leave nothing.
        report: called after each evaluation; what it raises ends the training.

    Returns:
        What `result.json` holds: accuracy (0 to 1) and loss as `test_NAME`, of held-out images as `val_NAME`, those of
        each epoch, images/s, CPU seconds of all processes together, settings.

    Raises:
        HostError: a GPU is asked for and there is none.
        TrainingError: the batch does not divide over the processes, there is less than one batch, images of a stored
            training set are to be held out, or an unfinished run with other settings is there.
        DataError: there is no data set.
    """
    started, cpu_started = time.perf_counter(), time.process_time()
    with join_workers(settings) as worker:
        fashion_mnist.download(data_root)
        training_set, evaluated = open_sets(settings, data_root)
        check_batch(settings, worker, len(training_set))
        run = _Run(settings, worker, training_set, evaluated)
        model = run.model
        checkpoints = Checkpoints(settings, worker, run_dir, run.parts) if run_dir else None
        progress = checkpoints.restore() if checkpoints else Progress()
        dashboard = TrainingDashboard(run_dir, progress.steps) if run_dir and worker.rank == 0 else None
        for measures in run_epochs(run, settings, worker, progress, checkpoints, dashboard):
            if dashboard:
                _print_progress(progress.epoch, settings.epochs, measures)
            if report and f"{run.kind}_accuracy" in measures:
                report(progress.epoch, measures[f"{run.kind}_accuracy"])
        if not len(run.logits):  # interrupted after its last epoch
            run.evaluate(progress.steps)
        result = _summarise(run, progress, time.perf_counter() - started, sum_cpu_seconds(worker, cpu_started))
        if run_dir and dashboard and checkpoints:
            images, labels = np.array(evaluated.images), evaluated.labels
            probabilities = run.logits.softmax(dim=1).cpu().numpy()
            dashboard.log_final(model, images, labels, probabilities, _hyperparameters(settings), run.kind)
            if isinstance(model, FashionResNet):  # the last layer of the other has more channels than a projector takes
                log_embedding(dashboard, model, images, labels)
            dashboard.close()
            save(model, result, run_dir)
            checkpoints.clear()
        return result


def open_sets(settings: TrainingSettings, data_root: str) -> tuple[LabelledImages, MappedImages]:
    """The images to train on, and those to evaluate on, which are test images or held-out training images.

    Raises:
        TrainingError: images of a stored training set are to be held out.
        DataError: there is no data set.
    """
    if not settings.held_out:
        training_set = open_images(settings, settings.training_set, data_root, settings.train_images)
        return training_set, MappedImages(*fashion_mnist.map_files(data_root, train=False), settings.test_images)
    if settings.training_set:
        raise TrainingError(f"held_out is for Fashion-MNIST alone: hold images out of {settings.training_set} itself")
    images, labels = fashion_mnist.map_files(data_root, train=True)
    order = np.random.default_rng(HELD_OUT_SEED).permutation(len(labels))
    held_out, rest = order[: settings.held_out], np.sort(order[settings.held_out :])[: settings.train_images]
    return MappedImages(images[rest], labels[rest]), MappedImages(images[held_out], labels[held_out])


class _Run:
    """What the training of a classifier has of its own; see `loop.Run`."""

    unit = "images"

    def __init__(
        self, settings: TrainingSettings, worker: Worker, training_set: LabelledImages, evaluated: MappedImages
    ):
        self.settings, self.worker = settings, worker
        self.training_set, self.evaluated = training_set, evaluated
        self.kind = "val" if settings.held_out else "test"
        architecture = get_architecture(settings.architecture)
        torch.manual_seed(settings.seed)
        width = {"width": settings.width} if settings.width else {}
        self.model = architecture.build(**width).to(worker.device).to(memory_format=torch.channels_last)
        self.heads = architecture.heads(self.model)
        torch.manual_seed(settings.seed * worker.processes + worker.rank)  # each process augments in its own way
        self.steps_an_epoch = len(training_set) // settings.batch_size
        total_steps = settings.epochs * self.steps_an_epoch
        kind = Muon if settings.optimizer == "muon" else torch.optim.AdamW
        optimizer = kind(self.model.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay)
        self.optimization = Optimization(settings, worker, self.model, optimizer, total_steps)
        self.logits = torch.zeros(0)  # of the last evaluation
        self.parts = {"model": self.model, **self.optimization.parts}

    def batches(self, epoch: int, first: int) -> Iterator[Batch]:
        indices = self.training_set.batches(self.settings, self.worker, epoch, first)
        return read_batches(self.training_set, indices, self.settings, self.worker)

    def step(self, batch: Batch) -> dict[str, float]:
        settings = self.settings
        images, labels = (part.to(self.worker.device, non_blocking=True) for part in batch)
        epoch = self.optimization.schedule.last_epoch // self.steps_an_epoch
        images = augment(images, epoch, settings.mirror, settings.shift, settings.cutout)
        logits = self.optimization.forward(normalise(images)).float()
        loss = nn.functional.cross_entropy(logits, labels, label_smoothing=settings.label_smoothing)
        descent = self.optimization.descend(loss)
        correct = (logits.argmax(dim=1) == labels).float().mean()
        return {"loss": loss.item(), "accuracy": correct.item(), **descent}

    def evaluate(self, steps: int) -> dict[str, float]:
        epoch = steps // self.steps_an_epoch
        if epoch % self.settings.evaluate_every and epoch < self.settings.epochs:
            return {}
        worker, share = self.worker, slice(self.worker.rank, None, self.worker.processes)
        labels = torch.from_numpy(self.evaluated.labels).to(worker.device)
        average_buffers(worker, self.model)
        own = compute_logits(self.heads, torch.from_numpy(np.array(self.evaluated.images[share])).to(worker.device))
        # Zeros elsewhere, so that the sum over the workers is everyone's logits in order.
        logits = own.new_zeros((len(self.evaluated), own.shape[1]))
        logits[share] = own
        if worker.processes > 1:
            dist.all_reduce(logits)
        self.logits = logits
        loss = nn.functional.cross_entropy(logits, labels).item()
        accuracy = (logits.argmax(dim=1) == labels).float().mean().item()
        return {f"{self.kind}_loss": loss, f"{self.kind}_accuracy": accuracy}


def _print_progress(epoch: int, epochs: int, measures: dict[str, float]) -> None:
    found = [(name.replace("_", " "), measures.get(name)) for name in ("test_accuracy", "val_accuracy")]
    accuracy = "".join(f"{name} {value:.4f}, " for name, value in found if value is not None)
    print(
        f"{PROGRESS}{epoch}/{epochs}: training loss {measures['train_loss']:.3f}, "
        f"{accuracy}{measures['images_per_second']:,.0f} images/s",
        flush=True,
    )


def _summarise(run: _Run, progress: Progress, seconds: float, cpu_seconds: float) -> dict[str, Any]:
    epochs = progress.epochs
    return {
        **{name: value for name, value in epochs[-1].items() if name.startswith(f"{run.kind}_")},
        "images_per_second": float(np.median([epoch["images_per_second"] for epoch in epochs])),
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "processes": run.worker.processes,
        "parameters": sum(parameter.numel() for parameter in run.model.parameters()),
        "precision": choose_precision(run.settings),
        "resumed_at": progress.resumed_at,
        "epochs": epochs,
        "settings": dataclasses.asdict(run.settings),
    }


def _hyperparameters(settings: TrainingSettings) -> dict[str, float | str]:
    # TensorBoard's table takes numbers and text.
    return {name: value for name, value in dataclasses.asdict(settings).items() if isinstance(value, int | float | str)}
