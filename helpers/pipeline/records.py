"""What each run took, kept beside its results, to look at and to plan the next by (`helpers.planning.planner`).

    OUTPUT/runs/RUN.parquet   one row per task, `task.RECORD_SCHEMA`
    OUTPUT/runs/RUN.json      the run: configuration, versions, model, slots, seconds of each phase, totals

Both are written before the results are published, because what a killed driver leaves staged is published by the next
run: so no published task is without its record, unless the driver died before it had them all. The seconds that only
the end can tell are null until then. No setting that can hold a secret is written.
"""

import json
import platform
import time
from collections.abc import Iterable
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from helpers.config import Config
from helpers.errors import DataError
from helpers.pipeline.task import RECORD_SCHEMA, Task
from helpers.session import shown_master
from helpers.storage import Storage, open_storage
from helpers.storage.parquet import read_table, write_table

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

RUNS = "runs"
PACKAGES = ("pyspark", "openvino", "opencv-python-headless", "numpy", "pyarrow")
SECTIONS = (
    "source",
    "reader",
    "resume",
    "pictures",
    "ingest",
    "partitioning",
    "inference",
    "results",
    "tiling",
    "cascade",
    "postprocess",
)
# Anything else below spark.conf may be an account's key under a name of its owner's choice.
SHOWN_SETTINGS = ("spark.executor.", "spark.task.", "spark.cores.", "spark.speculation", "spark.dynamicAllocation.")
PHASES = [f"{name}_seconds" for name in ("session", "open", "list", "pass", "publish", "log")] + ["seconds"]


class Stopwatch:
    """Seconds of the phases of a run and when each ended; a phase may come twice."""

    def __init__(self) -> None:
        self.started = datetime.now(UTC)
        self._start = self._last = time.perf_counter()
        self.laps: dict[str, Any] = {}

    def lap(self, phase: str) -> float:
        """End a phase, and return its seconds."""
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        self.laps[f"{phase}_seconds"] = self.laps.get(f"{phase}_seconds", 0.0) + seconds
        self.laps[f"{phase}_ended"] = datetime.now(UTC).isoformat()
        self.laps["seconds"] = now - self._start
        return seconds


def describe(
    task: Task,
    spark: "SparkSession",
    config: Config,
    slots: int,
    watch: Stopwatch,
    tasks: pa.Table,
    session_seconds: float | None,
) -> dict[str, Any]:
    """What `RUN.json` holds.

    Args:
        task: the run's.
        spark: its session.
        config: its settings; those that cannot hold a secret are taken.
        slots: how many tasks ran at once.
        watch: what its phases have taken so far.
        tasks: what they have told, `task.RECORD_SCHEMA`.
        session_seconds: from the start of the process until there was a session; None where one was there already.
    """
    return {
        "run": task.run,
        "started": watch.started.isoformat(),
        "source": task.source.root,
        "output": task.output.root,
        "model": " and ".join(model.identity for model in task.models),
        "bundle": " and ".join(model.bundle.manifest.digest for model in task.models),
        "flops": task.flops,
        "slots": slots,  # as planned for
        "workers": tasks.select(["host", "process"]).group_by(["host", "process"]).aggregate([]).num_rows,
        "partitions": tasks.num_rows,
        **{name: pc.sum(tasks[name]).as_py() or 0 for name in ("images", "failed", "bytes")},
        "retries": pc.sum(tasks["attempt"]).as_py() or 0,
        "session_seconds": session_seconds,
        **dict.fromkeys(PHASES[1:]),
        **watch.laps,
        "seconds": None,
        "spark": spark.version,
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "config": shown_settings(config),
    }


def shown_settings(config: Config) -> dict[str, Any]:
    """The settings that cannot hold a secret."""
    values = config.model_dump(mode="json")
    spark = values["spark"]
    return {
        **{section: values[section] for section in SECTIONS},
        "spark": {
            "mode": spark["mode"],
            "master": shown_master(config),
            "task_attempts": spark["task_attempts"],
            "conf": {key: value for key, value in spark["conf"].items() if key.startswith(SHOWN_SETTINGS)},
        },
    }


