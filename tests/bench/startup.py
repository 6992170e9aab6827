"""When each step of a small run ends, from the start of the command to its end; its processor time and memory.

    PYTHONPATH=notebooks:tests .venv/bin/python tests/bench/startup.py [--project FOLDER ...] [--mode MODE ...]

Each run is a command of its own over photographs, with a light classifier. The steps are read from what a run records
and from the starts of its processes, so that the command is the product's own. Of several projects, such as two
checkouts, or of several values of `spark.mode`, each repeat runs all, one after the other. Use a machine that does
nothing else meanwhile.
"""

import argparse
import json
import os
import platform
import sys
import tempfile
import uuid
from datetime import UTC, date, datetime
from itertools import product
from pathlib import Path

import pandas as pd
import psutil
import pyarrow.compute as pc
import pyarrow.parquet as pq
from measure import measure

from helpers.config import PROJECT
from studies.workloads import make_bundle, make_photographs

STEPS = {"open": "workers ready", "pass": "last task", "publish": "results published", "log": "page and dashboard"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir(), "spark-vision-bench"))
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--project", type=Path, action="append", help="with helpers in it; by default this one")
    parser.add_argument("--mode", action="append", help="spark.mode; by default local")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    photographs = make_photographs(options.work / f"photos-{options.images}", options.images)
    make_bundle("light", options.work)
    projects = [project.resolve() for project in options.project or [PROJECT]]
    rows = []
    for _ in range(options.repeats):
        for project, mode in product(projects, options.mode or ["local"]):
            output = options.work / f"startup-{uuid.uuid4().hex[:8]}"
            steps = time_run(project, mode, photographs, options.work / "light", output)
            rows.append({"project": project.name, "mode": mode, **steps})
    table = pd.DataFrame(rows).groupby(["project", "mode"], sort=False).median().T.round(2)
    print(f"{date.today()}, {platform.machine()}, {psutil.cpu_count()} cores, medians of {options.repeats}\n")
    print(table.to_string())


def time_run(project: Path, mode: str, photographs: Path, model: Path, output: Path) -> dict[str, float]:
    """Seconds from the start of one command to each of its steps; then processor seconds and peak memory in MB."""
    os.environ["PYTHONPATH"] = str(project)
    command = [sys.executable, "-m", "helpers", "run", "--source", photographs, "--model", model, "--output", output]
    taken = measure([*map(str, command), "--set", f"spark.mode={mode}"])
    (record,) = (output / "runs").glob("*.json")
    run, tasks = json.loads(record.read_text()), pq.read_table(record.with_suffix(".parquet"))
    python = sorted(start for name, start in taken.children if name.startswith("python"))
    first = pc.min(tasks["started"]).as_py().replace(tzinfo=UTC)
    moments = {
        "session": datetime.fromisoformat(run["started"]).timestamp(),
        **{step: datetime.fromisoformat(run[f"{phase}_ended"]).timestamp() for phase, step in STEPS.items()},
        "first task": first.timestamp(),
    }
    steps = {step: moment - taken.started for step, moment in moments.items()}
    steps["end of the command"] = taken.wall_seconds
    if taken.children:  # on Sail there is none
        steps["first process"] = min(start for _, start in taken.children)
        steps["first worker"] = python[-run["workers"]]  # the others before it are Spark's daemon, and its launcher's
    steps = dict(sorted(steps.items(), key=lambda item: item[1]))
    loading = pc.max(tasks["load_seconds"]).as_py()
    return {**steps, "of it loading the model": loading, "CPU, s": taken.cpu_seconds, "peak, MB": taken.peak_megabytes}


if __name__ == "__main__":
    main()
