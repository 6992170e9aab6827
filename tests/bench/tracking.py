"""What MLflow costs a run, and how much slower MLflow's own Spark UDF is than a run, on this machine.

    PYTHONPATH=notebooks:tests .venv/bin/python tests/bench/tracking.py [--work FOLDER] [--images 1000] [--repeats 5]

A server of MLflow runs beside it. Runs with and without it take turns in one session; ratios are of medians. Processor
time is that of this process, the JVM and the workers, without the server.
"""

import argparse
import contextlib
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import mlflow
import psutil
from mlflow_server import start_mlflow
from pyspark.sql import SparkSession, functions

from helpers import pipeline
from helpers.bundle.manifest import load_bundle
from helpers.config import load_config
from helpers.export.registration import publish
from helpers.session import get_spark
from helpers.storage import open_storage
from studies.workloads import make_bundle, make_photographs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir(), "spark-vision-bench"))
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    images = str(make_photographs(options.work / f"photos-{options.images}", options.images))
    make_bundle("light", options.work)
    taken: dict[str, list[tuple[float, ...]]] = {"off": [], "on": [], "udf": []}
    with tempfile.TemporaryDirectory() as folder, start_mlflow(Path(folder)) as uri:
        os.environ["MLFLOW_TRACKING_URI"] = uri
        settings = {"paths.models": folder, "paths.runs": folder, "resume": False}
        servers = {"off": "off", "on": uri}
        configs = {name: load_config("local", **settings, **{"tracking.mlflow": at}) for name, at in servers.items()}
        publish(load_bundle(open_storage(str(options.work / "light"))), configs["on"], "light")
        servers_own = {process.pid for process in psutil.Process().children(recursive=True)}
        spark = get_spark(configs["off"])
        as_json = {"result_type": "string", "params": {"format": "json"}}
        predict = mlflow.pyfunc.spark_udf(spark, "models:/light/1", env_manager="local", **as_json)
        for turn in range(options.repeats + 1):
            for name, config in configs.items():
                run = partial(pipeline.run, spark, images, str(options.work / "light"), f"{folder}/{name}", config)
                *seconds, summary = measure(run, servers_own)
                taken[name].append((*seconds, sum(record["cpu_seconds"] for record in summary.records)))
            taken["udf"].append(measure(partial(run_udf, spark, images, predict), servers_own)[:2])
            print(turn, {name: values[-1] for name, values in taken.items()}, flush=True)
    # The first ones load the model.
    off, on, udf = ([statistics.median(each) for each in zip(*turns[1:], strict=True)] for turns in taken.values())
    print(f"{on[0] / off[0]:.2f}  wall time of a run with MLflow, of one without")
    print(f"{on[1] / off[1]:.2f}  processor time of a run with MLflow, of one without")
    print(f"{udf[0] / off[0]:.2f}  wall time of MLflow's Spark UDF, of a run")
    print(f"{udf[1] / off[1]:.2f}  processor time of MLflow's Spark UDF, of a run")
    print(f"{udf[1] / off[2]:.2f}  processor time of MLflow's Spark UDF, of a run's tasks")


def run_udf(spark: SparkSession, images: str, predict) -> None:
    """Predict all images, in as many tasks as a run has."""
    paths = [(str(path),) for path in sorted(Path(images).iterdir())]
    table = spark.createDataFrame(paths, "path string").repartition(4)
    table.select(predict(functions.struct("path"))).write.format("noop").mode("overwrite").save()


def measure(work: Callable[[], Any], left_out: set[int]) -> tuple[float, float, Any]:
    """Seconds and processor seconds of some work, here and in the children that are not left out; and its result."""
    before, start = processor_seconds(left_out), time.perf_counter()
    result = work()
    wall, after = time.perf_counter() - start, processor_seconds(left_out)
    processor = sum(seconds - before.get(pid, 0.0) for pid, seconds in after.items())
    return round(wall, 2), round(processor, 2), result


def processor_seconds(left_out: set[int]) -> dict[int, float]:
    """Of each process, by its number."""
    own, seconds = psutil.Process(), {}
    for process in [own, *own.children(recursive=True)]:
        if process.pid not in left_out:
            with contextlib.suppress(psutil.NoSuchProcess):
                times = process.cpu_times()
                seconds[process.pid] = times.user + times.system
    return seconds


if __name__ == "__main__":
    main()
