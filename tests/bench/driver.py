"""The driver's memory and time, whatever the number of images: simulated listings, real results.

    PYTHONPATH=notebooks:tests .venv/bin/python tests/bench/driver.py [MILLIONS ...]

A simulated storage yields the entries of so many millions of images, of which there are no files. The driver lists,
diffs, plans and commits as in any run, with a real Delta table. Only Spark is missing: what stands in place of its
tasks writes their files of results, with a row per image. Each run is a process of its own, and its peak is its own
resident memory; apart from it, the peak of what the process has allocated, without the files of libraries that it has
mapped, looked at every `EVERY` seconds.

The results of the smallest listing are then run upon again: with nothing new; with nothing new where another program
has changed the table, so that the driver has to read its keys; and with a thousand new images. The last lines are what
it takes to list files that are there, and to list and plan `LISTED` million simulated ones, without a table.
"""

import json
import re
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
from deltalake import CommitProperties, DeltaTable

from helpers.config import load_config
from helpers.memory import trim_heap, trimmable
from helpers.pipeline import driver, runs
from helpers.pipeline.rows import Statistics
from helpers.pipeline.schemas import RESULT_SCHEMA
from helpers.pipeline.task import RECORD_SCHEMA, RunModel, Task, staging
from helpers.storage import LocalStorage
from helpers.storage.interface import Entry
from helpers.storage.parquet import write_table

MILLIONS = (1, 5, 20)
NEW = 1000
FILES_IN_FOLDER = 5000
SLOTS = 16
DAY = datetime(2026, 1, 1, tzinfo=UTC)
REAL_FILES = 200_000
LISTED = 100
EVERY = 0.01


@dataclass
class Simulated:
    """A location of many images, in folders; `new` ones are among the others."""

    images: int
    new: int = 0
    root: str = "/archive/photographs"

    def exists(self, path: str) -> bool:
        return True

    def list(self, *_: Any, **__: Any) -> Iterator[Entry]:
        every = self.images // self.new if self.new else 0
        for number in range(self.images):
            path = f"{self.root}/{number // FILES_IN_FOLDER:06d}/photograph-{number:010d}.jpg"
            yield Entry(path, 60_000 + number % 50_000, DAY)
            if every and number % every == every // 2:
                yield Entry(path.replace(".jpg", "-new.jpg"), 60_000, DAY)


def write_results(run: Any, images: pa.Table, plan: Any, is_last: bool) -> list[dict[str, Any]]:
    """What Spark and its tasks do: a file of results for each partition, and a record of each."""
    task, records = run.task, []
    run.store.stage(task.run, not run.config.resume)
    partitions = images["partition"].to_numpy()
    bounds = np.searchsorted(partitions, np.arange(plan.partitions + 1))
    for number, (start, end) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        rows = images.slice(start, end - start)
        columns = {name: rows[name] for name in ("path", "length", "modified", "error")}
        columns["model"] = pa.array([task.models[0].identity] * rows.num_rows)
        nothing = {f.name: pa.nulls(rows.num_rows, f.type) for f in RESULT_SCHEMA if f.name not in columns}
        table = pa.table({name: {**columns, **nothing}[name] for name in RESULT_SCHEMA.names}, schema=RESULT_SCHEMA)
        path = f"{staging(task.run)}/{run.first_partition + number:06d}-{rows.num_rows}-0.parquet"
        record = {
            **dict.fromkeys(RECORD_SCHEMA.names, 0),
            "partition": run.first_partition + number,
            "host": "simulated",
            "started": datetime.now(UTC),
            "seconds": 1.0,
            "file": path,
            "file_bytes": write_table(task.output, path, table),
            "statistics": Statistics.of(table).to_json(),
            "distribution": "{}",
            "images": rows.num_rows,
            "reasons": [],
        }
        records.append(record)
    run.first_partition += plan.partitions
    return records


def watch_allocated() -> list[int]:
    """The most kilobytes of anonymous memory that this process has from now on; its only item is kept up to date."""
    peak = [0]

    def watch() -> None:
        while True:
            (now,) = re.findall(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())
            peak[0] = max(peak[0], int(now))
            time.sleep(EVERY)

    threading.Thread(target=watch, daemon=True).start()
    return peak


