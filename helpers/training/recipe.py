"""A recipe for Fashion-MNIST that a CPU affords in minutes: network, augmentation, schedule and choice of images.

What it reaches is measured by `tests/bench/recipe.py`. Optimiser, augmentation, reduced images and skipping were
compared on 10,000 held-out training images, which `validation_images` leaves out; the test images had no say in it.
"""

import dataclasses
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import torch
import torch.distributed as dist
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from helpers.data import fashion_mnist
from helpers.models.fashion_cnn import compute_logits, normalise
from helpers.models.fashion_resnet import WIDTH, FashionResNet, MirrorAveraged
from helpers.training.augmentation import augment
from helpers.training.dashboards import Dashboard
from helpers.training.projector import log_embedding
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
    save,
)

if TYPE_CHECKING:
    from optuna import Trial

Tensors = tuple[torch.Tensor, torch.Tensor]
Report = Callable[[int, float], None]  # epoch from 1, accuracy on the held-out images

HELD_OUT_SEED = 1  # which images are held out stays the same, whatever the seed of a training


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class RecipeSettings(RunSettings):
    """Everything that decides the outcome; the defaults are the recipe.

    The learning rate rises and falls in lines whatever `schedule` says, and a training this short keeps no checkpoints.
    """

    epochs: Positive = 20
    learning_rate: Annotated[float, Field(gt=0)] = 0.2  # of the schedule's top, for SGD with Nesterov momentum
    weight_decay: Annotated[float, Field(ge=0)] = 5e-4
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    warm_up: Annotated[float, Field(gt=0, lt=1)] = 0.15  # share of all steps; then a line down to nothing
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.1
    width: Positive = WIDTH  # channels at full resolution; four and eight times as many at the lower ones
    mirror: bool = True  # half of the images
    shift: Annotated[int, Field(ge=0, lt=28)] = 1  # pixels, up to, either way and in both directions
    cutout: Annotated[int, Field(ge=0, le=28)] = 0  # pixels, side of a square that is blackened
    small: Annotated[float, Field(ge=0, le=1)] = 0.5  # share of the epochs that train at `small_side`, from the first
    small_side: Annotated[int, Field(ge=8, le=28)] = 20  # pixels to which those images are reduced
    skip: Annotated[float, Field(ge=0, lt=1)] = 0.5  # share of the images that are known well which an epoch leaves out
    whole_epochs: Annotated[int, Field(ge=0)] = 2  # at the end, which leave nothing out
    train_images: Positive | None = None  # from the first; None: all that are not held out
    validation_images: Annotated[int, Field(ge=0, lt=60_000)] = 0  # held out of the training images


def train(
    settings: RecipeSettings, data_root: str, run_dir: str | None, report: Report | None = None
) -> dict[str, Any]:
    """Train, alone or as one of the processes that torchrun or TorchDistributor started, and evaluate at the end.

    Rank 0 writes to the run directory: TensorBoard's events with the projector, `checkpoint.pt` and `result.json`.

    Args:
        settings: what to do. With held-out images those are evaluated after each epoch, and the test images never.
        data_root: where Fashion-MNIST is, or will be put.
        run_dir: a folder for this run alone; None: leave nothing.
        report: called after each epoch where images are held out; what it raises ends the training.

    Returns:
        What `result.json` holds: the accuracy (0 to 1, of logits averaged over mirror images) as `val_accuracy` or
        `test_accuracy`, the losses of each epoch, `cpu_minutes` of this process, settings.

    Raises:
        HostError: a GPU is asked for and there is none.
        TrainingError: the batch does not divide over the processes, or there is less than one batch.
        DataError: there is no data set.
    """
    started = time.process_time()
    with join_workers(settings) as worker:
        fashion_mnist.download(data_root)
        training_set, held_out = _load(settings, data_root, worker.device)
        check_batch(settings, worker, len(training_set[0]))
        torch.manual_seed(settings.seed)
        model = FashionResNet(settings.width).to(worker.device).to(memory_format=torch.channels_last)
        dashboard = Dashboard(run_dir) if run_dir and worker.rank == 0 else None
        epochs = _train_epochs(settings, worker, model, training_set, held_out, dashboard, report)
        result: dict[str, Any] = {"parameters": sum(parameter.numel() for parameter in model.parameters())}
        if held_out:
            result["val_accuracy"] = epochs[-1]["val_accuracy"]
        elif worker.rank == 0:
            test_set = _tensors(fashion_mnist.load(data_root, train=False), worker.device)
            result["test_accuracy"] = measure_accuracy(model, *test_set)
        result |= {"cpu_minutes": (time.process_time() - started) / 60, "processes": worker.processes}
        result |= {"epochs": epochs, "settings": dataclasses.asdict(settings)}
        if dashboard and run_dir:
            log_embedding(dashboard, model, *fashion_mnist.load(data_root, train=False))
            dashboard.close()
            save(model, result, run_dir)
        return result


