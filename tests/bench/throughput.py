"""The fused Spark run against a tight single-process program and against the usual Spark idiom, on this machine.

    PYTHONPATH=notebooks:tests .venv/bin/python tests/bench/throughput.py [--work FOLDER] [--repeats 3] [--quick]

Makes its own photographs and models, runs each way in processes of its own, checks that all predict the same, and
prints two tables; every ratio comes from this one run. Use a machine that does nothing else meanwhile.
"""

import argparse
import json
import platform
import sys
import tempfile
from datetime import date
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from cluster import read_results
from measure import measure

from studies.workloads import make_bundle, make_photographs

HERE = Path(__file__).parent
LIGHT, HEAVY, FEWER = 2000, 200, 500  # images: of each model, and to see whether memory grows with their number
TOLERANCE = 1e-3  # of a logit or probability between two ways


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir(), "spark-vision-bench"))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="few images, once: tries the script, measures nothing")
    parser.add_argument("--fresh", action="store_true", help="forget the repeats of earlier calls")
    options = parser.parse_args()
    light, heavy, fewer = (60, 8, 30) if options.quick else (LIGHT, HEAVY, FEWER)
    work, repeats = options.work, 1 if options.quick else options.repeats
    work.mkdir(parents=True, exist_ok=True)
    photos = {count: make_photographs(work / f"photos-{count}", count) for count in (light, heavy, fewer)}
    for name in ("light", "heavy"):
        make_bundle(name, work)
    kept = work / "rows.jsonl"  # of every complete repeat, so that a run can be continued another time
    if options.quick or options.fresh:
        kept.unlink(missing_ok=True)
    for _ in range(repeats):
        rows = [limit(work, "light", photos[light]), fused(work, "light", photos[light])]
        check_equal(work, "light")
        rows += [naive(work, "light", photos[light]), warm(work, "light", photos[light], "--tasks")]
        rows += [limit(work, "heavy", photos[heavy]), fused(work, "heavy", photos[heavy])]
        check_equal(work, "heavy")
        rows += [
            warm(work, "heavy", photos[heavy], "--repeats", "1"),
            fused(work, "light", photos[fewer], f"fused, {fewer} images"),
        ]
        with kept.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    report(pd.read_json(kept, lines=True), fewer)


def limit(work: Path, name: str, images: Path) -> dict:
    """Way (i): one process, decoding threads, AsyncInferQueue."""
    return run(name, "limit", HERE / "limit.py", work, images, work / f"limit-{name}.parquet")


def fused(work: Path, name: str, images: Path, label: str = "fused") -> dict:
    """The product's command in a fresh process."""
    command = [sys.executable, "-m", "helpers", "run", "--set", "resume=false"]
    return run(name, label, command, work, images, work / f"fused-{name}")


def warm(work: Path, name: str, images: Path, *options: str) -> dict:
    """The product's runs after the first in one session."""
    return run(name, "fused, warm", [sys.executable, HERE / "warm.py", *options], work, images, work / "warm")


def naive(work: Path, name: str, images: Path) -> dict:
    """Way (ii): `binaryFile` and `predict_batch_udf`; its outputs are checked here."""
    row = run(name, "usual idiom", HERE / "naive.py", work, images, work / "naive")
    found = {Path(r["path"]).name: np.argmax(r["logits"]) for r in pq.read_table(work / "naive").to_pylist()}
    expected = {
        path: predictions[0]["class_id"]
        for path, predictions in predicted(pq.read_table(work / f"limit-{name}.parquet"))
    }
    assert found == expected, f"the usual idiom differs on {sum(found[p] != expected[p] for p in expected)} images"
    return row


def run(name: str, way: str, program: Path | list, work: Path, images: Path, output: Path) -> dict:
    command = program if isinstance(program, list) else [sys.executable, program]
    result = measure(
        [*map(str, command), "--source", str(images), "--model", str(work / name), "--output", str(output)]
    )
    extra = {k: v for k, v in result.answer.items() if k in ("task_cpu_milliseconds", "many_partitions_slowdown")}
    return {
        "model": name,
        "way": way,
        "images/s": result.answer["images_per_second"],
        "command, s": result.wall_seconds,
        "CPU, s": result.cpu_seconds,
        "peak, MB": result.peak_megabytes,
        **extra,
    }


def check_equal(work: Path, name: str) -> None:
    """The fused run's predictions are the limit's: same best class, scores within the tolerance."""
    expected = dict(predicted(pq.read_table(work / f"limit-{name}.parquet")))
    found = dict(predicted(read_results(work / f"fused-{name}")))
    assert expected.keys() == found.keys()
    for path, predictions in expected.items():
        for a, b in zip(predictions, found[path], strict=True):
            assert abs(a["score"] - b["score"]) < TOLERANCE, f"{path}: {a} and {b}"
        assert predictions[0]["class_id"] == found[path][0]["class_id"], path


def predicted(rows: pa.Table) -> list[tuple[str, list[dict]]]:
    return [(Path(row["path"]).name, row["predictions"]) for row in rows.to_pylist()]


def report(rows: pd.DataFrame, fewer: int) -> None:
    groups = rows.groupby(["model", "way"], sort=False)
    table, repeats = groups.median(), groups.size().min()
    machine = f"{platform.machine()}, {psutil.cpu_count()} cores, {psutil.virtual_memory().total / 2**30:.0f} GiB"
    print(f"{date.today()}, {machine}, medians of {repeats}\n\n{table.round(1).to_string(na_rep='')}\n")
    rate, light, heavy = table["images/s"], table.loc["light"], table.loc["heavy"]
    ratios = {
        "light, warm session, of the limit": rate["light", "fused, warm"] / rate["light", "limit"],
        "light, first pass of a fresh process, of the limit": rate["light", "fused"] / rate["light", "limit"],
        "light, warm session, of the usual idiom": rate["light", "fused, warm"] / rate["light", "usual idiom"],
        "light, first pass, of the usual idiom's first pass": rate["light", "fused"] / rate["light", "usual idiom"],
        "heavy, first pass, of the limit": rate["heavy", "fused"] / rate["heavy", "limit"],
        "heavy, warm session, of the limit": heavy["images/s"]["fused, warm"] / heavy["images/s"]["limit"],
        "light, CPU of the whole command, of the limit's": light["CPU, s"]["fused"] / light["CPU, s"]["limit"],
        f"light, peak memory, of that of {fewer} images": light["peak, MB"]["fused"]
        / light["peak, MB"][f"fused, {fewer} images"],
        "light, 64 partitions, time of 4": light["many_partitions_slowdown"]["fused, warm"],
        "CPU of a task beyond its images, ms": light["task_cpu_milliseconds"]["fused, warm"],
    }
    for name, ratio in ratios.items():
        print(f"{ratio:8.2f}  {name}")


if __name__ == "__main__":
    main()
