"""Training YOLACT on Fashion-MNIST scenes, on one process or on many; see `workers` and `distributed`."""

import dataclasses
import time
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import cv2
import numpy as np
import torch
import torch.distributed as dist
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from helpers.data import fashion_mnist
from helpers.data.scenes import Scenes, to_coco
from helpers.metrics import average_precision
from helpers.training.dashboards import SegmentationDashboard
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
from helpers.yolact import build
from helpers.yolact.augmentation import augment
from helpers.yolact.evaluation import normalise, segment, to_coco_results
from helpers.yolact.losses import Target, compute_losses
from helpers.yolact.network import Yolact
from helpers.yolact.priors import level_sizes

PICTURES = 12  # validation scenes that TensorBoard shows


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class SceneSettings(RunSettings):
    """Everything that decides the outcome of a training run."""

    architecture: str = "yolact_scenes"
    epochs: Positive = 20
    batch_size: Positive = 32
    learning_rate: Annotated[float, Field(gt=0)] = 2e-3
    schedule: Literal["one-cycle", "trapezoid", "constant"] = "trapezoid"
    weight_decay: Annotated[float, Field(ge=0)] = 0.05
    train_scenes: Positive = 6000  # an epoch; each epoch has scenes of its own, of the same items
    val_scenes: Positive = 200
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.998  # of the weights' moving average, which is what is kept
    largest_gradient: Annotated[float, Field(gt=0)] = 10.0  # norm; a step whose gradient is longer is shortened


def train(settings: SceneSettings, data_root: str, run_dir: str) -> dict[str, Any]:
    """Train and validate; on its own, or in each process that torchrun or TorchDistributor started.

    Rank 0 writes to the run directory: TensorBoard events and, after each epoch, `checkpoint.pt` (a state_dict) and
    `result.json`.

    Args:
        settings: what to do.
        data_root: where Fashion-MNIST is, or will be put.
        run_dir: a folder for this run alone; earlier events in it are replaced.

    Returns:
        What `result.json` holds: validation AP (0 to 1), the means of each epoch, scenes/s, CPU seconds of all
        processes together, settings.

    Raises:
        HostError: a GPU is asked for and there is none.
        TrainingError: the batch does not divide over the processes, or there is less than one batch.
        DataError: there is no data set.
    """
    with join_workers(settings) as worker:
        check_batch(settings, worker, settings.train_scenes)
        fashion_mnist.download(data_root)
        return _Run(settings, worker, data_root, run_dir).train()