def peaks(allocated: list[int]) -> dict[str, int]:
    """Peaks of this process's memory, in megabytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"peak_megabytes": round(peak / 1024), "allocated_megabytes": round(allocated[0] / 1024)}


def run(output: str, images: int, new: int) -> dict[str, Any]:
    """One run of the driver; seconds, and this process's peak."""
    allocated = watch_allocated()
    manifest = SimpleNamespace(flops=10**9, digest="0" * 12)
    model = RunModel(SimpleNamespace(manifest=manifest), "network@0123456789ab", {})
    name = f"{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}-{images % 16**4 + new:08x}"
    task = Task(Simulated(images, new), LocalStorage(output), name, (model,), *[0, 0, None, 1, 1, 1, 0, "CPU"])
    config = load_config("local", **{"paths.runs": f"{output}/dashboards"})
    with (
        mock.patch.object(driver, "make_task", lambda *_: task),
        mock.patch.multiple(runs, get_slots=lambda _: SLOTS, expected_slots=lambda _: 0, _start_workers=lambda _: None),
        mock.patch.object(runs.Run, "_run_tasks", write_results),
    ):
        start = time.perf_counter()
        summary = driver.run(SimpleNamespace(version="none"), "", "", output, config)
        seconds = time.perf_counter() - start
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "images": summary.images,
        "ok": summary.ok,
        "seconds": round(seconds, 1),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "pass_seconds": round(summary.ok / summary.images_per_second if summary.ok else 0.0, 1),
        **peaks(allocated),
    }


def list_folder(folder: str) -> dict[str, Any]:
    """What listing takes alone: of entries that are yielded at once, and of real files."""
    seconds = {}
    for name, storage in {"simulated": Simulated(REAL_FILES), "real": LocalStorage(folder)}.items():
        start = time.perf_counter()
        count = sum(part.images.num_rows for part in driver.listing.list_slices(storage, load_config("local")))
        seconds[name] = round((time.perf_counter() - start) * 10**6 / count, 1)
    return {"microseconds_per_file": seconds}


def list_and_plan(images: int) -> dict[str, Any]:
    """What the driver's own part takes, from slice to slice."""
    allocated, config, count = watch_allocated(), load_config("local"), 0
    start = time.perf_counter()
    with trimmable():
        for part in driver.listing.list_slices(Simulated(images), config):
            trim_heap()  # where a run does, too
            planned = driver.listing.plan(part.images, SLOTS, config)
            trim_heap()
            driver.listing.assign(part.images, planned)
            count += part.images.num_rows
            del part
            trim_heap()
    return {"images": count, "seconds": round(time.perf_counter() - start, 1), **peaks(allocated)}


def in_a_process(*arguments: Any) -> dict[str, Any]:
    """What this script answers in a process of its own."""
    command = [sys.executable, __file__, "--part", *map(str, arguments)]
    answer = subprocess.run(command, check=True, capture_output=True, text=True)
    result = json.loads(answer.stdout.splitlines()[-1])
    print(*arguments[1:], json.dumps(result), flush=True)
    return result


def main(millions: list[int]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for count in millions:
            in_a_process(f"{folder}/{count}", count * 10**6, 0)
        output, images = f"{folder}/{min(millions)}", min(millions) * 10**6
        print("nothing new")
        in_a_process(output, images, 0)
        table = DeltaTable(f"{output}/results")
        table.create_write_transaction(
            [], "append", table.schema(), partition_by=[], commit_properties=CommitProperties()
        )
        print("nothing new, and another program has changed the table")
        in_a_process(output, images, 0)
        print(f"{NEW} new")
        in_a_process(output, images, NEW)
        real = Path(folder, "files")
        for number in range(REAL_FILES):
            path = real / str(number // FILES_IN_FOLDER) / f"{number}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        print(json.dumps(list_folder(str(real))))
    in_a_process("list", LISTED * 10**6)


if __name__ == "__main__":
    if sys.argv[1:3] == ["--part", "list"]:
        print(json.dumps(list_and_plan(int(sys.argv[3]))))
    elif sys.argv[1:2] == ["--part"]:
        print(json.dumps(run(sys.argv[2], *map(int, sys.argv[3:]))))
    else:
        main([int(argument) for argument in sys.argv[1:]] or list(MILLIONS))
