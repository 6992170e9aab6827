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
from pathlib import Path

from helpers.config import PROJECT, load_config
from helpers.session import get_spark
from helpers.tracking.tensorboard import read_scalars
from helpers.training import train_on_spark

PROGRAM = PROJECT / "notebooks" / "programs" / "fashion_mnist.py"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--master", default="local[2]", help="two slots, of a cluster for example")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--quick", action="store_true", help="one round of little data, to see whether it works")
    options = parser.parse_args()
    cluster = not options.master.startswith("local")
    spark = get_spark(load_config("cluster" if cluster else "local", **{"spark.master": options.master}))
    arguments = ["--epochs", str(options.epochs), "--data", load_config("local").paths.data]
    arguments += ["--train-images", "6400", "--test-images", "1000"] if options.quick else []
    rounds = []
    for seed in range(1 if options.quick else options.rounds):
        told = [*arguments, "--seed", str(seed)]
        rounds.append(
            {
                "torchrun": measure(lambda run, t=told: start(TORCHRUN, [*t, *run])),
                "spark": measure(lambda run, t=told: train_on_spark(spark, PROGRAM, [*t, *run], processes=2)),
                "one": measure(lambda run, t=told: start([sys.executable], [*t, *run])),
            }
        )
    print(json.dumps(compare(rounds) | {"master": options.master, "rounds": rounds}))


def start(command: list[str], arguments: list[str]) -> None:
    subprocess.run([*command, str(PROGRAM), *arguments], check=True, cwd=PROJECT, stdout=subprocess.DEVNULL)


def measure(run) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        called = time.time()
        run(["--run-dir", folder])
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
