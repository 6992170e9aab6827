"""A folder of files that would each stop a run, take its memory or its time: through the command line, one row each."""

import os
from collections.abc import Callable
from pathlib import Path

import bombs
import cv2
import numpy as np
import psutil
import pytest
from cluster import Finished, python_workers, start_run, wait_for
from fuzz import CORPUS

from helpers.images.video import split_path

MEGABYTES = 800  # of a worker; OpenVINO and what it needs take about half
GOOD = [f"good {i}.png" for i in range(8)]
LONG = {"slide.tif": 3 * 2**30, "endless.jpg": 2**43}  # bytes, of files that take no room on the disk
SIDE = 32


def jpeg(side: int) -> bytes:
    return cv2.imencode(".jpg", np.full((side, side, 3), 90, np.uint8))[1].tobytes()


LARGE = 7_000  # of a frame's sides, which are more than a frame may have within that memory
# What makes each, the frames that have predictions, and those that have errors; None is the file itself.
VIDEOS: dict[str, tuple[Callable[[], bytes], list, list]] = {
    "large.avi": (
        lambda: bombs.avi([jpeg(SIDE)] * 5 + [jpeg(LARGE)] + [jpeg(SIDE)] * 3),
        [0, 1, 2, 3, 4, 6, 7, 8],
        [5],
    ),
    "large at first.avi": (lambda: bombs.avi([jpeg(LARGE), jpeg(SIDE)]), [1], [0]),
    "large only.avi": (lambda: bombs.avi([jpeg(LARGE)] * 2), [], [None]),
    "index.mp4": (lambda: bombs.mp4(400_000_000, codec=b"mp4v", side=64), [], [None]),
    "same place.mp4": ((CORPUS / "chunks.mp4").read_bytes, [], [None]),
    "late stream.mp4": ((CORPUS / "late_stream.mp4").read_bytes, list(range(7)), []),
}


@pytest.fixture(scope="module", params=["auto", "local"])
def run(request, bundle_uri, tmp_path_factory) -> tuple[Finished, dict[str, dict], float]:
    """The command in a mode, its rows by name, and the megabytes that a worker of Spark had at most."""
    place = tmp_path_factory.mktemp("hostile")
    folder = place / "files"
    folder.mkdir()
    for name, (make, _) in bombs.IMAGES.items():
        (folder / name).write_bytes(make())
    for name, (make, _, _) in VIDEOS.items():
        (folder / name).write_bytes(make())
    for name, length in LONG.items():
        (folder / name).touch()
        os.truncate(folder / name, length)
    for number, name in enumerate(GOOD):
        cv2.imwrite(str(folder / name), np.full((40, 60, 3), 20 * number, np.uint8))
    settings = [
        f"spark.mode={request.param}",
        "spark.master=local[1]",
        f"inference.memory_megabytes={MEGABYTES}",
        "max_failed_share=1",
    ]
    started = start_run(folder, bundle_uri, place / "out", place / "log", *settings, f"paths.runs={place / 'runs'}")
    driver, peak = psutil.Process(started.process.popen.pid), 0.0

    def ended() -> bool:
        nonlocal peak
        for worker in python_workers(driver):
            status = Path(f"/proc/{worker.pid}/status")
            lines = status.read_text().splitlines() if status.exists() else []
            peak = max([peak, *(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))])
        return started.process.popen.poll() is not None

    wait_for("the run", ended)
    finished = started.finish()
    assert finished.code == 0, finished.errors
    return finished, {row["path"].removeprefix(f"{folder}/"): row for row in finished.rows()}, peak


def test_every_file_has_its_rows_and_the_run_its_summary(run):
    finished, rows, _ = run
    files = {split_path(name)[0] for name in rows}
    assert files == {*GOOD, *bombs.IMAGES, *VIDEOS, *LONG}
    assert finished.summary["images"] == len(rows)
    assert finished.summary["failed"] == sum(row["error"] is not None for row in rows.values())


def test_the_good_images_beside_them_have_predictions(run):
    for name in GOOD:
        row = run[1][name]
        assert row["error"] is None and len(row["predictions"]) == 3 and (row["width"], row["height"]) == (60, 40)


@pytest.mark.parametrize(("name", "words"), [(name, words) for name, (_, words) in bombs.IMAGES.items()])
def test_a_hostile_image_is_an_error_that_says_why(run, name, words):
    assert words in run[1][name]["error"] and run[1][name]["predictions"] is None


@pytest.mark.parametrize("name", LONG)
def test_a_file_beyond_all_measure_is_not_read(run, name):
    row = run[1][name]
    assert row["length"] == LONG[name] and row["error"].startswith(f"the file has {LONG[name]} bytes, more than the")


@pytest.mark.parametrize("name", VIDEOS)
def test_of_a_hostile_video_the_frames_that_are_good_have_predictions(run, name):
    rows = {split_path(path)[1]: row for path, row in run[1].items() if split_path(path)[0] == name}
    _, good, bad = VIDEOS[name]
    assert sorted(rows, key=lambda number: -1 if number is None else number) == sorted(
        [*good, *bad], key=lambda n: n or 0
    )
    for number, row in rows.items():
        assert (row["error"] is None) == (number in good) == (row["predictions"] is not None)


@pytest.mark.parametrize("run", ["local"], indirect=True)
def test_no_worker_takes_more_memory_than_it_may(run):
    assert 100 < run[2] <= MEGABYTES
