"""What an interrupted training goes on from: everything that decides its next step, in one file, written atomically.

A checkpoint holds the state of the network, the optimiser, the schedule and whatever else the run names; the random
number generators of every process; and how far the run has come, with the position in the epoch's order of the data,
which seed and epoch fix. A finished run has none: its network is `checkpoint.pt` in the run directory.
"""

import contextlib
import dataclasses
import io
import json
import logging
import random
import re
import time
import zipfile
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from helpers.errors import StorageError, TrainingError, first_line
from helpers.storage import Storage, open_storage
from helpers.training.workers import NOTICE, RunSettings, Worker, average_buffers, broadcast

log = logging.getLogger(__name__)

LOCK_SECONDS = 12  # processes that read ahead for a training that was killed see it after 5, and hold its lock so long
KEPT = 2  # should the newest be damaged, there is one before it
NAME = "step-{:09d}.pt"
# What may differ between the run that wrote a checkpoint and the one that goes on: none of it decides the outcome.
HOW_AND_WHERE = {"device", "threads", "patience_minutes", "loaders", "resume"}
HOW_AND_WHERE |= {"checkpoint_steps", "checkpoints", "storage"}


class Stateful(Protocol):
    """A part of a run: a network, an optimiser, a schedule."""

    def state_dict(self) -> dict[str, Any]:
        """Its state, of tensors, numbers, text and containers of them."""

    def load_state_dict(self, state_dict: Any) -> Any:
        """Take such a state."""


@dataclasses.dataclass
class Progress:
    """How far a run has come."""

    epoch: int = 0  # how many are finished
    batches: int = 0  # of the epoch under way
    steps: int = 0  # of all epochs
    measured: list[dict[str, float]] = dataclasses.field(default_factory=list)  # at each step of the epoch under way
    epochs: list[dict[str, float]] = dataclasses.field(default_factory=list)  # what each finished one came to
    resumed_at: list[int] = dataclasses.field(default_factory=list)  # the steps after which the run went on

    def add_step(self, measures: dict[str, float]) -> None:
        """Count a step."""
        self.measured.append(measures)
        self.batches += 1
        self.steps += 1

    def add_epoch(self, measures: dict[str, float]) -> None:
        """Count an epoch."""
        self.epochs.append(measures)
        self.epoch, self.batches, self.measured = self.epoch + 1, 0, []


class Checkpoints:
    """The checkpoints of one run. Every process calls the methods; rank 0 reads and writes."""

    def __init__(self, settings: RunSettings, worker: Worker, run_dir: str, parts: Mapping[str, Stateful]):
        """Name the parts whose state is kept; `settings.checkpoints` or else the run directory is the place.

        Until the worker's run ends no other training can begin in the run directory.

        Raises:
            TrainingError: another training is at work there.
        """
        self.settings, self.worker, self.parts = settings, worker, parts
        self.storage = storage_of(settings, run_dir)
        if worker.rank == 0:
            worker.closing.enter_context(lock_run(run_dir))

    def restore(self) -> Progress:
        """Put every part in the state of the newest valid checkpoint, and tell how far the run had come.

        Raises:
            TrainingError: the checkpoint is of a run with other settings.
        """
        content = broadcast(self.worker, self._find() if self.worker.rank == 0 else None)
        if content is None:
            return Progress()
        saved = _load(content)
        for name, part in self.parts.items():
            part.load_state_dict(saved["parts"][name])
        if len(saved["random"]) == self.worker.processes:
            _set_random(saved["random"][self.worker.rank])
        progress = Progress(**saved["progress"])
        progress.resumed_at.append(progress.steps)
        return progress

    def save(self, progress: Progress) -> None:
        """Write a checkpoint and remove the older ones but the last."""
        for part in self.parts.values():
            if isinstance(part, nn.Module):
                average_buffers(self.worker, part)  # what the file holds is then what every process has
        states = [_get_random()]
        if self.worker.processes > 1:
            states *= self.worker.processes
            dist.all_gather_object(states, _get_random())
        if self.worker.rank == 0:
            content = io.BytesIO()
            torch.save(
                {
                    "settings": _shown(self.settings),
                    "progress": dataclasses.asdict(progress),
                    "parts": {name: part.state_dict() for name, part in self.parts.items()},
                    "random": states,
                },
                content,
            )
            self.storage.write(NAME.format(progress.steps), content.getvalue())
            for _, path in list(_files(self.storage))[KEPT:]:
                self.storage.delete(path)

    def clear(self) -> None:
        """Remove all of them."""
        if self.worker.rank == 0:
            remove(self.storage)

    def _find(self) -> bytes | None:
        if not self.settings.resume:
            remove(self.storage)
        for step, path in _files(self.storage):
            try:
                content = self.storage.read(path)
                saved = _load(content)
            except (
                Exception
            ) as error:  # for bytes that are no checkpoint, torch raises whatever its parsers come across
                log.warning("%s%s is damaged and skipped: %s", NOTICE, path, first_line(error))
                continue
            self._check(path, saved["settings"])
            print(f"{NOTICE}of step {step}: the training goes on from here", flush=True)
            return content
        return None

    def _check(self, path: str, theirs: dict[str, Any]) -> None:
        ours = _shown(self.settings)
        different = [
            f"{name} {theirs.get(name, 'unknown')} there, {ours.get(name, 'unknown')} here"
            for name in sorted({*ours, *theirs} - HOW_AND_WHERE)
            if theirs.get(name) != ours.get(name)
        ]
        if different:
            raise TrainingError(
                f"checkpoint {path} is of an unfinished run with other settings ({'; '.join(different)}): go on with "
                "those, name another run_dir, or start over with resume=False, which removes it"
            )


