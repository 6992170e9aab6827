"""What MLflow costs a run, and how much slower MLflow's own Spark UDF is than a run, on this machine.

    PYTHONPATH=notebooks:tests .venv/bin/python tests/bench/tracking.py [--work FOLDER] [--images 1000] [--repeats 5]

A server of MLflow runs beside it. Runs with and without it take turns in one session; the ratios are of medians.
"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

import mlflow
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
    seconds: dict[str, list[float]] = {"off": [], "on": [], "udf": []}
    with tempfile.TemporaryDirectory() as folder, start_mlflow(Path(folder)) as uri:
        os.environ["MLFLOW_TRACKING_URI"] = uri
        settings = {"paths.models": folder, "paths.runs": folder, "resume": False}
        servers = {"off": "off", "on": uri}
        configs = {name: load_config("local", **settings, **{"tracking.mlflow": at}) for name, at in servers.items()}
        publish(load_bundle(open_storage(str(options.work / "light"))), configs["on"], "light")
        spark = get_spark(configs["off"])
        as_json = {"result_type": "string", "params": {"format": "json"}}
        predict = mlflow.pyfunc.spark_udf(spark, "models:/light/1", env_manager="local", **as_json)
        for turn in range(options.repeats + 1):
            for name, config in configs.items():
                start = time.perf_counter()
                pipeline.run(spark, images, str(options.work / "light"), f"{folder}/{name}", config)
                seconds[name].append(time.perf_counter() - start)
            seconds["udf"].append(run_udf(spark, images, predict))
            print(turn, {name: round(values[-1], 2) for name, values in seconds.items()}, flush=True)
    medians = {name: statistics.median(values[1:]) for name, values in seconds.items()}  # the first ones load the model
    print(f"{medians['on'] / medians['off']:.2f}  time of a run with MLflow, of one without")
    print(f"{medians['udf'] / medians['off']:.2f}  time of MLflow's Spark UDF, of a run")


def run_udf(spark: SparkSession, images: str, predict) -> float:
    """Seconds of the predictions of all images, in as many tasks as a run has."""
    start = time.perf_counter()
    paths = [(str(path),) for path in sorted(Path(images).iterdir())]
    table = spark.createDataFrame(paths, "path string").repartition(4)
    table.select(predict(functions.struct("path"))).write.format("noop").mode("overwrite").save()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
