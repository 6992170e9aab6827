"""Time, memory and size of the page of results, and time and memory of an export, for 100,000 images.

    PYTHONPATH=notebooks:tests .venv/bin/python tests/bench/report.py [--images 100000] [--export]

The results are made: 8 detections with masks per image, of 80 classes of which some are rare. One image in a hundred
has an error, and a file has 1,000 rows; after ten files the same come again. The images are links to four photographs
of 1920 x 1080 pixels.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import cv2
import numpy as np
import pages
import pyarrow as pa
from measure import measure

from helpers.images import rle
from helpers.pipeline.schemas import RESULT_SCHEMA
from helpers.storage import open_storage
from helpers.storage.parquet import write_table

SIZE = 1920, 1080
ROWS, DETECTIONS, CLASSES, PHOTOGRAPHS, TABLES = 1000, 8, 80, 4, 10


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--export", action="store_true", help="measure the export too, which takes minutes")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        output = write(Path(place), options.images)
        helpers = [sys.executable, "-m", "helpers"]
        commands = {
            "page": ["report", str(output)],
            "page against another output": ["report", str(output), "--against", str(output)],
        }
        if options.export:
            commands["coco"] = ["results", str(output), "--format", "coco", "--to", str(Path(place, "coco"))]
        for name, command in commands.items():
            taken = measure([*helpers, *command])
            page = (output / "report" / "index.html").stat().st_size
            print(
                f"{name}: {taken.wall_seconds:.1f} s, {taken.cpu_seconds:.1f} s of the processor, "
                f"{taken.peak_megabytes:.0f} MB; the page has {page / 1e6:.1f} MB"
            )


def write(place: Path, images: int) -> Path:
    """An output with the results of so many images, and the images."""
    rng = np.random.default_rng(0)
    folder = place / "photographs"
    folder.mkdir()
    for number in range(PHOTOGRAPHS):
        noise = cv2.resize(rng.integers(0, 255, (54, 96, 3), np.uint8), SIZE, interpolation=cv2.INTER_CUBIC)
        (place / f"{number}.jpg").write_bytes(cv2.imencode(".jpg", noise)[1].tobytes())
    shapes = [shape(rng) for _ in range(200)]
    frequencies = 1 / np.arange(1, CLASSES + 1) ** 1.5
    output = pages.write_output(place / "output", [], str(folder))
    storage = open_storage(str(output))
    for number in range(3):  # those of the empty table
        storage.delete(f"results/part-{number}.parquet")
    tables = [table(rng, shapes, frequencies / frequencies.sum()) for _ in range(TABLES)]
    for file in range(images // ROWS):
        paths = [str(folder / f"{file * ROWS + row:06d}.jpg") for row in range(ROWS)]
        for number, path in enumerate(paths):
            Path(path).symlink_to(place / f"{number % PHOTOGRAPHS}.jpg")
        rows = tables[file % TABLES].set_column(0, RESULT_SCHEMA.field("path"), pa.array(paths))
        write_table(storage, f"results/part-{file:04d}.parquet", rows)
    return output


def table(rng: np.random.Generator, shapes: list[dict], frequencies: np.ndarray) -> pa.Table:
    """The results of a file, without the paths."""
    classes = rng.choice(CLASSES, (ROWS, DETECTIONS), p=frequencies)
    scores, places = rng.beta(0.8, 0.8, (ROWS, DETECTIONS)), rng.integers(0, len(shapes), (ROWS, DETECTIONS))
    rows = []
    for row in range(ROWS):
        found = [
            {"class_id": int(c), "label": f"class {c}", "score": float(s), **shapes[p], "keypoints": None}
            for c, s, p in zip(classes[row], -np.sort(-scores[row]), places[row], strict=True)
        ]
        failed = row % 100 == 7
        rows.append(pages.row("", *((None, None, f"the image is damaged; {row}") if failed else (SIZE, found))))
    return pa.Table.from_pylist(rows, RESULT_SCHEMA)


def shape(rng: np.random.Generator) -> dict:
    """A box and the mask in it, of an ellipse."""
    (x, y), (a, b) = rng.integers(200, (1700, 880)), rng.integers(40, 200, 2)
    mask = cv2.ellipse(np.zeros(SIZE[::-1], np.uint8), (int(x), int(y)), (int(a), int(b)), 30, 0, 360, 1, -1)
    left, top, width, height = map(float, cv2.boundingRect(mask))
    return {"box": {"x1": left, "y1": top, "x2": left + width, "y2": top + height}, "mask": rle.encode(mask)}


if __name__ == "__main__":
    main()
