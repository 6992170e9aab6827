"""Training the network on one process or on many: the same `train` runs alone, under torchrun and in Spark tasks.

Data parallel: every process holds the whole network and works on its share of each batch. `distributed` starts
it in Spark tasks; `dashboards` writes what it did.
"""

import contextlib
import dataclasses
import io
import json
import os
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Annotated, Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from helpers import fashion_mnist
from helpers.dashboards import TrainingDashboard
from helpers.errors import HostError, TrainingError
from helpers.fashion_cnn import FashionCNN, compute_logits, normalise, predict
from helpers.storage import open_storage

# A process that waits longer than this for another takes it for lost.
RANK_TIMEOUT = timedelta(minutes=5)
PROGRESS = "epoch "  # how each line of progress begins

Positive = Annotated[int, Field(gt=0)]


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class TrainingSettings:
    """Everything that decides the outcome of a training run."""

    epochs: Positive = 5
    batch_size: Positive = 128  # images a step, over all processes together
    learning_rate: Annotated[float, Field(gt=0)] = 5e-3  # the highest of the schedule
    schedule: Literal["one-cycle", "constant"] = "one-cycle"
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    channels: tuple[Positive, Positive] = (16, 32)
    seed: int = 0
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # auto: bf16 where the processor computes in it
    device: Literal["cpu", "cuda"] = "cpu"
    threads: Positive = 1  # a process; two threads that wait for each other lose far more on a busy machine
    train_images: Positive | None = None  # from the first; None: all 60,000
    test_images: Positive | None = None  # from the first; None: all 10,000


@dataclasses.dataclass(frozen=True)
class Worker:
    """This process among the processes of a run."""

    rank: int
    processes: int
    device: torch.device


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
    with _join_workers(settings) as worker:
        fashion_mnist.download(data_root)
        training_set = _load_tensors(data_root, True, settings.train_images, worker.device)
        test_set = _load_tensors(data_root, False, settings.test_images, worker.device)
        _check_batch(settings, worker, len(training_set[0]))
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
            _save(model, result, run_dir)
        return result


def batches_of(settings: TrainingSettings, worker: Worker, images: int, epoch: int) -> Iterator[torch.Tensor]:
    """This worker's share, int64 indices, of each batch of an epoch; the last, incomplete batch is left out.

    Together the shares of step k are the batch that a single process would take at step k.
    """
    order = torch.randperm(images, generator=torch.Generator().manual_seed(settings.seed + epoch))
    for start in range(0, images - settings.batch_size + 1, settings.batch_size):
        yield order[start : start + settings.batch_size][worker.rank :: worker.processes].to(worker.device)


@contextlib.contextmanager
def _join_workers(settings: TrainingSettings) -> Iterator[Worker]:
    # torchrun and TorchDistributor describe the processes in these variables; alone, there are none.
    rank, processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    worker = Worker(rank, processes, _device(settings))
    threads = torch.get_num_threads()
    torch.set_num_threads(settings.threads)
    if processes > 1:
        dist.init_process_group("nccl" if settings.device == "cuda" else "gloo", timeout=RANK_TIMEOUT)
    try:
        yield worker
    finally:
        torch.set_num_threads(threads)
        if processes > 1:
            dist.destroy_process_group()


def _device(settings: TrainingSettings) -> torch.device:
    if settings.device == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise HostError("a GPU is asked for and PyTorch finds none here: use device='cpu', or a host with CUDA")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


def _load_tensors(root: str, train: bool, count: int | None, device: torch.device) -> tuple[torch.Tensor, ...]:
    # The whole set is 47 MB as bytes, so it stays in memory and no loader process is needed.
    images, labels = fashion_mnist.load(root, train)
    return torch.as_tensor(images[:count]).to(device), torch.as_tensor(labels[:count]).to(device)


def _check_batch(settings: TrainingSettings, worker: Worker, images: int) -> None:
    if settings.batch_size % worker.processes:
        raise TrainingError(f"batch_size {settings.batch_size} does not divide over {worker.processes} processes")
    if images < settings.batch_size:
        raise TrainingError(f"{images} training images are fewer than one batch of {settings.batch_size}")


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
        self.bf16 = _computes_bf16(settings)
        # Batch norm's statistics differ between processes until `_evaluate` averages them, so they need no
        # broadcast at every step.
        self.model = DistributedDataParallel(model, forward_sync_buffers=False) if worker.processes > 1 else model
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay
        )
        self.schedule = _schedule(settings, self.optimizer, total_steps)

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


def _computes_bf16(settings: TrainingSettings) -> bool:
    if settings.precision != "auto":
        return settings.precision == "bf16"
    if settings.device == "cuda":
        return torch.cuda.is_bf16_supported()
    return bool(torch.cpu.get_capabilities().get("avx512_bf16"))


def _schedule(settings: TrainingSettings, optimizer: torch.optim.Optimizer, total_steps: int) -> Any:
    if settings.schedule == "constant":
        return torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    # Warm up over a fifth, then decay to nothing: a constant rate wanders about the minimum at the end.
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, settings.learning_rate, total_steps, pct_start=0.2)


def _evaluate(worker: Worker, model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    share = slice(worker.rank, None, worker.processes)
    if worker.processes > 1:
        for buffer in model.buffers():
            dist.all_reduce(buffer)
            buffer.copy_(buffer / worker.processes)
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
        "bf16": _computes_bf16(settings),
        "epochs": epochs,
        "settings": dataclasses.asdict(settings),
    }


def _hyperparameters(settings: TrainingSettings) -> dict[str, float | str]:
    # TensorBoard's table takes numbers and text.
    values = dataclasses.asdict(settings) | {"channels": str(settings.channels)}
    return {name: value for name, value in values.items() if value is not None}


def _save(model: nn.Module, result: dict[str, Any], run_dir: str) -> None:
    storage = open_storage(run_dir)
    content = io.BytesIO()
    torch.save({name: tensor.cpu().contiguous() for name, tensor in model.state_dict().items()}, content)
    storage.write("checkpoint.pt", content.getvalue())
    storage.write("result.json", json.dumps(result, indent=2).encode())
