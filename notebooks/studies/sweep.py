"""Several runs in one Spark session, in a separate process, because sessions of different masters cannot share one.

Each run leaves its record beside its results (`helpers.pipeline.records`), in place of those of earlier sweeps. The
first run of each model runs twice and keeps its second record. So all records are comparable: the session is warm, and
the workers have their model.
"""

import contextlib
import json
import logging
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import psutil

from helpers.config import PROJECT
from helpers.errors import RunError
from helpers.pipeline.records import RUNS
from helpers.storage import open_storage
from studies.cluster import held_to, slowed


def sweep(settings: Mapping[str, Any], runs: Sequence[Mapping[str, Any]], cores: int | None = None) -> None:
    """Make runs one after the other in a new process.

    Args:
        settings: of the session, as `load_config` takes them.
        runs: `source`, `model` and `output` of each, and its own settings. For a slower worker also `slowed`: the id of
            its process and the share of the time that it may run (`cluster.slowed`).
        cores: how many cores the process and its children may use; None for all. `local[1]` alone
            means one task at a time, whose threads and JVM may take more than one core.

    Raises:
        RunError: the process failed; the message has the end of its output.
    """
    job = json.dumps({"settings": dict(settings), "runs": [dict(run) for run in runs]})
    command = [sys.executable, "-m", "studies.sweep"]
    environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
    with contextlib.nullcontext() if cores is None else held_to(range(cores)):
        process = subprocess.run(
            command,
            cwd=PROJECT / "notebooks",
            env=environment,
            input=job,
            capture_output=True,
            text=True,
            check=False,
        )
    if process.returncode:
        raise RunError(
            f"the runs on {settings.get('spark.master', 'the default master')} failed:\n{process.stderr[-2000:]}"
        )


def main() -> None:
    """Read a job from standard input and do it."""
    from helpers.config import load_config
    from helpers.session import get_spark, starting

    logging.basicConfig(level=logging.WARNING)
    job = json.load(sys.stdin)
    shared = {"pictures": 0, "report": 0, **job["settings"], "resume": False}
    session = load_config(**shared)
    with starting(session):
        from helpers import pipeline
    spark = get_spark(session)
    first = {run["model"]: run for run in reversed(job["runs"])}
    for run in [*first.values(), *job["runs"]]:
        own = {name: value for name, value in run.items() if name not in ("source", "model", "output", "slowed")}
        config = load_config(**{**shared, **own})
        open_storage(run["output"], config).delete(RUNS)
        worker, share = run.get("slowed", (None, 1.0))
        with slowed(psutil.Process(worker), share) if worker else contextlib.nullcontext():
            pipeline.run(spark, run["source"], run["model"], run["output"], config)
    spark.stop()


if __name__ == "__main__":
    main()
