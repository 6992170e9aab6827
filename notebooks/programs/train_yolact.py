"""Training YOLACT, on one process or on many; see `workers` and `distributed`."""

import dataclasses
import time
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import cv2
import numpy as np
import torch
import torch.distributed as dist
from helpers.data.scenes import join_coco, to_coco
from helpers.training.dashboards import SegmentationDashboard
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
    sum_cpu_seconds,
)
from helpers.yolact.datasets import AugmentedScenes, open_scenes
from helpers.yolact.evaluation import BATCH, normalize, segment, to_coco_results
from helpers.yolact.finetuning import load_initial_weights
from helpers.yolact.losses import Target, compute_losses
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from helpers.data import fashion_mnist
from helpers.errors import DataError
from helpers.metrics import average_precision
from helpers.training.checkpoints import Checkpoints, Progress
from helpers.training.datasets import read_batches
from helpers.yolact import build
from helpers.yolact.configurations import get_configuration
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
    training_set: str | None = None  # images in COCO's form, or shards: see `datasets.open_scenes`; None: made scenes
    validation_set: str | None = None  # likewise, with the same classes
    train_scenes: Positive | None = None  # an epoch: of stored ones the first, None: all; of made ones None: 6000
    val_scenes: Positive | None = None  # likewise; of made ones None: 200
    initial_weights: str | None = None  # a checkpoint anywhere, see `finetuning`; None: random weights
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.998  # of the weights' moving average, which is what is kept
    largest_gradient: Annotated[float, Field(gt=0)] = 10.0  # norm; a step whose gradient is longer is shortened


def train(settings: SceneSettings, data_root: str, run_dir: str) -> dict[str, Any]:
    """Train and validate; on its own, or in each process that torchrun or TorchDistributor started.

    Rank 0 writes to the run directory: TensorBoard events and, after each epoch, `checkpoint.pt` (a state_dict) and
    `result.json`; and until the end `checkpoints`, from which a second call goes on where the first was interrupted.

    Args:
        settings: what to do.
        data_root: where Fashion-MNIST is, or will be put if scenes are to be made.
        run_dir: a folder for this run alone; what a finished run left in it is replaced.

    Returns:
        What `result.json` holds: validation AP (0 to 1) of masks at the network's size, the means of each epoch,
        scenes/s, CPU seconds of all processes together, the classes' labels, settings.

    Raises:
        HostError: a GPU is asked for and there is none.
        TrainingError: the batch does not divide over the processes, there is less than one batch, or an unfinished run
            with other settings is there.
        DataError: there is no data set, it is damaged, or validation has other classes than training.
        BundleError: the initial weights are missing, damaged or of another architecture.
    """
    cpu_started = time.process_time()
    with join_workers(settings) as worker:
        if settings.training_set is None or settings.validation_set is None:
            fashion_mnist.download(data_root)
        return _Run(settings, worker, data_root, run_dir).train(cpu_started)


