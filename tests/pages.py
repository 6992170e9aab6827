"""An output of runs, made without any, and a browser to look at its page."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
from selenium import webdriver
from selenium.webdriver.chrome.service import Service

from helpers.config import load_config
from helpers.images import rle
from helpers.pipeline.records import PHASES, shown_settings, task_table, write_record
from helpers.pipeline.schemas import RESULT_SCHEMA
from helpers.pipeline.task import RECORD_SCHEMA, STAGES
from helpers.storage import open_storage
from helpers.storage.parquet import write_table

CHROMIUM, DRIVER = "chromium", "chromedriver"
MODIFIED = datetime(2026, 1, 2, tzinfo=UTC)
MODEL = "yolact-fp32@0123456789ab"
LABELS = ("cat", "dog", "bird", "<b>bus</b>")


def missing() -> str | None:
    """Why no browser can be started, with the remedy; None where one can."""
    absent = [name for name in (CHROMIUM, DRIVER) if shutil.which(name) is None]
    return f"{' and '.join(absent)}: not found; `make chromium` installs them" if absent else None


@contextmanager
def start_browser() -> Iterator[webdriver.Chrome]:
    """Chromium without a window, which notes what it asks for and what pages tell their console."""
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which(CHROMIUM)
    for argument in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "disable-gpu", "window-size=1360,900"):
        options.add_argument(f"--{argument}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    browser = webdriver.Chrome(options=options, service=Service(shutil.which(DRIVER), env=dict(os.environ)))
    try:
        yield browser
    finally:
        browser.quit()


def prediction(
    class_id: int, score: float, box: tuple | None = None, mask: np.ndarray | None = None, points=None
) -> dict:
    return {
        "class_id": class_id,
        "label": LABELS[class_id],
        "score": score,
        "box": box and dict(zip(("x1", "y1", "x2", "y2"), box, strict=True)),
        "mask": None if mask is None else rle.encode(mask),
        "keypoints": points and [dict(zip(("x", "y", "score"), point, strict=True)) for point in points],
    }


def row(
    path: Path | str, size: tuple[int, int] | None, predictions: list | None, error: str | None = None, **other: Any
) -> dict:
    """A row of results; its file's length and modification time are those that it has, if it is there."""
    file = Path(path)
    status = file.stat() if file.is_file() else None
    modified = datetime.fromtimestamp(status.st_mtime, UTC) if status else MODIFIED
    about = {"path": str(path), "length": status.st_size if status else 1, "modified": modified, "error": error}
    width, height = size or (None, None)
    return {**about, "width": width, "height": height, "predictions": predictions, "model": MODEL, **other}


def write_output(folder: Path, rows: list[dict], source: str, files: int = 3, **about: Any) -> Path:
    """An output with these results and the record of one run."""
    storage, config = open_storage(str(folder)), load_config("local")
    for number in range(files):
        write_table(storage, f"results/part-{number}.parquet", pa.Table.from_pylist(rows[number::files], RESULT_SCHEMA))
    began = datetime.now(UTC) - timedelta(seconds=10)
    failed = sum(row["error"] is not None for row in rows)
    run = {
        "run": "20260102T030405-0badcafe",
        "started": began.isoformat(),
        "source": source,
        "output": str(folder),
        "model": MODEL,
        "slots": 2,
        "retries": 0,
        "images": len(rows),
        "failed": failed,
        **dict.fromkeys(PHASES, 1.0),
        "pass_seconds": 6.0,
        **{f"{name}_ended": (began + timedelta(seconds=8)).isoformat() for name in ("open", "list", "pass", "publish")},
        "versions": {"python": "3.11"},
        "config": shown_settings(config),
        **about,
    }
    texts = ("host", "file", "statistics", "distribution")
    record = dict.fromkeys(RECORD_SCHEMA.names, 1) | dict.fromkeys(texts, "here")
    record |= {"started": began + timedelta(seconds=2), "seconds": 3.0, "reasons": []}
    record |= {f"{stage}_seconds": 0.5 for stage in STAGES}
    write_record(storage, run, task_table([record, {**record, "process": 2, "failed": 0}]))
    return folder


def write_image(path: Path, size: tuple[int, int], gray: int = 128) -> Path:
    """A gray image, as the suffix says."""
    width, height = size
    path.parent.mkdir(parents=True, exist_ok=True)
    content = cv2.imencode(path.suffix, np.full((height, width, 3), gray, np.uint8))[1].tobytes()
    path.write_bytes(content)
    return path
