"""How often, and with what delay, workers exchange what they have learned; three ways to see why all-reduce is usual.

`all-reduce` averages the gradients of all processes at every step (Li et al., arXiv:2006.15704). `local` lets each take
plain steps of its own and averages the parameters every k-th (local SGD: Stich, arXiv:1805.09767, algorithm 1).
`stale` is one process that plays a parameter server without locks: each gradient was taken at the parameters of some
steps before (Dean et al., NIPS 2012, section 4.1), a fixed number of them, so that it is the same in every run.
All use plain SGD at a constant rate, or momentum would hide which is which.
"""

import dataclasses
import time
from collections import deque
from collections.abc import Callable
from typing import Annotated, Any, Literal

import torch
import torch.distributed as dist
from helpers.models.fashion_cnn import FashionCNN, compute_logits, normalize
from helpers.training.workers import (
    Positive,
    RunSettings,
    Worker,
    average_buffers,
    batches_of,
    check_batch,
    join_workers,
    save,
)
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from helpers.data import fashion_mnist
from helpers.errors import TrainingError

Step = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # images, labels: the loss


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class SynchronySettings(RunSettings):
    """What is trained, and how the workers stay together; single precision, a constant rate, no checkpoints."""

    learning_rate: Annotated[float, Field(gt=0)] = 0.05
    synchrony: Literal["all-reduce", "local", "stale"] = "all-reduce"
    every: Positive = 1  # of local: steps from one average to the next
    staleness: Annotated[int, Field(ge=0)] = 0  # of stale: steps by which a gradient is late
    train_images: Positive | None = None  # from the first; None: all 60,000
    test_images: Positive | None = 2000  # from the first; None: all 10,000


def train(settings: SynchronySettings, data_root: str, run_dir: str) -> dict[str, Any]:
    """Train a `FashionCNN`, alone or as one of several processes, and evaluate after each epoch.

    Returns:
        What `result.json` holds: `loss` of each step, averaged over the processes, and `seconds` at which it was
        known, evaluations left out; `test_loss` and `test_accuracy` of each epoch; settings.

    Raises:
        TrainingError: stale gradients are asked for with several processes, or the batch does not divide over them.
        DataError: there is no data set.
    """
    with join_workers(settings) as worker:
        if settings.synchrony == "stale" and worker.processes > 1:
            raise TrainingError("stale gradients are simulated: train with one process")
        fashion_mnist.download(data_root)
        images, labels = _load(data_root, True, settings.train_images)
        test_set = _load(data_root, False, settings.test_images)
        check_batch(settings, worker, len(images))
        torch.manual_seed(settings.seed)
        model = FashionCNN()
        step = _make_step(settings, worker, model)
        result: dict[str, Any] = {"loss": [], "seconds": [], "test_loss": [], "test_accuracy": []}
        seconds = 0.0
        for epoch in range(settings.epochs):
            started, losses = time.perf_counter() - seconds, []
            for indices in batches_of(settings, worker, len(images), epoch):
                losses.append(step(images[indices], labels[indices]))
                seconds = time.perf_counter() - started
                result["seconds"].append(seconds)
            # Only now, because an average at every step would keep workers together that ought to run apart.
            result["loss"] += _average(worker, torch.stack(losses)).tolist()
            _evaluate(worker, model, test_set, result)
        result |= {"processes": worker.processes, "settings": dataclasses.asdict(settings)}
        if worker.rank == 0:
            save(model, result, run_dir)
        return result


def _load(data_root: str, train: bool, count: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = fashion_mnist.load(data_root, train)
    return torch.as_tensor(images[:count]), torch.as_tensor(labels[:count])


def _make_step(settings: SynchronySettings, worker: Worker, model: nn.Module) -> Step:
    optimizer = torch.optim.SGD(model.parameters(), lr=settings.learning_rate)
    if settings.synchrony == "stale":
        return _stale_step(model, optimizer, settings.staleness)
    synchronous = settings.synchrony == "all-reduce" and worker.processes > 1
    # Batch norm's statistics stay each process's own until the end of an epoch, in both ways alike.
    network = DistributedDataParallel(model, forward_sync_buffers=False) if synchronous else model
    steps_done = 0

    def step(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        nonlocal steps_done
        network.train()
        loss = nn.functional.cross_entropy(network(normalize(images)), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        steps_done += 1
        if settings.synchrony == "local" and steps_done % settings.every == 0:
            average_parameters(worker, model)
        return loss.detach()

    return step


def _stale_step(model: nn.Module, optimizer: torch.optim.Optimizer, staleness: int) -> Step:
    # The oldest first; at the beginning, when there are no older ones, gradients are less late.
    history: deque[dict[str, torch.Tensor]] = deque(maxlen=staleness + 1)

    def step(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        model.train()
        history.append({name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()})
        late = history[0]
        loss = nn.functional.cross_entropy(torch.func.functional_call(model, late, (normalize(images),)), labels)
        gradients = torch.autograd.grad(loss, list(late.values()))
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
        return loss.detach()

    return step


@torch.no_grad()
def average_parameters(worker: Worker, model: nn.Module) -> None:
    """Give all processes the mean of their parameters."""
    if worker.processes > 1:
        # One message instead of one a tensor: the network is small, so that latency is what an average costs.
        vector = nn.utils.parameters_to_vector(model.parameters())
        dist.all_reduce(vector)
        nn.utils.vector_to_parameters(vector / worker.processes, model.parameters())


def _average(worker: Worker, value: torch.Tensor) -> torch.Tensor:
    if worker.processes > 1:
        dist.all_reduce(value)
    return value / worker.processes


def _evaluate(worker: Worker, model: nn.Module, test_set: tuple[torch.Tensor, ...], result: dict[str, Any]) -> None:
    average_parameters(worker, model)
    average_buffers(worker, model)
    logits = compute_logits(model, test_set[0])
    result["test_loss"].append(nn.functional.cross_entropy(logits, test_set[1]).item())
    result["test_accuracy"].append((logits.argmax(dim=1) == test_set[1]).float().mean().item())