class _Run:
    """One process of a run, from the first epoch to the last; see `loop.Run`."""

    unit = "scenes"

    def __init__(self, settings: SceneSettings, worker: Worker, data_root: str, run_dir: str):
        self.settings, self.worker, self.run_dir = settings, worker, run_dir
        cv2.setNumThreads(settings.threads)
        size = get_configuration(settings.architecture).size
        self.cells = 2 * level_sizes(size)[0]  # the prototypes have twice the side of P3
        self.train_set, self.labels = open_scenes(
            settings, settings.training_set, data_root, "train", size, settings.train_scenes
        )
        self.val_set, labels = open_scenes(
            settings, settings.validation_set, data_root, "val", size, settings.val_scenes
        )
        if labels != self.labels:
            raise DataError(
                f"training has the classes {', '.join(self.labels)} and validation {', '.join(labels)}: name a "
                "training_set and a validation_set with the same categories"
            )
        check_batch(settings, worker, len(self.train_set))
        torch.manual_seed(settings.seed)
        self.network = build(settings.architecture, self.labels)
        _initialise(self.network)
        self.network.to(worker.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        optimizer = torch.optim.AdamW(_groups(self.network, settings.weight_decay), lr=settings.learning_rate)
        total_steps = settings.epochs * (len(self.train_set) // settings.batch_size)
        self.optimization = Optimization(
            settings, worker, self.network, optimizer, total_steps, settings.largest_gradient
        )
        self.average = AveragedModel(self.network, multi_avg_fn=self._average, use_buffers=True)
        self.dashboard: SegmentationDashboard | None = None

    def train(self, cpu_started: float) -> dict[str, Any]:
        settings, worker, started = self.settings, self.worker, time.perf_counter()
        parts = {"network": self.network, "average": self.average, **self.optimization.parts}
        checkpoints = Checkpoints(settings, worker, self.run_dir, parts)
        progress = checkpoints.restore()
        if settings.initial_weights and not progress.resumed_at:
            load_initial_weights(self.network, settings.initial_weights, settings, worker)
            self.average.module.load_state_dict(self.network.state_dict())
        if worker.rank == 0:
            self.dashboard = SegmentationDashboard(self.run_dir, progress.steps)
        for measures in run_epochs(self, settings, worker, progress, checkpoints, self.dashboard):
            result = self._summarise(progress, time.perf_counter() - started, cpu_started)
            if self.dashboard:
                save(self.averaged, result, self.run_dir)
                _print_progress(progress.epoch, settings.epochs, measures)
        result = self._summarise(progress, time.perf_counter() - started, cpu_started)
        if self.dashboard:
            self.dashboard.close()
            save(self.averaged, result, self.run_dir)
            checkpoints.clear()
        return result

    def batches(self, epoch: int, first: int) -> Iterator[tuple[torch.Tensor, list[Target]]]:
        numbers = self.train_set.batches(self.settings, self.worker, epoch, first)
        scenes = AugmentedScenes(self.train_set, self.cells, self.settings.seed, epoch)
        return read_batches(scenes, numbers, self.settings, self.worker)

    def step(self, batch: tuple[torch.Tensor, list[Target]]) -> dict[str, float]:
        images, targets = batch[0].to(self.worker.device), [target.to(self.worker.device) for target in batch[1]]
        outputs = self.optimization.forward(normalize(self.network, images))
        terms = compute_losses(outputs, targets)
        loss = torch.stack(list(terms.values())).sum()
        descent = self.optimization.descend(loss)
        self.average.update_parameters(self.network)
        return {"loss": loss.item(), **{f"{name}_loss": term.item() for name, term in terms.items()}, **descent}

    def evaluate(self, steps: int) -> dict[str, float]:
        average_buffers(self.worker, self.averaged)
        share = torch.arange(len(self.val_set)).tensor_split(self.worker.processes)[self.worker.rank]
        batches = [numbers for numbers in share.split(BATCH) if len(numbers)]
        seen: list[Any] = []
        for numbers, scenes in zip(
            batches, read_batches(self.val_set, batches, self.settings, self.worker), strict=True
        ):
            found = segment(self.averaged, [scene.image for scene in scenes])
            seen.append((found, to_coco(scenes, int(numbers[0]), self.labels)))
        if self.worker.processes > 1:
            parts: list[Any] = [None] * self.worker.processes
            dist.all_gather_object(parts, seen)
            seen = [batch for part in parts for batch in part]
        predictions = [of_image for found, _ in seen for of_image in found]
        if self.dashboard:
            shown = self.val_set.__getitems__(torch.arange(min(PICTURES, len(self.val_set))))
            self.dashboard.log_pictures(steps, [scene.image for scene in shown], predictions[: len(shown)])
        truth, results = join_coco([truth for _, truth in seen]), to_coco_results(dict(enumerate(predictions)))
        return {f"val_{name}": value for name, value in average_precision(truth, results).items()}

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

    def _summarise(self, progress: Progress, seconds: float, cpu_started: float) -> dict[str, Any]:
        last = progress.epochs[-1]
        return {
            **{name: value for name, value in last.items() if name.startswith("val_")},
            "scenes_per_second": float(np.median([measures["scenes_per_second"] for measures in progress.epochs])),
            "seconds": seconds,
            "cpu_seconds": sum_cpu_seconds(self.worker, cpu_started),
            "processes": self.worker.processes,
            "parameters": sum(parameter.numel() for parameter in self.network.parameters()),
            "precision": choose_precision(self.settings),
            "resumed_at": progress.resumed_at,
            "epochs": progress.epochs,
            "labels": list(self.labels),
            "settings": dataclasses.asdict(self.settings),
        }


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
