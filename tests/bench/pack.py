"""What the packed environment adds to a run's start: workers that unpack it beside workers that have the packages.

    PYTHONPATH=.:notebooks:tests .venv/bin/python tests/bench/pack.py [--work FOLDER] [--repeats 3]

A standalone cluster of two one-core workers on this machine. Every run is a command of its own over a few photographs,
so its executors are new and unpack the archive; shipping it over a network is not in the times. Under two minutes.
"""

import argparse
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from datetime import date
from pathlib import Path

import psutil
from cluster import start_run

from conf import pack
from studies.cluster import Cluster
from studies.workloads import make_bundle, make_photographs

PHOTOGRAPHS = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir(), "spark-vision-bench"))
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    work = options.work / f"pack-{uuid.uuid4().hex[:8]}"
    work.mkdir(parents=True)
    photographs = make_photographs(options.work / f"photos-{PHOTOGRAPHS}", PHOTOGRAPHS)
    make_bundle("light", options.work)
    start = time.perf_counter()
    archive = pack.pack(work / "vision.tar.gz")
    making = time.perf_counter() - start
    bare = work / "bare"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(bare)], check=True)
    ways = {"packages on the workers": sys.executable, "packed environment": str(bare / "bin" / "python")}
    seconds = {way: [] for way in ways}
    for way, python in ways.items():
        os.environ["PYSPARK_PYTHON"] = python
        cluster = Cluster(work / way.replace(" ", "-"))
        cluster.complete()
        os.environ.pop("PYSPARK_PYTHON")
        shipped = [] if python == sys.executable else [f"spark.environment={archive}"]
        for repeat in range(options.repeats):
            place = cluster.folder / f"run{repeat}"
            start = time.perf_counter()
            run = start_run(
                photographs, str(options.work / "light"), place, place.with_suffix(".log"), *cluster.assignments,
                *shipped, "pictures=0", profile="cluster",
            ).finish()  # fmt: skip
            assert run.summary["ok"] == PHOTOGRAPHS, run.errors
            seconds[way].append(time.perf_counter() - start)
        cluster.stop()
    print(f"{date.today()}, {platform.machine()}, {psutil.cpu_count()} cores, medians of {options.repeats}\n")
    print(f"{archive.stat().st_size / 2**20:8.0f}  MiB, the archive; made in {making:.0f} s")
    for way, times in seconds.items():
        print(f"{statistics.median(times):8.1f}  s, a whole command, {way}")


if __name__ == "__main__":
    main()