@contextlib.contextmanager
def lock_run(run_dir: str) -> Iterator[None]:
    """Be the only training in a run directory; a file system without locks gets a warning.

    Raises:
        TrainingError: another training is at work there.
    """
    with contextlib.ExitStack() as stack:
        deadline, waiting = time.monotonic() + LOCK_SECONDS, True
        while waiting:
            try:
                stack.enter_context(open_storage(run_dir).lock("training.lock"))
                waiting = False
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise TrainingError(
                        f"another training is at work in {run_dir}: wait for it, or name another run_dir"
                    ) from None
                time.sleep(1)
            except StorageError as error:
                log.warning("nothing keeps another training out: %s", error)
                waiting = False
        yield


def storage_of(settings: RunSettings, run_dir: str) -> Storage:
    """Where the checkpoints of a run are."""
    return open_storage(settings.checkpoints or f"{run_dir}/checkpoints", settings)


def remove(storage: Storage) -> None:
    """Remove all checkpoints."""
    for _, path in list(_files(storage)):
        storage.delete(path)


def newest_step(settings: RunSettings, run_dir: str) -> int:
    """The step of the newest checkpoint, damaged or not; 0 where there is none."""
    return next((step for step, _ in _files(storage_of(settings, run_dir))), 0)


def _files(storage: Storage) -> Iterator[tuple[int, str]]:
    """Steps and paths, the newest first."""
    try:
        entries = list(storage.list())
    except StorageError:
        if storage.exists(""):
            raise
        return
    named = [(re.search(r"step-(\d+)\.pt$", entry.path), entry.path) for entry in entries]
    yield from sorted(((int(step[1]), path) for step, path in named if step), reverse=True)


def _load(content: bytes) -> dict[str, Any]:
    # torch.load itself compares no checksum, so a flipped bit would be trained on.
    damaged = zipfile.ZipFile(io.BytesIO(content)).testzip()
    if damaged:
        raise zipfile.BadZipFile(f"{damaged} does not have its checksum")
    return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


def _shown(settings: RunSettings) -> dict[str, Any]:
    return json.loads(json.dumps({"kind": type(settings).__name__, **dataclasses.asdict(settings)}))


def _get_random() -> dict[str, Any]:
    kind, keys, *rest = np.random.get_state()
    state = {"python": random.getstate(), "torch": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all()}
    return state | {"numpy": (kind, torch.from_numpy(np.asarray(keys, np.int64)), *rest)}


def _set_random(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    torch.set_rng_state(state["torch"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    if len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
