"""Whole commands over the same photographs: the limit, this pipeline, Daft and Ray Data, in turn.

    PYTHONPATH=notebooks:tests .venv/bin/python tests/bench/peers.py [--repeats 5] [--images 2000]

This project, Daft and Ray get an environment each in the work folder, by pip. Fused functions must find what the limit
finds; as the libraries' guides have it, images are resized in other ways, and only counted. Medians of all repeats; of
the limit, the best. Use a machine that does nothing else meanwhile.
"""

import argparse
import platform
import re
import subprocess
import sys
import tempfile
import uuid
from datetime import date
from pathlib import Path

import pandas as pd
import psutil
import pyarrow.parquet as pq
from cluster import read_results
from measure import measure

from helpers.config import PROJECT
from studies.workloads import make_bundle, make_photographs

HERE = Path(__file__).parent
PEERS = {"daft": ["daft==0.7.26"], "ray": ["ray[data]==2.60.0", "pillow"]}
# What reading, decoding and post-processing of this project import, in the project's versions.
NEEDS = re.compile(r"^((?:numpy|pyarrow|openvino|opencv-python-headless|pycocotools|pydantic)==\S+)", re.MULTILINE)
SAIL = re.compile(r"^pysail==\S+", re.MULTILINE)
LIMIT = "the limit"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir(), "spark-vision-bench"))
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    photographs = make_photographs(options.work / f"photos-{options.images}", options.images)
    make_bundle("light", options.work)
    ways = {LIMIT: [sys.executable, HERE / "limit.py"], **ours(options.work), **peers(options.work)}
    rows = []
    for _ in range(options.repeats):
        expected: dict[str, int] = {}
        for way, command in ways.items():
            output = options.work / f"peers-{uuid.uuid4().hex[:8]}"
            places = ["--source", photographs, "--model", options.work / "light", "--output", output]
            taken = measure([*map(str, [*command, *places])])
            found = classes(output, way)
            expected = expected or found
            assert found.keys() == expected.keys(), way
            assert found == expected or "guide" in way, f"{way} finds other classes"
            rows.append(
                {
                    "way": way,
                    "images/s": taken.answer["images_per_second"],
                    "command, s": taken.wall_seconds,
                    "CPU, s": taken.cpu_seconds,
                    "peak, MB": taken.peak_megabytes,
                }
            )
    report(pd.DataFrame(rows), options)


def ours(work: Path) -> dict[str, list]:
    """The product's command, as it is and on Spark, installed as a user would who trains nothing."""
    command = [
        environment(work / "ours", [str(PROJECT), *SAIL.findall((PROJECT / "requirements.txt").read_text())]),
        "-m",
        "helpers",
        "run",
    ]
    return {"this pipeline": command, "this pipeline, on Spark": [*command, "--set", "spark.mode=local"]}


def peers(work: Path) -> dict[str, list]:
    """The ways of other libraries."""
    needs = NEEDS.findall((PROJECT / "requirements.txt").read_text())
    ways = {}
    for library, packages in PEERS.items():
        python = environment(work / library, [*packages, *needs])
        # The environment has this project by its path, and not as a package, which would bring Spark.
        command = ["env", f"PYTHONPATH={PROJECT}", str(python), str(HERE / "ways.py"), library]
        ways[f"{library}, fused"], ways[f"{library}, as its guide has it"] = command, [*command, "--as-guides"]
    return ways


def environment(folder: Path, packages: list[str]) -> Path:
    """The interpreter of an environment with these packages, which is made here."""
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *packages], check=True)
    return python


def classes(output: Path, way: str) -> dict[str, int]:
    """The best class of each photograph by its name."""
    if way == LIMIT or way.startswith("this"):
        rows = pq.read_table(output) if way == LIMIT else read_results(output)
        return {Path(row["path"]).name: row["predictions"][0]["class_id"] for row in rows.to_pylist()}
    return {Path(row["path"]).name: row["class_id"] for row in pq.read_table(output).to_pylist()}


def report(rows: pd.DataFrame, options: argparse.Namespace) -> None:
    table = rows.groupby("way", sort=False).median()
    limits = rows[rows["way"] == LIMIT]
    table.loc[LIMIT] = [limits["images/s"].max(), *limits[["command, s", "CPU, s", "peak, MB"]].min()]
    print(f"{date.today()}, {platform.machine()}, {psutil.cpu_count()} cores, {options.images} images,", end=" ")
    print(f"medians of {options.repeats}\n\n{table.round(1).to_string()}\n")
    print("of the limit:\n", (table / table.loc[LIMIT]).round(2).to_string())


if __name__ == "__main__":
    main()