def measure_accuracy(model: nn.Module, images: torch.Tensor | np.ndarray, labels: torch.Tensor | np.ndarray) -> float:
    """Share of uint8 images `[N, 28, 28]` named rightly, in full precision and averaged over mirror images."""
    logits = compute_logits(MirrorAveraged(model), torch.as_tensor(images))
    return (logits.argmax(dim=1) == torch.as_tensor(labels)).float().mean().item()


def make_objective(settings: RecipeSettings, data_root: str) -> Callable[["Trial"], float]:
    """An objective for `search`, whose parameters are names of settings: the accuracy on held-out images."""

    def objective(trial: "Trial") -> float:
        from optuna import TrialPruned

        def report(epoch: int, accuracy: float) -> None:
            trial.report(accuracy, epoch)
            if trial.should_prune():
                raise TrialPruned

        return train(dataclasses.replace(settings, **trial.params), data_root, None, report)["val_accuracy"]

    return objective


def _load(settings: RecipeSettings, data_root: str, device: torch.device) -> tuple[Tensors, Tensors | None]:
    images, labels = fashion_mnist.load(data_root, train=True)
    order = np.random.default_rng(HELD_OUT_SEED).permutation(len(images))
    held_out, rest = order[: settings.validation_images], np.sort(order[settings.validation_images :])
    training_set = _tensors((images[rest][: settings.train_images], labels[rest][: settings.train_images]), device)
    return training_set, _tensors((images[held_out], labels[held_out]), device) if len(held_out) else None


def _tensors(arrays: tuple[np.ndarray, np.ndarray], device: torch.device) -> Tensors:
    return torch.as_tensor(arrays[0]).to(device), torch.as_tensor(arrays[1]).to(device)


def _train_epochs(
    settings: RecipeSettings,
    worker: Worker,
    model: nn.Module,
    training_set: Tensors,
    held_out: Tensors | None,
    dashboard: Dashboard | None,
    report: Report | None,
) -> list[dict[str, float]]:
    images, labels = training_set
    selection = _Selection(settings, worker, len(images))
    step_function = _Step(settings, worker, model)
    epochs: list[dict[str, float]] = []
    for epoch in range(settings.epochs):
        started, sums = time.perf_counter(), []
        chosen, weights = selection.choose(epoch)
        steps = len(chosen) // settings.batch_size
        for step, numbers in enumerate(batches_of(settings, worker, len(chosen), epoch)):
            indices = chosen[numbers]
            losses, measures = step_function(
                images[indices], labels[indices], weights[indices], (epoch + (step + 1) / steps) / settings.epochs
            )
            selection.record(indices, losses)
            sums.append(measures["loss"])
            if dashboard:
                dashboard.log_step(step_function.steps_done, measures)
        selection.exchange()
        rate = steps * settings.batch_size / (time.perf_counter() - started)
        average_buffers(worker, model)
        epochs.append({"train_loss": float(np.mean(sums)), "images": len(chosen), "images_per_second": rate})
        if held_out:
            epochs[-1]["val_accuracy"] = measure_accuracy(model, *held_out)
            if dashboard:
                dashboard.log_epoch(step_function.steps_done, {"val_accuracy": epochs[-1]["val_accuracy"]})
            if report:
                report(epoch + 1, epochs[-1]["val_accuracy"])
        if dashboard:
            told = ", ".join(f"{name} {value:,.4g}" for name, value in epochs[-1].items()).replace("_", " ")
            print(f"{PROGRESS}{epoch + 1}/{settings.epochs}: {told}", flush=True)
    return epochs


