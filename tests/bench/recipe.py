"""What the recipe for Fashion-MNIST reaches, and what it takes: the numbers of the README and of notebook 09.

    python tests/bench/recipe.py [--seeds 0 1 2] [--processes 1] [--output notebooks/weights] [--data out/data]

Trains with each seed on all training images with one thread, evaluates each once on the test images, and writes to the
output `fashion_resnet.json` (accuracy, CPU-minutes, machine, date) and `fashion_resnet.pt` (the first seed's weights).
CPU-minutes are the process's user and system time, from reading the data to the last event of TensorBoard. About eleven
minutes a seed; with several processes at a time each takes a little more of its own.
"""

import argparse
import json
import platform
import re
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from datetime import date
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from helpers.config import PROJECT

sys.path.insert(0, str(PROJECT / "notebooks" / "programs"))
from fashion_mnist import RECIPE, parse, train  # noqa: E402

KEPT = ("test_accuracy", "parameters")


def main(seeds: list[int], processes: int, data: str, output: Path) -> None:
    with ProcessPoolExecutor(processes, get_context("spawn"), max_tasks_per_child=1) as pool:
        runs = list(pool.map(partial(run, data, output, seeds[0]), seeds))
    measured: dict[str, Any] = {
        "date": date.today().isoformat(),
        "by": f"tests/bench/recipe.py --processes {processes}",
        "machine": describe_machine(),
        "mean_test_accuracy": float(np.mean([run["test_accuracy"] for run in runs])),
        "most_cpu_minutes": max(run["cpu_minutes"] for run in runs),
        "runs": runs,
        "settings": vars(parse(RECIPE)),
    }
    (output / "fashion_resnet.json").write_text(json.dumps(measured, indent=1) + "\n")
    print(f"{measured['date']}, {measured['machine']}")
    print(f"mean accuracy {measured['mean_test_accuracy']:.4f}, at most {measured['most_cpu_minutes']:.1f} CPU-minutes")


def run(data: str, output: Path, kept: int, seed: int) -> dict[str, Any]:
    """Train once; in half precision, weights give the same accuracy and take half the room."""
    before = time.process_time()
    with tempfile.TemporaryDirectory() as run_dir:
        result = train(parse([*RECIPE, "--seed", str(seed), "--data", data, "--run-dir", run_dir]))
        if seed == kept:
            weights = torch.load(Path(run_dir, "checkpoint.pt"), weights_only=True)
            halves = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in weights.items()}
            torch.save(halves, output / "fashion_resnet.pt")
    done = {"seed": seed, "cpu_minutes": (time.process_time() - before) / 60, **{name: result[name] for name in KEPT}}
    print(json.dumps(done), flush=True)
    return done


def describe_machine() -> str:
    model = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    memory = psutil.virtual_memory().total / 2**30
    units = [unit for unit in ("avx512_bf16", "amx_bf16") if torch.cpu.get_capabilities().get(unit)]
    processor = model[1] if model else platform.machine()
    return f"{processor}, {psutil.cpu_count()} cores, {memory:.0f} GiB, {' '.join(units) or 'no bfloat16'}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--data", default=str(PROJECT / "out" / "data"))
    parser.add_argument("--output", type=Path, default=PROJECT / "notebooks" / "weights")
    parser.add_argument("--processes", type=int, default=1, help="seeds trained at the same time")
    options = parser.parse_args()
    main(options.seeds, options.processes, options.data, options.output)
