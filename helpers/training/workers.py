"""What every training function shares: processes that train one network together, precision, schedule, batches.

Data parallel: every process holds the whole network and works on its share of each batch. The same training function
runs alone, under torchrun and in Spark tasks; see `distributed`.
"""

import contextlib
import dataclasses
import io
import json
import os
import time
from collections.abc import Iterator, Mapping
from datetime import timedelta
from functools import partial
from typing import Annotated, Any, Literal

import torch
import torch.distributed as dist
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import nn
from torch.utils.data import DistributedSampler

from helpers.errors import HostError, TrainingError
from helpers.storage import StorageOptions, open_storage

PROGRESS = "epoch "  # how each line of progress begins
NOTICE = "checkpoint "  # and of each line about where a run goes on

WARM_UP_STEPS, DECAY = 200, 0.4  # of the trapezoid; the second is a share of all steps

Positive = Annotated[int, Field(gt=0)]


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class RunSettings:
    """What a training run of any network decides."""

    epochs: Positive = 5
    batch_size: Positive = 128  # images a step, over all processes together
    learning_rate: Annotated[float, Field(gt=0)] = 5e-3  # the highest of the schedule
    schedule: Literal["one-cycle", "trapezoid", "constant"] = "one-cycle"
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    seed: int = 0
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"  # auto: the fastest that the device computes in
    device: Literal["cpu", "cuda"] = "cpu"
    threads: Positive = 1  # a process; two threads that wait for each other lose far more on a busy machine
    patience_minutes: Positive = 5  # a process that waits longer than this for another takes it for lost
    loaders: Annotated[int, Field(ge=0)] = 0  # processes that read ahead for each training process; 0: it reads itself
    resume: bool = True  # go on from an interrupted run's newest checkpoint; False: start over
    checkpoint_steps: Positive | None = None  # steps from one checkpoint to the next; None: an epoch
    checkpoints: str | None = None  # a location of any kind for them; None: in the run directory
    storage: StorageOptions = dataclasses.field(default_factory=StorageOptions)  # how object storage is reached


@dataclasses.dataclass(frozen=True)
class Worker:
    """This process among the processes of a run."""

    rank: int
    processes: int
    device: torch.device
    closing: contextlib.ExitStack = dataclasses.field(
        default_factory=contextlib.ExitStack
    )  # what is held until its end


@contextlib.contextmanager
def join_workers(settings: RunSettings) -> Iterator[Worker]:
    """Be one of the processes of a run, until the end of the `with` block.

    Raises:
        HostError: a GPU is asked for and there is none.
    """
    # torchrun and TorchDistributor describe the processes in these variables; alone, there are none.
    rank, processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    worker = Worker(rank, processes, _device(settings))
    threads = torch.get_num_threads()
    torch.set_num_threads(settings.threads)
    if processes > 1:
        patience = timedelta(minutes=settings.patience_minutes)
        dist.init_process_group("nccl" if settings.device == "cuda" else "gloo", timeout=patience)
    try:
        with worker.closing:
            yield worker
    finally:
        torch.set_num_threads(threads)
        if processes > 1:
            dist.destroy_process_group()


def batches_of(
    settings: RunSettings, worker: Worker, images: int, epoch: int, first: int = 0
) -> Iterator[torch.Tensor]:
    """This worker's share, int64 indices, of each batch of an epoch; the last, incomplete batch is left out.

    Together the shares of step k are the batch that a single process would take at step k. `first` is the step to
    begin with.
    """
    everything: Any = range(images)  # which the sampler asks for its length alone
    sampler: DistributedSampler = DistributedSampler(
        everything, worker.processes, worker.rank, seed=settings.seed, drop_last=True
    )
    sampler.set_epoch(epoch)
    share = torch.tensor(list(sampler)).split(settings.batch_size // worker.processes)
    yield from share[first : images // settings.batch_size]


def check_batch(settings: RunSettings, worker: Worker, images: int) -> None:
    """Check that there is a batch, and a share of it for each process.

    Raises:
        TrainingError: there is not.
    """
    if settings.batch_size % worker.processes:
        raise TrainingError(f"batch_size {settings.batch_size} does not divide over {worker.processes} processes")
    if images < settings.batch_size:
        raise TrainingError(f"{images} training images are fewer than one batch of {settings.batch_size}")


def choose_precision(settings: RunSettings) -> Literal["bf16", "fp16", "fp32"]:
    """What to compute in where that is enough: a GPU without bfloat16 takes half precision, a processor single."""
    if settings.precision != "auto":
        return settings.precision
    if settings.device == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return "bf16" if torch.cpu.get_capabilities().get("avx512_bf16") else "fp32"


def make_schedule(settings: RunSettings, optimizer: torch.optim.Optimizer, total_steps: int) -> Any:
    """Make the learning rate's schedule, for one call of `step` after each optimisation step."""
    if settings.schedule == "constant":
        return torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    if settings.schedule == "trapezoid":
        slopes = partial(_trapezoid, total_steps=total_steps)
        return torch.optim.lr_scheduler.LambdaLR(optimizer, slopes)
    # Warm up over a fifth, then decay to nothing: a constant rate wanders about the minimum at the end.
    # Adam's momentum falls while the rate rises; Muon's stays, as in its authors' training.
    adam = "betas" in optimizer.defaults
    top = settings.learning_rate
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, top, total_steps, pct_start=0.2, cycle_momentum=adam)


def average_buffers(worker: Worker, model: nn.Module) -> None:
    """Give all processes the mean of their batch norms' statistics, which come from their own shares alone."""
    if worker.processes > 1:
        for buffer in model.buffers():
            dist.all_reduce(buffer)
            buffer.copy_(buffer / worker.processes)


def broadcast(worker: Worker, value: Any) -> Any:
    """Give all processes the first one's value, which must pickle; what the others pass is not looked at.

    Files are read so where all must have the same, even if their views of the storage differ.
    """
    if worker.processes == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def sum_cpu_seconds(worker: Worker, since: float) -> float:
    """Processor time of all processes of the run together, each since its `time.process_time` was `since`."""
    seconds = torch.tensor(time.process_time() - since, device=worker.device)
    if worker.processes > 1:
        dist.all_reduce(seconds)
    return float(seconds)


def save(model: nn.Module, result: Mapping[str, Any], run_dir: str) -> None:
    """Write `checkpoint.pt`, a state_dict, and `result.json` to the run directory.

    There is a `result.json` only beside the `checkpoint.pt` that it is about, wherever this is interrupted.
    """
    storage = open_storage(run_dir)
    content = io.BytesIO()
    torch.save({name: tensor.cpu().contiguous() for name, tensor in model.state_dict().items()}, content)
    storage.delete("result.json")
    storage.write("checkpoint.pt", content.getvalue())
    storage.write("result.json", json.dumps(result, indent=2).encode())


def _trapezoid(step: int, total_steps: int) -> float:
    """Share of the highest rate: up in a few steps, level, and down to nothing over the last part.

    Until that part nothing depends on the number of steps, so it can still be chosen.
    """
    return min((step + 1) / WARM_UP_STEPS, 1.0, (total_steps - step) / (DECAY * total_steps))


def _device(settings: RunSettings) -> torch.device:
    if settings.device == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise HostError("a GPU is asked for and PyTorch finds none here: use device='cpu', or a host with CUDA")
    number, there = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if number >= there:
        raise HostError(f"each process needs a GPU of its own, and this host has {there}: start at most {there} here")
    torch.cuda.set_device(number)  # NCCL takes the current one
    return torch.device("cuda", number)
