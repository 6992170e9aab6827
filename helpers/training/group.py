"""The ranks of a training, and what they tell each other.

Data parallel: every rank holds the whole network and works on its share of each batch. The same program runs alone,
under torchrun and in Spark tasks; see `launch`.
"""

import contextlib
import dataclasses
import io
import json
import logging
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn

from helpers.errors import HostError, StorageError, TrainingError
from helpers.memory import untrimmed
from helpers.storage import lock, open_storage

log = logging.getLogger(__name__)

LOCK_SECONDS = 12  # loaders of a training that was killed see it after 5, and hold its lock so long
PATIENCE = timedelta(minutes=5)  # a rank that waits longer than this for another takes it for lost

Device = Literal["cpu", "cuda"]


@dataclasses.dataclass(frozen=True)
class Group:
    """This rank among the ranks of a training. All of them call a method at the same point of the program."""

    rank: int
    world_size: int
    device: torch.device

    def average(self, tensors: Iterable[torch.Tensor]) -> None:
        """Give all ranks the mean of each tensor, in place: of batch norms' statistics, say, which come from shares."""
        if self.world_size > 1:
            for tensor in tensors:
                dist.all_reduce(tensor)
                tensor.copy_(tensor / self.world_size)

    def broadcast(self, value: Any) -> Any:
        """Give all ranks the value of rank 0, which must pickle; the values of the others are ignored.

        Files are read so where all must have the same, even if their views of the storage differ.
        """
        box = [value]
        if self.world_size > 1:
            dist.broadcast_object_list(box, src=0)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Give all ranks everyone's value, which must pickle, in the order of the ranks."""
        values = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(values, value)
        return values


@contextlib.contextmanager
def join_group(device: Device = "cpu", threads: int = 1, run_dir: str | None = None) -> Iterator[Group]:
    """Join the ranks of a training until the end of the `with` block.

    The device `cuda` gives each rank of a host a GPU of its own. Threads are of each rank: two that wait for each other
    lose far more on a busy machine. Until the end no other training can begin in `run_dir`, where this one leaves what
    it makes. Raises HostError if a GPU is asked for and there is none, and TrainingError if another is at work there.
    """
    # torchrun and `train_on_spark` describe the ranks in these variables; alone, there are none.
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    group = Group(rank, world_size, _find_device(device))
    threads_before = torch.get_num_threads()
    torch.set_num_threads(threads)
    if world_size > 1:
        dist.init_process_group("nccl" if device == "cuda" else "gloo", timeout=PATIENCE)
    try:
        with untrimmed(), lock_run(run_dir) if run_dir and rank == 0 else contextlib.nullcontext():
            yield group
    finally:
        torch.set_num_threads(threads_before)
        if world_size > 1:
            dist.destroy_process_group()


@contextlib.contextmanager
def lock_run(run_dir: str) -> Iterator[None]:
    """Lock a run directory for one training, or raise TrainingError; without locks there is a warning."""
    deadline = time.monotonic() + LOCK_SECONDS
    with contextlib.ExitStack() as stack:
        while True:
            try:
                stack.enter_context(lock(open_storage(run_dir), "training.lock"))
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    remedy = "wait for it, or name another run directory"
                    raise TrainingError(f"another training is at work in {run_dir}: {remedy}") from None
                time.sleep(1)
            except StorageError as error:
                log.warning("nothing keeps another training out: %s", error)
                break
        yield


class Pace:
    """How many images per second this rank trains, and how long it waits for the gradients of the others.

    On a GPU, whose work is only queued here, the waiting is an upper bound.
    """

    def __init__(self, network: nn.Module, group: Group, batch_size: int):
        """Prepare; `batch_size` is that of all ranks together."""
        self.group, self.batch_size = group, batch_size
        self.steps, self.seconds, self.waited = 0, 0.0, 0.0
        self._started = self._own_gradients = time.perf_counter()
        # Its gradient is the last of a backward pass: what comes after is waiting for the other ranks.
        next(network.parameters()).register_post_accumulate_grad_hook(self._note_own_gradients)

    def start(self) -> None:
        """Begin a step; after each one the next begins by itself."""
        self._started = time.perf_counter()

    def end_backward(self) -> None:
        """Note that the gradients of all ranks are there."""
        self.waited += time.perf_counter() - self._own_gradients

    def end_step(self) -> float:
        """Note that a step is done; returns the images per second of all ranks in it."""
        now = time.perf_counter()
        took, self._started = now - self._started, now
        self.steps, self.seconds = self.steps + 1, self.seconds + took
        return self.batch_size / took

    @property
    def images_per_second(self) -> float:
        """Of all ranks, since the last call of `of_ranks`."""
        return self.steps * self.batch_size / self.seconds if self.steps else 0.0

    def of_ranks(self) -> dict[str, float]:
        """What there was since the last call, by TensorBoard's tags: `throughput/rank_N` and `waiting/rank_N`.

        A rank that holds the others up has a low throughput, images per second of the time that it worked, and does
        not wait; the waiting is a share of its time.
        """
        share = self.steps * self.batch_size / self.group.world_size
        own = (share / (self.seconds - self.waited), self.waited / self.seconds) if self.steps else (0.0, 0.0)
        self.steps, self.seconds, self.waited = 0, 0.0, 0.0
        ranks = enumerate(self.group.gather(own))
        names = ("throughput", "waiting")
        return {f"{name}/rank_{n}": value for n, rank in ranks for name, value in zip(names, rank, strict=True)}

    def _note_own_gradients(self, parameter: torch.Tensor) -> None:
        self._own_gradients = time.perf_counter()


def fastest_dtype(device: torch.device) -> torch.dtype:
    """Return the type for matrix products: half precision where the hardware computes in it."""
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if native else torch.float16
    return torch.bfloat16 if torch.cpu.get_capabilities().get("avx512_bf16") else torch.float32


def save_network(network: nn.Module, result: Mapping[str, Any], run_dir: str) -> None:
    """Write `checkpoint.pt`, a state_dict, and `result.json` to the run directory; for rank 0 to call.

    There is a `result.json` only beside the `checkpoint.pt` that it is about, wherever this is interrupted.
    """
    storage, content = open_storage(run_dir), io.BytesIO()
    torch.save({name: tensor.cpu().contiguous() for name, tensor in network.state_dict().items()}, content)
    storage.delete("result.json")
    storage.write("checkpoint.pt", content.getvalue())
    storage.write("result.json", json.dumps(result, indent=2).encode())


def _find_device(device: Device) -> torch.device:
    if device == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise HostError("a GPU is asked for and PyTorch finds none here: use device cpu, or a host with CUDA")
    number, count = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if number >= count:
        raise HostError(f"each rank needs a GPU of its own, and this host has {count}: start at most {count} here")
    torch.cuda.set_device(number)  # NCCL takes the current one
    return torch.device("cuda", number)