class _Selection:
    """Which images an epoch trains on: not all of those that are known well (Qin et al., arXiv:2303.04947, section 3).

    Of the images whose last loss is below the mean a share is left out, and the others of them count for those too.
    """

    def __init__(self, settings: RecipeSettings, worker: Worker, images: int):
        self.settings, self.worker = settings, worker
        self.losses = torch.full((images,), torch.nan, device=worker.device)  # not a number: never trained on
        self.seen = torch.zeros(images, device=worker.device)  # of this epoch and this worker; 0: not seen

    def choose(self, epoch: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Indices, int64 `[chosen]`, and the weight of every image in the loss, float32 `[N]`."""
        # All workers must choose alike.
        generator = torch.Generator().manual_seed(self.settings.seed * self.settings.epochs + epoch)
        known = self.losses < self.losses.nanmean()
        if epoch >= self.settings.epochs - self.settings.whole_epochs:
            known = torch.zeros_like(known)
        left_out = known & (torch.rand(len(known), generator=generator) < self.settings.skip).to(known.device)
        if len(known) - left_out.sum() < self.settings.batch_size:
            known, left_out = torch.zeros_like(known), torch.zeros_like(known)
        return (~left_out).nonzero().squeeze(1), 1 + known * (1 / (1 - self.settings.skip) - 1)

    def record(self, indices: torch.Tensor, losses: torch.Tensor) -> None:
        """Remember the losses of a batch."""
        self.seen[indices] = losses

    def exchange(self) -> None:
        """Tell all workers what each has recorded in this epoch; of an image that none saw the old loss stays."""
        if self.worker.processes > 1:
            dist.all_reduce(self.seen)
        self.losses = torch.where(self.seen > 0, self.seen, self.losses)
        self.seen = torch.zeros_like(self.seen)


class _Step:
    """One optimisation step after another, on this worker's share of each batch."""

    def __init__(self, settings: RecipeSettings, worker: Worker, model: nn.Module):
        self.settings = settings
        self.steps_done = 0
        self.bf16 = computes_bf16(settings)
        self.generator = torch.Generator().manual_seed(settings.seed * worker.processes + worker.rank)
        self.model = DistributedDataParallel(model, forward_sync_buffers=False) if worker.processes > 1 else model
        self.optimizer = torch.optim.SGD(
            model.parameters(),
            settings.learning_rate,
            settings.momentum,
            nesterov=settings.momentum > 0,
            weight_decay=settings.weight_decay,
        )

    def __call__(
        self, images: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor, progress: float
    ) -> tuple[torch.Tensor, dict[str, float]]:
        """Take a step at a place of the schedule, 0 to 1; returns each image's loss and what the dashboard shows."""
        started = time.perf_counter()
        inputs = self._prepare(images, small=progress <= self.settings.small)
        self.model.train()
        with torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=self.bf16):
            logits = self.model(inputs)
        losses = nn.functional.cross_entropy(
            logits.float(), labels, label_smoothing=self.settings.label_smoothing, reduction="none"
        )
        self.optimizer.zero_grad()
        (losses * weights).mean().backward()
        gradient_norm = nn.utils.get_total_norm(p.grad for p in self.model.parameters() if p.grad is not None)
        rate = self._set_learning_rate(progress)
        self.optimizer.step()
        self.steps_done += 1
        return losses.detach(), {
            "loss": losses.mean().item(),
            "gradient_norm": gradient_norm.item(),
            "learning_rate": rate,
            "images_per_second": self.settings.batch_size / (time.perf_counter() - started),
        }

    def _prepare(self, images: torch.Tensor, small: bool) -> torch.Tensor:
        settings = self.settings
        inputs = normalise(augment(images, self.generator, settings.mirror, settings.shift, settings.cutout))
        if not small or settings.small_side == inputs.shape[-1]:
            return inputs
        size = (settings.small_side, settings.small_side)
        reduced = nn.functional.interpolate(inputs, size, mode="bilinear", antialias=True)
        return reduced.contiguous(memory_format=torch.channels_last)

    def _set_learning_rate(self, progress: float) -> float:
        """Up in a line, and down to nothing in another; by progress, because epochs differ in their steps."""
        warm_up, top = self.settings.warm_up, self.settings.learning_rate
        rate = top * max(min(progress / warm_up, (1 - progress) / (1 - warm_up)), 1e-4)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        return rate
