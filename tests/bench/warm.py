"""Several runs in one session; prints one JSON line with the rate of the later ones, and what 64 partitions cost."""

import argparse
import json
import statistics

import psutil

from helpers import pipeline
from helpers.config import load_config
from helpers.session import get_spark

FEW, MANY = 4, 64


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--source", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--output", required=True)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tasks", action="store_true", help="also compare few partitions with many")
    options = parser.parse_args()
    spark = get_spark(load_config("local"))
    once(spark, options, None)  # compiles, loads the model
    rates = [once(spark, options, None)[0] for _ in range(options.repeats)]
    answer = {"images_per_second": statistics.median(rates)}
    if options.tasks:
        runs = [(once(spark, options, FEW), once(spark, options, MANY)) for _ in range(options.repeats)]
        few, many = (
            [statistics.median(values) for values in zip(*run, strict=True)] for run in zip(*runs, strict=True)
        )
        answer["many_partitions_slowdown"] = few[0] / many[0]
        answer["task_cpu_milliseconds"] = 1000 * (many[1] - few[1]) / (MANY - FEW)
    print(json.dumps(answer))


def once(spark, options, partitions) -> tuple[float, float]:
    """Images/s of the pass and processor seconds of the process tree."""
    overrides = {"partitioning.partitions": partitions} if partitions else {}
    config = load_config("local", resume=False, **overrides)
    before = tree_seconds()
    summary = pipeline.run(spark, options.source, options.model, options.output, config)
    return summary.images_per_second, tree_seconds() - before


def tree_seconds() -> float:
    """Processor seconds of this process and all below it, so far."""
    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
    return sum(sum(p.cpu_times()[:2]) for p in processes if p.is_running())


if __name__ == "__main__":
    main()
