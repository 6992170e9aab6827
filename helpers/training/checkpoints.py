"""Checkpoints: all that decides the next step of a training, in one file, written atomically.

A checkpoint holds the state of the network, the optimizer, the schedule and whatever else the program names; the random
number generators of every rank; and how far the training has come, with the position in the epoch's order of the data,
which seed and epoch fix. A finished training has none: its network is `checkpoint.pt` in the run directory.
"""

import dataclasses
import io
import json
import logging
import os
import random
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from helpers.errors import TrainingError, first_line
from helpers.storage import Storage, open_storage
from helpers.training.group import Group
from helpers.training.rank import CHECKPOINT_NOTE, RUN_ID

if TYPE_CHECKING:
    from torch.distributed.checkpoint.stateful import Stateful

log = logging.getLogger(__name__)

KEPT = 2  # should the newest be damaged, there is one before it
NAME = "step-{:09d}.pt"


@dataclasses.dataclass
class Progress:
    """How far a training has come."""

    epoch: int = 0  # how many are finished
    batches: int = 0  # of the epoch under way
    steps: int = 0  # of all epochs
    measured: list[dict[str, float]] = dataclasses.field(default_factory=list)  # at each step of the epoch under way
    epochs: list[dict[str, float]] = dataclasses.field(default_factory=list)  # what each finished one came to
    resumed_at: list[int] = dataclasses.field(default_factory=list)  # the steps after which the training went on

    def add_step(self, measures: dict[str, float]) -> None:
        """Count a step."""
        self.measured.append(measures)
        self.batches += 1
        self.steps += 1

    def add_epoch(self, measures: dict[str, float]) -> None:
        """Count an epoch; the means of its steps' measurements are added to its results as `train_NAME`."""
        names = self.measured[0] if self.measured else ()
        means = {f"train_{name}": float(np.mean([step[name] for step in self.measured])) for name in names}
        self.epochs.append({**means, **measures})
        self.epoch, self.batches, self.measured = self.epoch + 1, 0, []


class Checkpoints:
    """The checkpoints of one training. Every rank calls the methods; rank 0 reads and writes."""

    def __init__(
        self,
        place: str,
        group: Group,
        parts: Mapping[str, "Stateful"],
        settings: Mapping[str, Any],
        resume: bool = True,
        config: Any = None,
    ):
        """Name the place and what is kept.

        Args:
            place: a location of any kind, for the checkpoints of this training alone.
            group: of the ranks.
            parts: what has a state, by a name.
            settings: all that decides the outcome; a training goes on from a checkpoint with the same ones only.
            resume: go on from an interrupted training's newest checkpoint; False: start over, and remove it.
            config: its `storage` says how object storage is reached.
        """
        self.storage, self.group, self.parts, self.resume = open_storage(place, config), group, parts, resume
        self.settings = json.loads(json.dumps(settings))
        self.run = os.environ.get(RUN_ID)

    def restore(self) -> Progress:
        """Put every part in the state of the newest valid checkpoint, and tell how far the training had come.

        Raises TrainingError if the checkpoint is of a training with other settings.
        """
        content = self.group.broadcast(self._find() if self.group.rank == 0 else None)
        if content is None:
            return Progress()
        saved = _load(content)
        for name, part in self.parts.items():
            part.load_state_dict(saved["parts"][name])
        if len(saved["random"]) == self.group.world_size:
            _set_random(saved["random"][self.group.rank])
        progress = Progress(**saved["progress"])
        progress.resumed_at.append(progress.steps)
        return progress

    def save(self, progress: Progress) -> None:
        """Write a checkpoint, and remove all older ones except the last."""
        for part in self.parts.values():
            if isinstance(part, nn.Module):
                self.group.average(part.buffers())  # what the file holds is then what every rank has
        states = self.group.gather(_get_random())
        if self.group.rank == 0:
            content = io.BytesIO()
            torch.save(
                {
                    "run": self.run,
                    "settings": self.settings,
                    "progress": dataclasses.asdict(progress),
                    "parts": {name: part.state_dict() for name, part in self.parts.items()},
                    "random": states,
                },
                content,
            )
            self.storage.write(NAME.format(progress.steps), content.getvalue())
            if note := os.environ.get(CHECKPOINT_NOTE):
                Path(note).write_text(str(progress.steps))
            for _, path in _files(self.storage)[KEPT:]:
                self.storage.delete(path)

    def clear(self) -> None:
        """Remove all checkpoints."""
        if self.group.rank == 0:
            for _, path in _files(self.storage):
                self.storage.delete(path)

    def _find(self) -> bytes | None:
        for step, path in _files(self.storage):
            try:
                content = self.storage.read(path)
                saved = _load(content)
            except Exception as error:  # for damaged bytes torch raises whatever its parsers come across
                log.warning("checkpoint %s is damaged and skipped: %s", path, first_line(error))
                continue
            # Ranks that `train_on_spark` has started again go on from their own in any case.
            if not self.resume and (self.run is None or saved["run"] != self.run):
                break
            ours, theirs = self.settings, saved["settings"]
            different = [
                f"{name} {theirs.get(name, 'unknown')} there, {ours.get(name, 'unknown')} here"
                for name in sorted({*ours, *theirs})
                if theirs.get(name) != ours.get(name)
            ]
            if different:
                raise TrainingError(
                    f"checkpoint {path} is of an unfinished training with other settings ({'; '.join(different)}): go "
                    "on with those, name another run directory, or start over without resuming, which removes it"
                )
            print(f"checkpoint of step {step}: the training goes on from here", flush=True)
            return content
        if not self.resume:
            self.clear()
        return None


def newest_step(place: str, config: Any = None) -> int:
    """Return the step of the newest checkpoint, damaged or not; 0 if there is none."""
    return next((step for step, _ in _files(open_storage(place, config))), 0)


def _files(storage: Storage) -> list[tuple[int, str]]:
    """Steps and paths, the newest first."""
    entries = storage.list() if storage.exists("") else ()
    named = [(re.search(r"step-(\d+)\.pt$", entry.path), entry.path) for entry in entries]
    return sorted(((int(step[1]), path) for step, path in named if step), reverse=True)


def _load(content: bytes) -> dict[str, Any]:
    # torch.load itself compares no checksum, so a flipped bit would be trained on.
    damaged = zipfile.ZipFile(io.BytesIO(content)).testzip()
    if damaged:
        raise zipfile.BadZipFile(f"{damaged} does not have its checksum")
    return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


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
