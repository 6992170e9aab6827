"""The programs as tests call them: arguments as on the command line, in this process."""

from pathlib import Path
from typing import Any

import torch

import fashion_mnist
import train_yolact
from helpers.config import PROJECT
from helpers.training import Group

PROGRAMS = PROJECT / "notebooks" / "programs"


def alone(rank: int = 0, world_size: int = 1) -> Group:
    """A rank that nobody has to be asked for."""
    return Group(rank, world_size, torch.device("cpu"))


def places(data: str, run_dir: Any = None) -> list[str]:
    """The arguments that say where."""
    return ["--data", data, *(["--run-dir", str(run_dir)] if run_dir else [])]


def train_fashion(arguments: list[str], data: str, run_dir: Any = None, report: Any = None) -> dict[str, Any]:
    return fashion_mnist.train(fashion_mnist.parse([*arguments, *places(data, run_dir)]), report)


def train_scenes(arguments: list[str], data: str, run_dir: Any) -> dict[str, Any]:
    return train_yolact.train(train_yolact.parse([*arguments, *places(data, run_dir)]))


def weights(run_dir: Any) -> dict[str, torch.Tensor]:
    return torch.load(Path(run_dir, "checkpoint.pt"), weights_only=True)