class _Run:
    """One process of a run, from the first epoch to the last."""

    def __init__(self, settings: SceneSettings, worker: Worker, data_root: str, run_dir: str):
        self.settings, self.worker, self.run_dir = settings, worker, run_dir
        cv2.setNumThreads(settings.threads)
        torch.manual_seed(settings.seed)
        self.network = build(settings.architecture)
        size = self.network.configuration.size
        self.train_set = Scenes(data_root, "train", settings.seed, size, size)
        validation = Scenes(data_root, "val", settings.seed, size, size)
        self.val_set = [validation[number] for number in range(settings.val_scenes)]
        self.truth = to_coco(self.val_set)
        _initialise(self.network)
        self.network.to(worker.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.step = _Step(
            settings, worker, self.network, settings.epochs * (settings.train_scenes // settings.batch_size)
        )
        self.dashboard = SegmentationDashboard(run_dir) if worker.rank == 0 else None

    def train(self) -> dict[str, Any]:
        epochs: list[dict[str, float]] = []
        started = time.perf_counter()
        for epoch in range(self.settings.epochs):
            epochs.append(self._train_epoch(epoch) | self._validate())
            result = {
                **{name: value for name, value in epochs[-1].items() if name.startswith("val_")},
                "scenes_per_second": float(np.median([measures["scenes_per_second"] for measures in epochs])),
                "seconds": time.perf_counter() - started,
                "cpu_seconds": self._cpu_seconds(),
                "processes": self.worker.processes,
                "parameters": sum(parameter.numel() for parameter in self.network.parameters()),
                "bf16": computes_bf16(self.settings),
                "epochs": epochs,
                "settings": dataclasses.asdict(self.settings),
            }
            if self.dashboard:
                save(self.step.averaged, result, self.run_dir)
                _print_progress(epoch + 1, self.settings.epochs, epochs[-1])
        if self.dashboard:
            self.dashboard.close()
        return result

    def _train_epoch(self, epoch: int) -> dict[str, float]:
        times, measured = [time.perf_counter()], []
        for images, targets in self._batches(epoch):
            measures = self.step(images, targets)
            times.append(time.perf_counter())
            measures["scenes_per_second"] = self.settings.batch_size / (times[-1] - times[-2])
            measured.append(measures)
            if self.dashboard:
                self.dashboard.log_step(self.step.steps_done, measures)
        means = {f"train_{name}": float(np.mean([m[name] for m in measured])) for name in measured[0] if "loss" in name}
        return {**means, "scenes_per_second": len(measured) * self.settings.batch_size / (times[-1] - times[0])}

    def _batches(self, epoch: int) -> Iterator[tuple[torch.Tensor, list[Target]]]:
        settings, device = self.settings, self.worker.device
        cells = 2 * level_sizes(self.network.configuration.size)[0]  # the prototypes have twice the side of P3
        for numbers in batches_of(settings, self.worker, settings.train_scenes, epoch):
            made = []
            for number in numbers.tolist():
                scene = self.train_set[epoch * settings.train_scenes + number]
                made.append(augment(scene, cells, np.random.default_rng([settings.seed, epoch, number])))
            images = torch.from_numpy(np.stack([image for image, _ in made])).to(device)
            yield images, [target.to(device) for _, target in made]

    def _validate(self) -> dict[str, float]:
        network = self.step.averaged
        average_buffers(self.worker, network)
        share = range(self.worker.rank, len(self.val_set), self.worker.processes)
        found = dict(zip(share, segment(network, [self.val_set[n].image for n in share]), strict=True))
        if self.worker.processes > 1:
            parts: list[Any] = [None] * self.worker.processes
            dist.all_gather_object(parts, found)
            found = {number: predictions for part in parts for number, predictions in part.items()}
        found = dict(sorted(found.items()))
        precision = {f"val_{k}": v for k, v in average_precision(self.truth, to_coco_results(found)).items()}
        if self.dashboard:
            shown = range(min(PICTURES, len(found)))
            self.dashboard.log_epoch(self.step.steps_done, precision)
            self.dashboard.log_pictures(
                self.step.steps_done, [self.val_set[n].image for n in shown], [found[n] for n in shown]
            )
        return precision

    def _cpu_seconds(self) -> float:
        seconds = torch.tensor(time.process_time())
        if self.worker.processes > 1:
            dist.all_reduce(seconds)
        return float(seconds)


class _Step:
    """One optimisation step after another, on this worker's share of each batch."""

    def __init__(self, settings: SceneSettings, worker: Worker, network: Yolact, total_steps: int):
        self.settings, self.network, self.steps_done = settings, network, 0
        self.bf16 = computes_bf16(settings)
        # Batch norm's statistics differ between processes until they are validated, so they need no broadcast.
        several = worker.processes > 1
        self.model = DistributedDataParallel(network, forward_sync_buffers=False) if several else network
        self.optimizer = torch.optim.AdamW(_groups(network, settings.weight_decay), lr=settings.learning_rate)
        self.schedule = make_schedule(settings, self.optimizer, total_steps)
        self.average = AveragedModel(network, multi_avg_fn=self._average, use_buffers=True)

    def __call__(self, images: torch.Tensor, targets: list[Target]) -> dict[str, float]:
        learning_rate = self.schedule.get_last_lr()[0]
        self.model.train()
        with torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=self.bf16):
            outputs = self.model(normalise(self.network, images))
        terms = compute_losses(outputs, targets)
        loss = torch.stack(list(terms.values())).sum()
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.network.parameters(), self.settings.largest_gradient)
        self.optimizer.step()
        self.schedule.step()
        self.average.update_parameters(self.network)
        self.steps_done += 1
        return {
            "loss": loss.item(),
            **{f"{name}_loss": term.item() for name, term in terms.items()},
            "learning_rate": learning_rate,
        }

    @property
    def averaged(self) -> Yolact:
        """The network with the moving average of the weights, in evaluation mode."""
        network = self.average.module.eval()
        assert isinstance(network, Yolact)
        return network

    def _average(self, average: Any, current: Any, updates: Any) -> None:
        # At the start the mean of the few there are, or the first, random weights would stay in it for long.
        decay = min(self.settings.ema_decay, (1 + int(updates)) / (10 + int(updates)))
        get_ema_multi_avg_fn(decay)(average, current, updates)


def _groups(network: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weights decay; biases and batch norm's parameters, which are vectors, do not."""
    matrices = [parameter for parameter in network.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in network.parameters() if parameter.ndim == 1]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]


def _initialise(network: Yolact) -> None:
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d):
            if name.startswith("backbone"):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            else:
                nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def _print_progress(epoch: int, epochs: int, measures: dict[str, float]) -> None:
    print(
        f"{PROGRESS}{epoch}/{epochs}: training loss {measures['train_loss']:.3f}, "
        f"validation mask AP {measures['val_AP']:.3f}, AP50 {measures['val_AP50']:.3f}, "
        f"{measures['scenes_per_second']:,.0f} scenes/s",
        flush=True,
    )
