r"""The fused run over ADLS Gen2 (Azurite) against the same run over a local folder, the server's work set apart.

    PYTHONPATH=notebooks:tests .venv/bin/python tests/bench/adls.py \
        [--work FOLDER] [--repeats 3] [--latency MILLISECONDS] [--quick]

Runs have one core and one slot, the server the other core, so that the ratio is of the product's own work and waiting.
Every ratio comes from this one run. Use a machine that does nothing else meanwhile; the processor time of the tasks'
own work, measured without Spark in one process, is the ratio that other work disturbs least.
"""

import argparse
import os
import platform
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import date
from pathlib import Path

import pandas as pd
import psutil
from azure.storage.blob import ContainerClient
from cluster import read_results
from dfs_facade import ACCOUNT, KEY
from measure import measure

from helpers.config import load_config, parse_assignments
from helpers.pipeline import make_task
from helpers.pipeline.listing import assign, list_images, plan
from helpers.storage import open_storage
from studies.workloads import make_bundle, make_photographs

TESTS = Path(__file__).parent.parent
IMAGES = 2000
MEASURED = 500
RUN_CORE, SERVER_CORE = "0", "1"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir(), "spark-vision-bench"))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--latency", type=float, default=0.0, help="milliseconds that the server waits in each request")
    parser.add_argument("--quick", action="store_true", help="few images, once: tries the script, measures nothing")
    options = parser.parse_args()
    count, repeats = (60, 1) if options.quick else (IMAGES, options.repeats)
    options.work.mkdir(parents=True, exist_ok=True)
    photos = make_photographs(options.work / f"photos-{count}", count)
    if not (options.work / "light" / "manifest.json").exists():
        make_bundle("light", options.work)
    os.environ["ADLS_KEY"] = KEY
    with server(options.latency) as (endpoint, processes):
        container = upload(endpoint, photos)
        base = f"abfss://{container}@{ACCOUNT}.dfs.core.windows.net"
        reached = ["--set", f"storage.endpoint={endpoint}", "--set", "storage.credential=env:ADLS_KEY"]
        rows = []
        for repeat in range(repeats):
            output = options.work / f"local-{uuid.uuid4().hex[:8]}"
            rows.append(run("local folder", str(photos), str(options.work / "light"), str(output), processes))
            adls = run("ADLS", f"{base}/photos", str(options.work / "light"), f"{base}/out{repeat}", processes, reached)
            rows.append(adls)
            check(output, count)
        ways = {"local folder": (str(photos), []), "ADLS": (f"{base}/photos", reached[1::2])}
        milliseconds = [
            {"way": way, **task_milliseconds(source, str(options.work / "light"), settings), **read(source, settings)}
            for _ in range(2 * repeats)
            for way, (source, settings) in ways.items()
        ]
    report(pd.DataFrame(rows), options.latency)
    table = pd.DataFrame(milliseconds).groupby("way", sort=False).median()
    print(f"\nmilliseconds an image, medians of {2 * repeats}\n\n{table.round(2).to_string()}\n")
    of_task = table["a task, CPU"]
    print(f"{of_task.iloc[0] / of_task.iloc[1]:8.2f}  images per second of a task's CPU, of the local folder's")


@contextmanager
def server(latency: float) -> Iterator[tuple[str, list[psutil.Process]]]:
    """The facade and Azurite on a core of their own."""
    command = ["taskset", "-c", SERVER_CORE, sys.executable, str(TESTS / "dfs_facade.py"), "--latency", str(latency)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True)
    try:
        endpoint = process.stdout.readline().strip()
        yield endpoint, [psutil.Process(process.pid), *psutil.Process(process.pid).children()]
    finally:
        process.stdin.close()  # it ends then, and Azurite with it
        process.wait()


def upload(endpoint: str, photos: Path) -> str:
    """By the Blob API, which takes one request a file."""
    name = f"bench{uuid.uuid4().hex[:8]}"
    container = ContainerClient(endpoint, name, credential=KEY)
    container.create_container()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda path: container.upload_blob(f"photos/{path.name}", path.read_bytes()), photos.iterdir()))
    return name


def run(way: str, source: str, model: str, output: str, server: list[psutil.Process], settings: list = ()) -> dict:
    before = seconds(server)
    command = ["taskset", "-c", RUN_CORE, sys.executable, "-m", "helpers", "run", "--source", source, "--model", model]
    result = measure([*command, "--output", output, "--set", "spark.master=local[1]", *settings])
    assert result.answer["failed"] == 0
    return {
        "way": way,
        "images/s": result.answer["images_per_second"],
        "command, s": result.wall_seconds,
        "CPU, s": result.cpu_seconds,
        "server's CPU, s": seconds(server) - before,
        "peak, MB": result.peak_megabytes,
    }


def task_milliseconds(source: str, model: str, settings: list[str]) -> dict[str, float]:
    """Of an image in a task, which reads, decodes and infers."""
    config = load_config("local", **parse_assignments(settings))
    task = make_task(source, model, tempfile.gettempdir(), config)
    images = list_images(task.source, config).images[:MEASURED]
    batches = assign(images, plan(images, 1, config)).to_batches(max_chunksize=1000)
    for _ in task.results([batches[0].slice(0, 50)]):
        pass  # compiles the model, and connects
    start = time.process_time()
    rows = sum(batch.num_rows for batch in task.results(batches))
    return {"a task, CPU": (time.process_time() - start) / rows * 1000}


def read(source: str, settings: list[str]) -> dict[str, float]:
    """Of reading alone, one image after the other."""
    storage = open_storage(source, load_config("local", **parse_assignments(settings)))
    names = [entry.path for entry in storage.list()][:MEASURED]
    storage.read(names[0])  # connects
    start, cpu = time.perf_counter(), time.process_time()
    for name in names:
        storage.read(name)
    taken = {"reading": time.perf_counter() - start, "reading, CPU": time.process_time() - cpu}
    return {name: 1000 * seconds / len(names) for name, seconds in taken.items()}


def seconds(processes: list[psutil.Process]) -> float:
    times = [process.cpu_times() for process in processes]
    return sum(time.user + time.system for time in times)


def check(output: Path, count: int) -> None:
    assert read_results(output).num_rows == count


def report(rows: pd.DataFrame, latency: float) -> None:
    groups = rows.groupby("way", sort=False)
    table = groups.median()
    machine = f"{platform.machine()}, {psutil.cpu_count()} cores, {psutil.virtual_memory().total / 2**30:.0f} GiB"
    print(f"{date.today()}, {machine}, medians of {groups.size().min()}, {latency:g} ms latency a request\n")
    print(f"{table.round(1).to_string()}\n")
    adls, local = table.loc["ADLS"], table.loc["local folder"]
    print(f"{adls['images/s'] / local['images/s']:8.2f}  throughput of ADLS, of the local folder's")
    print(f"{adls['CPU, s'] / local['CPU, s']:8.2f}  CPU of the whole command, of the local folder's")


if __name__ == "__main__":
    main()
