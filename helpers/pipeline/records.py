"""What each run took, kept beside its results, to look at and to plan the next by (`helpers.planning.planner`).

    OUTPUT/runs/RUN.parquet   one row per task, `TASK_SCHEMA`
    OUTPUT/runs/RUN.json      the run: configuration, versions, model, slots, seconds of each phase, totals

Both are written before the results are published, because what a killed driver leaves staged is published by the next
run: so no published task is without its record, unless the driver died before it had them all. The seconds that only
the end can tell are null until then. No setting that can hold a secret is written.
"""

import contextlib
import json
import platform
import time
from collections.abc import Iterable
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import pandas as pd
import pyarrow as pa

from helpers.config import Config
from helpers.errors import DataError
from helpers.pipeline.task import RECORD_SCHEMA
from helpers.session import shown_master
from helpers.storage import Storage, open_storage
from helpers.storage.parquet import read_table, write_table

RUNS = "runs"
PACKAGES = ("pyspark", "openvino", "opencv-python-headless", "numpy", "pyarrow")
SECTIONS = {"source", "reader", "resume", "pictures", "ingest", "partitioning", "inference", "results", "tiling"}
SECTIONS |= {"cascade", "postprocess"}
# Anything else below spark.conf may be an account's key under a name of its owner's choice.
SHOWN_SETTINGS = ("spark.executor.", "spark.task.", "spark.cores.", "spark.speculation", "spark.dynamicAllocation.")
# What is kept of each task: its texts on rows and predictions are longer than all else, and are for its slice's commit.
TASK_SCHEMA = pa.schema([field for field in RECORD_SCHEMA if field.name not in ("statistics", "distribution")])
PHASES = [f"{name}_seconds" for name in ("session", "open", "list", "pass", "publish", "log")] + ["seconds"]


class Stopwatch:
    """Seconds of the phases of a run and when each ended; a phase may come twice."""

    def __init__(self) -> None:
        self.started = datetime.now(UTC)
        self._start = self._last = time.perf_counter()
        self.laps: dict[str, Any] = {}

    def lap(self, phase: str) -> None:
        """End a phase."""
        now = time.perf_counter()
        self.laps[f"{phase}_seconds"] = self.laps.get(f"{phase}_seconds", 0.0) + now - self._last
        self.laps[f"{phase}_ended"] = datetime.now(UTC).isoformat()
        self.laps["seconds"], self._last = now - self._start, now


def shown_settings(config: Config) -> dict[str, Any]:
    """The settings that cannot hold a secret."""
    values = config.model_dump(mode="json", include=SECTIONS)
    conf = {key: value for key, value in config.spark.conf.items() if key.startswith(SHOWN_SETTINGS)}
    spark = {"mode": config.spark.mode, "master": shown_master(config), "task_attempts": config.spark.task_attempts}
    return values | {"spark": spark | {"conf": conf}}


def task_table(records: Iterable[dict[str, Any]]) -> pa.Table:
    """What is kept of what tasks have told (`task.RECORD_SCHEMA`), as a table (`TASK_SCHEMA`)."""
    # Spark gives naive timestamps in the driver's zone, Arrow would take them for UTC.
    rows = [{**record, "started": record["started"].astimezone(UTC)} for record in records]
    return pa.Table.from_pylist(rows, schema=TASK_SCHEMA)


def write_record(storage: Storage, run: dict[str, Any], tasks: pa.Table | None = None) -> None:
    """Write `RUN.json`, in place of what it said before, and ahead of it what tasks have told (`TASK_SCHEMA`)."""
    if tasks:
        write_table(storage, f"{RUNS}/{run['run']}.parquet", tasks)
    storage.write(f"{RUNS}/{run['run']}.json", json.dumps(run, indent=2).encode())


def read_runs(locations: str | Iterable[str], config: Config | None = None) -> pd.DataFrame:
    """The runs recorded below some locations, one row each, the oldest first.

    Locations are outputs of runs, their `runs` folders, or folders above them; `config` says how they are reached.
    Raises DataError if there is no record, or one is damaged, and StorageError if a location cannot be used.
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


def runs_of(output: Storage, config: Config) -> pd.DataFrame:
    """As `read_runs`, of one output, which may have none: a version without records has left none."""
    try:
        return read_runs(output.root, config)
    except DataError:
        return pd.DataFrame(columns=["source"])


def read_tasks(locations: str | Iterable[str], config: Config | None = None) -> pd.DataFrame:
    """The tasks of all those runs as one table (`tasks_of`), with `run`, `output`, `master` and `slots` of their run.

    Raises as `read_runs` does.
    """
    runs, tables = read_runs(locations, config), []
    files = {path: storage for storage, path in _find(locations, config)}
    for _, run in runs.iterrows():
        tables.append(tasks_of(files[run["file"]], run).assign(**run[["run", "output", "master", "slots"]]))
    return pd.concat(tables, ignore_index=True)


def tasks_of(storage: Storage, run: pd.Series) -> pd.DataFrame:
    """`TASK_SCHEMA` of a run (`read_runs`), and `begin` and `end`, seconds since its pass began."""
    tasks = read_table(storage, run["file"].removesuffix(".json") + ".parquet").to_pandas()
    began = run["pass_ended"] - pd.Timedelta(seconds=run["pass_seconds"])
    begin = (tasks["started"] - began).dt.total_seconds()
    return tasks.assign(begin=begin, end=begin + tasks["seconds"])


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


def versions() -> dict[str, str | None]:
    """Of Python and the packages that a run's time depends on."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        found[package] = None  # of a runtime with another build of it, such as opencv-python
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found
