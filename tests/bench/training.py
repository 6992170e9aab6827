"""Training on Spark against torchrun with the same code, and two processes against one; prints one JSON line.

Ratios are of runs that follow each other, the median of the rounds: `throughput_ratio` is Spark's images/s over
torchrun's, both with two processes of one thread; `startup_over_torchrun` the seconds from the call to the first step,
less torchrun's, with a session that is there already; `accuracy_difference` the mean test accuracy with two processes
less that with one, at the same global batch, in points.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

from helpers.data import fashion_mnist
from helpers.training.classifier import TrainingSettings, train
from helpers.training.dashboards import read_scalars
from helpers.training.distributed import train_on_spark

from helpers.config import PROJECT, load_config
from helpers.session import get_spark

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--master", default="local[2]", help="two slots, of a cluster for example")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--quick", action="store_true", help="one round of little data, to see whether it works")
    parser.add_argument("--rank", nargs=3, metavar=("SETTINGS", "DATA", "RUN"), help="be one process of a run")
    options = parser.parse_args()
    if options.rank:
        train(TrainingSettings(**json.loads(options.rank[0])), *options.rank[1:])
        return
    data = load_config("local").paths.data
    fashion_mnist.download(data)
    cluster = not options.master.startswith("local")
    spark = get_spark(load_config("cluster" if cluster else "local", **{"spark.master": options.master}))
    few = {"train_images": 6400, "test_images": 1000} if options.quick else {}
    rounds = []
    for seed in range(1 if options.quick else options.rounds):
        settings = TrainingSettings(epochs=options.epochs, seed=seed, **few)
        rounds.append(
            {
                "torchrun": measure(lambda run, s=settings: start(TORCHRUN, s, data, run)),
                "spark": measure(lambda run, s=settings: train_on_spark(spark, s, data, run, processes=2)),
                "one": measure(lambda run, s=settings: start([sys.executable], s, data, run)),
            }
        )
    print(json.dumps(compare(rounds) | {"master": options.master, "rounds": rounds}))


def start(command: list[str], settings: TrainingSettings, data: str, run: str) -> None:
    rank = ["--rank", json.dumps(asdict(settings)), data, run]
    subprocess.run([*command, str(Path(__file__)), *rank], check=True, cwd=PROJECT, stdout=subprocess.DEVNULL)


def measure(run) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        called = time.time()
        run(folder)
        result = json.loads(Path(folder, "result.json").read_text())
        first_step = read_scalars(folder)["train/loss"]["wall_time"].iloc[0]
    return {
        "images_per_second": result["images_per_second"],
        "startup_seconds": first_step - called,
        "test_accuracy": result["test_accuracy"],
        "processes": result["processes"],
    }


def compare(rounds: list[dict]) -> dict[str, float]:
    def median(value) -> float:
        return statistics.median(value(one) for one in rounds)

    two = statistics.mean(one[name]["test_accuracy"] for one in rounds for name in ("torchrun", "spark"))
    alone = statistics.mean(one["one"]["test_accuracy"] for one in rounds)
    return {
        "throughput_ratio": median(lambda r: r["spark"]["images_per_second"] / r["torchrun"]["images_per_second"]),
        "startup_over_torchrun": median(lambda r: r["spark"]["startup_seconds"] - r["torchrun"]["startup_seconds"]),
        "accuracy_difference": 100 * (two - alone),
        "speed_of_two_over_one": median(lambda r: r["spark"]["images_per_second"] / r["one"]["images_per_second"]),
    }


if __name__ == "__main__":
    main()