def task_table(records: Iterable[dict[str, Any]]) -> pa.Table:
    """What tasks have told, as a table (`task.RECORD_SCHEMA`)."""
    # Spark gives naive timestamps in the driver's zone, Arrow would take them for UTC.
    rows = [{**record, "started": record["started"].astimezone(UTC)} for record in records]
    return pa.Table.from_pylist(rows, schema=RECORD_SCHEMA)


def write_record(storage: Storage, run: dict[str, Any], tasks: pa.Table | None = None) -> None:
    """Write `RUN.json`, in place of what it said before, and `RUN.parquet` ahead of it where tasks have told something.

    Args:
        storage: the output.
        run: what `describe` says.
        tasks: `task.RECORD_SCHEMA`.
    """
    if tasks:
        write_table(storage, f"{RUNS}/{run['run']}.parquet", tasks)
    storage.write(f"{RUNS}/{run['run']}.json", json.dumps(run, indent=2).encode())


def read_runs(locations: str | Iterable[str], config: Config | None = None) -> pd.DataFrame:
    """The runs recorded below some locations, one row each, the oldest first.

    Args:
        locations: outputs of runs, their `runs` folders, or folders above them.
        config: says how object storage is reached.

    Raises:
        DataError: there is no record, or one is damaged.
        StorageError: a location cannot be used.
    """
    rows = []
    for storage, path in _find(locations, config):
        try:
            values = json.loads(storage.read(path))
        except ValueError as error:
            raise DataError(f"{path} is not the record of a run ({error}); remove it, or copy it again") from None
        rows.append({**values, "master": values["config"]["spark"]["master"], "file": path})
    if not rows:
        shown = locations if isinstance(locations, str) else ", ".join(locations)
        raise DataError(f"no records of runs below {shown}; name the --output of a run, which has them in {RUNS}/")
    table = pd.DataFrame(rows).drop_duplicates("run").sort_values("run", ignore_index=True)
    times = [name for name in table if name == "started" or name.endswith("_ended")]
    table[times] = table[times].apply(pd.to_datetime, utc=True, format="ISO8601")
    # A run that was killed, or found a session, has nulls, which must not make text of numbers.
    return table.astype(dict.fromkeys(PHASES, float))


def read_tasks(locations: str | Iterable[str], config: Config | None = None) -> pd.DataFrame:
    """The tasks of all those runs as one table: `task.RECORD_SCHEMA`, and what else tells them apart.

    That is `run`, `output`, `master` and `slots` of their run, and `begin` and `end`, seconds since the pass of the run
    began. Raises as `read_runs` does.
    """
    runs, tables = read_runs(locations, config), []
    files = {path: storage for storage, path in _find(locations, config)}
    for run in runs.itertuples():
        table = read_table(files[run.file], run.file.removesuffix(".json") + ".parquet").to_pandas()
        began = run.pass_ended - pd.Timedelta(seconds=run.pass_seconds)
        begin = (table["started"] - began).dt.total_seconds()
        extra = {"run": run.run, "output": run.output, "master": run.master, "slots": run.slots, "begin": begin}
        tables.append(table.assign(**extra, end=begin + table["seconds"]))
    return pd.concat(tables, ignore_index=True)


def _find(locations: str | Iterable[str], config: Config | None) -> list[tuple[Storage, str]]:
    """Storages, and paths of the runs' descriptions in them."""
    files = []
    for location in [locations] if isinstance(locations, str) else locations:
        storage = open_storage(location, config)
        folder = RUNS if storage.exists(RUNS) else ""
        names = [entry.path for entry in storage.list(folder) if entry.path.endswith(".json")]
        # Of a folder above outputs, which have other files of JSON too: the log of the table.
        files += [(storage, name) for name in names if name.rpartition("/")[0].endswith(f"/{RUNS}")]
    return files


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:  # a runtime with another build of it, such as opencv-python
        return None
