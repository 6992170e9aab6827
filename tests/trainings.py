"""The programs as tests call them: arguments as on the command line, in this process or in two Spark tasks."""

import contextlib
import json
import socket
from pathlib import Path
from typing import Any

import torch

import fashion_mnist
import train_yolact
from fashion_mnist import RECIPE
from helpers.config import PROJECT
from helpers.training import Group, train_on_spark

PROGRAMS = PROJECT / "notebooks" / "programs"
FASHION = ["--epochs", "2", "--batch-size", "64", "--train-images", "1280", "--test-images", "500"]
FASHION += ["--precision", "fp32"]
SMALL_RECIPE = [*RECIPE, "--epochs", "2", "--batch-size", "64", "--width", "4", "--evaluate-every", "1"]
SMALL_RECIPE += ["--precision", "fp32"]
HELD_OUT = [*SMALL_RECIPE, "--train-images", "1280", "--validation-images", "1000"]
SYNCHRONY = ["--epochs", "1", "--batch-size", "64", "--train-images", "960", "--test-images", "200"]
EPOCHS, STEPS, RATE, WARM_UP = 2, 8, 1e-3, 3  # of the scenes
SCENES = ["--epochs", str(EPOCHS), "--batch-size", "8", "--train-scenes", str(8 * STEPS), "--validation-scenes", "4"]
SCENES += ["--learning-rate", str(RATE), "--warm-up-steps", str(WARM_UP), "--precision", "fp32"]
# What two Spark tasks train, one after the other in one start of the ranks: it takes far longer than a training does.
TOGETHER = {
    "fashion": ["fashion_mnist.py", *FASHION],
    "recipe": ["fashion_mnist.py", *HELD_OUT],
    "all-reduce": ["synchrony.py", *SYNCHRONY],
    "local-1": ["synchrony.py", *SYNCHRONY, "--synchrony", "local", "--every", "1"],
    "local-5": ["synchrony.py", *SYNCHRONY, "--synchrony", "local", "--every", "5"],
    "scenes": ["train_yolact.py", *SCENES],
}
ONE_BY_ONE = """
import contextlib, io, json, os, runpy, sys

results = []
for port, program, *arguments in json.loads(sys.argv[1]):
    # A rank that is early would meet the others where they met for the training before.
    os.environ["MASTER_PORT"], sys.argv = str(port), [program, *arguments]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        runpy.run_path(program, run_name="__main__")
    results += printed.getvalue().splitlines()[-1:]  # nothing of the second rank
if os.environ["RANK"] == "0":
    print(json.dumps({"results": [*map(json.loads, results)]}))
"""


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


def train_together(spark: Any, data: str, folder: Path) -> dict[str, tuple[str, dict[str, Any]]]:
    """Make all trainings of `TOGETHER` in two Spark tasks; the run directory and the result of each."""
    runs = {name: str(folder / name) for name in TOGETHER}
    with contextlib.ExitStack() as stack:
        ports = [stack.enter_context(socket.create_server(("", 0))).getsockname()[1] for _ in runs]
    commands = [
        [port, str(PROGRAMS / program), *arguments, *places(data, runs[name])]
        for port, (name, (program, *arguments)) in zip(ports, TOGETHER.items(), strict=True)
    ]
    (folder / "one_by_one.py").write_text(ONE_BY_ONE)
    told = train_on_spark(spark, folder / "one_by_one.py", [json.dumps(commands)], processes=2)
    assert told is not None
    return {name: (run, result) for (name, run), result in zip(runs.items(), told["results"], strict=True)}
