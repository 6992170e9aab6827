"""Strong scaling from one to two cores and executors, and how well other runs are predicted from one of them.

    PYTHONPATH=notebooks:tests .venv/bin/python tests/bench/scaling.py [--work FOLDER] [--repeats 3] [--quick]

Makes its own photographs and models, runs both models in warm sessions of `local[1]`, `local[2]` and of a standalone
cluster of one and of two one-core workers, and prints medians, their ratios, and predictions beside what was measured.
What is of one core is held to one, the driver included; with two workers each has a core of its own, and the driver
shares both. About ten minutes; use a machine that does nothing else meanwhile.
"""

import argparse
import platform
import shutil
import tempfile
from datetime import date
from pathlib import Path

import pandas as pd
import psutil

from helpers.pipeline.records import read_runs, read_tasks
from helpers.planning.cost_model import fit
from helpers.planning.planner import Cluster, predict
from studies.cluster import standalone
from studies.sweep import sweep
from studies.workloads import make_bundle, make_photographs

IMAGES = {"light": 1200, "yolact": 16}
DIFFERENT = 200  # photographs; more are copies
TASKS = 8
SLOW = 0.5  # of the slowed worker
SAME = "repeats"  # the runs that every configuration has
FITTED = "local-2"  # the one configuration that the model sees


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir(), "spark-vision-bench"))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="few images, once: tries the script, measures nothing")
    parser.add_argument("--report", action="store_true", help="only print what the last call has measured")
    options = parser.parse_args()
    place = options.work / ("scaling-quick" if options.quick else "scaling")
    if not options.report:
        measure(options.work, place, 1 if options.quick else options.repeats, 8 if options.quick else 1)
    report(place)


def measure(work: Path, place: Path, repeats: int, fewer: int) -> None:
    shutil.rmtree(place, ignore_errors=True)
    images = {model: max(8, count // fewer) for model, count in IMAGES.items()}
    for model, count in images.items():
        make_bundle(model, work)
        for share in (0.5, 1, 2):
            make_photographs(work / f"copies-{int(share * count)}", int(share * count), different=DIFFERENT)

    def jobs(where: str, model: str, name: str, tasks: int = TASKS, share: float = 1) -> list[dict]:
        job: dict = {"source": f"{work}/copies-{int(share * images[model])}", "model": f"{work}/{model}"}
        job["partitioning.partitions"] = tasks
        return [{**job, "output": f"{place}/{model}/{where}/{name}/{i}"} for i in range(repeats)]

    def same(where: str) -> list[dict]:
        return jobs(where, "light", SAME) + jobs(where, "yolact", SAME)

    others = [one for tasks in (1, 2, 3, 32, 64) for one in jobs("local-2", "light", f"{tasks} tasks", tasks)]
    others += jobs("local-2", "light", "half the images", share=0.5)
    others += jobs("local-2", "yolact", "3 tasks", 3) + jobs("local-2", "yolact", "twice the images", share=2)
    sweep({"spark.master": "local[1]"}, same("local-1"), cores=1)
    sweep({"spark.master": "local[2]"}, same("local-2") + others, cores=2)
    with standalone(place / "cluster", 1) as cluster:
        sweep(cluster.settings, same("cluster-1"), cores=1)
        cluster.complete(2)
        slow = jobs("slow", "light", "24 tasks", 24) + jobs("slow", "light", "2 tasks", 2)
        slow = [
            {**job, "slowed": (cluster.workers[1].popen.pid, SLOW)} for job in slow + jobs("slow", "yolact", "8 tasks")
        ]
        sweep(cluster.settings, same("cluster-2") + slow, cores=2)


def report(place: Path) -> None:
    machine = f"{platform.machine()}, {psutil.cpu_count()} cores, {psutil.virtual_memory().total / 2**30:.0f} GiB"
    print(f"{date.today()}, {machine}\n")
    for model in IMAGES:
        runs, tasks = read_runs(str(place / model)), read_tasks(str(place / model))
        runs[["where", "name"]] = runs["output"].str.split("/").str[-3:-1].tolist()
        runs["rate"] = runs["images"] / runs["pass_seconds"]
        repeated = runs[runs["name"] == SAME]
        rates = repeated.groupby("where")["rate"].agg(["median", "min", "max"])
        print(f"{model}, images/s of the pass, {repeated['where'].value_counts().min()} repeats\n{rates.round(2)}\n")
        for kind in ("local", "cluster"):
            times = rates["median"][f"{kind}-2"] / rates["median"][f"{kind}-1"]
            print(f"{times:8.2f}  {model}, {kind}: from 1 to 2")
        print(f"\n{predictions(runs, tasks).to_string(index=False)}\n")


def predictions(runs: pd.DataFrame, tasks: pd.DataFrame) -> pd.DataFrame:
    """Medians of runs that are alike, and what a model fitted on one configuration says of them.

    `computed` is the processor's share of the tasks' time: with one task per core it is 1 where nothing else
    runs, and with one task beside an idle core more than 1.
    """
    model = fit(runs[(runs["where"] == FITTED) & (runs["name"] == SAME)], tasks)
    runs["cores"] = runs.groupby("where")["workers"].transform("max")
    sums = tasks.groupby("run")[["cpu_seconds", "seconds"]].sum()
    runs["computed"] = runs["run"].map(sums["cpu_seconds"] / sums["seconds"])
    keys = ["where", "name", "cores", "partitions", "images", "bytes"]
    table = runs.groupby(keys, as_index=False)[["computed", "seconds"]].median()
    table["predicted"] = [_predict(model, row) for row in table.itertuples()]
    table["error"] = table["predicted"] / table["seconds"] - 1
    unseen = table[(table["where"] != FITTED) | (table["name"] != SAME)]["error"].abs()
    print(
        f"\n{len(unseen)} predictions of total time: off by {unseen.median():.1%} (median), {unseen.max():.1%} (worst)"
    )
    return table.drop(columns="bytes").round(3)


def _predict(model, row) -> float:
    speeds = (1.0, SLOW) if row.where == "slow" else (1.0,)
    # A worker that is held to a core is a machine of its own.
    cluster = Cluster(1, row.cores) if row.where.startswith("local") else Cluster(row.cores, speeds=speeds)
    return predict(model, row.images, cluster, row.partitions, image_bytes=row.bytes / row.images).seconds


if __name__ == "__main__":
    main()
