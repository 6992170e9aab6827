"""One folder with everything that users' folders hold, through the command line: one row each, in words.

How it was checked that each test fails without its protection: in a copy of the repository, one change at a time.

    changed                                                   failed
    boundary.py: `UnreadableImageError` is not caught         all of the folder, more than half, emptied
    boundary.py: reading errors in the system's words         secret, links, folder, deleted, replaced
    decoding.py: no limit of pixels                           large.png, large.jpg, memory
    preprocessing.py: signed bytes go to the reader of sizes  cut.jpg, large.jpg, memory
    decoding.py: orientation is ignored                       turned.jpg
    listing.py: folders are not listed / suffixes by case     one row each, folder.jpg / PNG NAMED.JPG
    local.py: folders are entered twice                       one row each
    local.py: names are not made text / odd links raise       all of the folder
    cli.py: exit code always 0                                more than half
    task.py: reasons with their details                       more than half
    pictures.py: a file that has gone is not caught           deleted before its picture
    readers.py: one file decides                              reader of all
"""

import io
import json
import os
import re
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pytest
from bombs import bilevel_png
from cluster import Finished, python_workers, start_run, without_privileges
from PIL import Image

from helpers.cli import main
from helpers.pipeline import make_task, readers
from helpers.pipeline.listing import assign, list_images, plan
from helpers.pipeline.report import draw_sample
from studies.cluster import wait_for

WIDTH, HEIGHT = 60, 40
WORKER_MEGABYTES = 900  # decoding 20,000 x 20,000 pixels alone takes 1,144
ORIENTATION, QUARTER_TURN = 0x0112, 6  # EXIF


def picture(mode: str = "RGB", form: str = "PNG", size: tuple[int, int] = (WIDTH, HEIGHT), **options) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (size[1] // 8 + 1, size[0] // 8 + 1, 3), np.uint8)
    image = Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    image.convert(mode).save(buffer, form, **options)
    return buffer.getvalue()


def sixteen_bits() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.arange(WIDTH * HEIGHT, dtype=np.uint16).reshape(HEIGHT, WIDTH) * 20).save(buffer, "PNG")
    return buffer.getvalue()


def turned() -> bytes:
    exif = Image.Exif()
    exif[ORIENTATION] = QUARTER_TURN
    return picture(form="JPEG", exif=exif)


def film(form: str) -> bytes:
    frames = [Image.new("RGB", (WIDTH, HEIGHT), (shade, 0, 0)) for shade in (0, 120, 240)]
    buffer = io.BytesIO()
    frames[0].save(buffer, form, save_all=True, append_images=frames[1:])
    return buffer.getvalue()


def large_jpeg(side: int) -> bytes:
    """A small picture whose header says that it is large."""
    content = picture(form="JPEG")
    return content.replace(struct.pack(">HH", HEIGHT, WIDTH), struct.pack(">HH", side, side), 1)


GOOD = {
    "plain.png": picture(),
    "PNG NAMED.JPG": picture(),
    "a b.png": picture(),
    "a%20b.png": picture(),
    "100 %.png": picture(),
    "#1?.png": picture(),
    'it\'s "quoted" \\.png': picture(),
    "new\nline.png": picture(),
    "Öl и фото 写真 🙂.png": picture(),
    "Ol\N{COMBINING DIAERESIS}.png": picture(),
    "glob[1]*{a,b}.png": picture(),
    "deep/er/down.webp": picture(form="WEBP"),
    "folder.jpg/inside.png": picture(),
    "single.png": picture(size=(1, 1)),
    "turned.jpg": turned(),
    "gray.png": picture("L"),
    "palette.png": picture("P"),
    "transparent.png": picture("RGBA"),
    "print.jpg": picture("CMYK", "JPEG"),
    "sixteen.png": sixteen_bits(),
    "film.gif": film("GIF"),
    "film.webp": film("WEBP"),
}
SIZES = {"single.png": (1, 1), "turned.jpg": (HEIGHT, WIDTH)}  # where not WIDTH x HEIGHT

BAD = {  # content, and what the row's error must say
    "cut.jpg": (picture(form="JPEG", size=(300, 200))[:2000], "damaged or cut short"),
    "cut.png": (picture(size=(300, 200))[:5000], "damaged or cut short"),
    "empty.jpg": (b"", "the file is empty"),
    "text.jpg": (b"shopping list: milk, eggs", "not an image"),
    "page.jpg": (b"<!DOCTYPE html><html><body>404 not found</body></html>", "not an image"),
    "large.png": (bilevel_png(20_000, 20_000), "20000 x 20000 pixels"),
    "large.jpg": (large_jpeg(20_000), "20000 x 20000 pixels"),
    "secret.png": (picture(), "permission denied"),
}
LINKS = {  # the link's target, and what the row's error must say
    "loop.png": ("loop.png", "the link leads back to itself"),
    "nowhere.png": ("no such file.png", "leads nowhere"),
    "locked.png": ("locked/photo.png", "permission denied"),
    "elsewhere.png": ("../elsewhere/photo.png", "the link leads out of the source"),
    "device.png": ("/dev/zero", "the link leads out of the source"),
}
NO_TEXT = b"bad\xff.png"  # a name that is no text in any encoding but an old one
LEFT_OUT = {"photo.txt": picture(), ".hidden.png": picture(), "noextension": picture()}


def write_all(folder: Path) -> Path:
    for name, content in {**GOOD, **{name: content for name, (content, _) in BAD.items()}, **LEFT_OUT}.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    for name, (target, _) in LINKS.items():
        (folder / name).symlink_to(folder / target)
    (folder / "linked.png").symlink_to(folder / "plain.png")
    (folder / "deep" / "circle").symlink_to(folder)  # a folder that holds itself
    (folder / "processes").symlink_to("/proc")
    (folder / "secret.png").chmod(0)
    (folder / "locked").mkdir(mode=0)
    (folder / "../elsewhere").mkdir()
    (folder / "../elsewhere/photo.png").write_bytes(picture())
    (folder / os.fsdecode(NO_TEXT)).write_bytes(picture())
    return folder


@dataclass
class Outcome:
    """The rows by name, and what the processes of the run took."""

    finished: Finished
    rows: dict[str, dict]
    worker_megabytes: float = 0.0
    watched: int = field(default=0)


@pytest.fixture(scope="module", params=["auto", "local"])
def outcome(request, bundle_uri, tmp_path_factory) -> Outcome:
    folder = write_all(tmp_path_factory.mktemp("bad") / "photos 100%")
    place = tmp_path_factory.mktemp("bad_output")
    settings = ("spark.master=local[2]", f"paths.runs={place / 'runs'}", "partitioning.partitions=4")
    settings += (f"spark.mode={request.param}",)
    run = start_run(folder, bundle_uri, place / "out", place / "run.log", *settings, before=without_privileges())
    driver, peaks = psutil.Process(run.process.popen.pid), [0]

    def ended() -> bool:
        for worker in python_workers(driver):
            try:
                peaks.append(worker.memory_info().rss)
            except psutil.NoSuchProcess:
                continue
        return run.process.popen.poll() is not None

    wait_for("the run", ended)
    finished = run.finish()
    assert finished.code in (0, 1), finished.errors
    rows = {row["path"].removeprefix(f"{folder}/"): row for row in finished.rows()}
    return Outcome(finished, rows, max(peaks) / 2**20, len(peaks) - 1)


def test_every_image_is_one_row_and_nothing_else_is(outcome):
    names = {*GOOD, *BAD, *LINKS, "linked.png", "folder.jpg"}
    others = set(outcome.rows) - names
    assert names <= set(outcome.rows)
    assert len(others) == 1 and others.pop().startswith("bad")
    counts = {name: outcome.finished.summary[name] for name in ("images", "ok", "failed")}
    assert counts["images"] == counts["ok"] + counts["failed"] == len(names) + 1


def test_a_folder_that_cannot_be_listed_costs_its_images_and_the_exit_code_tells(outcome):
    assert outcome.finished.code == 1
    errors = [line for line in outcome.finished.errors.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "1 folders could not be listed" in errors[0]  # bad images alone are no reason
    assert "locked: this folder cannot be listed (Permission denied)" in outcome.finished.errors
    assert "Traceback" not in outcome.finished.errors


@pytest.mark.parametrize("name", [*GOOD, "linked.png"])
def test_an_unusual_but_good_image_has_predictions(outcome, name):
    row = outcome.rows[name]
    assert row["error"] is None
    assert len(row["predictions"]) == 3 and all(0 <= p["score"] <= 1 for p in row["predictions"])
    assert (row["width"], row["height"]) == SIZES.get(name, (WIDTH, HEIGHT))


@pytest.mark.parametrize(
    ("name", "words"),
    [*((name, words) for name, (_, words) in {**BAD, **LINKS}.items()), ("folder.jpg", "this is a directory")],
)
def test_a_bad_image_is_a_row_that_says_what_is_wrong(outcome, name, words):
    row = outcome.rows[name]
    assert words in row["error"]
    assert row["predictions"] is None and row["width"] is None
    assert not re.search(r"errno|traceback|exception|\berror\b|cv2|None", row["error"], re.IGNORECASE)


def test_a_name_that_is_no_text_is_one_row_that_says_so_or_has_predictions(outcome):
    (name,) = [name for name in outcome.rows if name.startswith("bad")]
    row = outcome.rows[name]
    name.encode()  # any reader can have it
    assert (row["predictions"] is not None) != ("name" in (row["error"] or ""))


@pytest.mark.parametrize("outcome", ["local"], indirect=True)
def test_a_large_image_of_few_bytes_takes_no_memory(outcome):
    assert outcome.watched > 0
    assert outcome.worker_megabytes < WORKER_MEGABYTES


def test_a_second_run_tries_again_what_the_bytes_are_not_to_blame_for(outcome, bundle_uri, tmp_path):
    output = shutil.copytree(outcome.finished.output, tmp_path / "out")
    settings = ("spark.master=local[2]", f"paths.runs={tmp_path / 'runs'}")
    source = Path(next(row["path"] for row in outcome.rows.values() if row["path"].endswith("/plain.png"))).parent
    again = start_run(source, bundle_uri, output, tmp_path / "run.log", *settings, before=without_privileges()).finish()
    errors = {name: row["error"] for name, row in outcome.rows.items() if row["error"]}
    tried = set(errors) - {"cut.jpg", "cut.png", "empty.jpg", "text.jpg", "page.jpg", "folder.jpg"}
    assert tried >= {"secret.png", "large.png", "nowhere.png"}
    counts = [again.summary[key] for key in ("ok", "failed", "skipped")]
    assert counts == [0, len(tried), len(outcome.rows) - len(tried)]
    assert again.rows() == outcome.finished.rows()


def test_the_reasons_and_their_counts_are_told(outcome):
    assert "2 images: the image is damaged or cut short" in outcome.finished.errors
    assert "2 images: the image has 20000 x 20000 pixels" in outcome.finished.errors


def test_more_than_half_failed_completes_and_exits_1_with_the_commonest_reasons_first(
    spark, bundle_uri, tmp_path, capsys
):
    photos, output = tmp_path / "photos", tmp_path / "out"
    photos.mkdir()
    for number, content in enumerate([GOOD["plain.png"], b"", b"", b"some", b"different", b"words"]):
        (photos / f"{number}.png").write_bytes(content)
    settings = [f"paths.runs={tmp_path / 'runs'}", "spark.master=local[2]"]
    options = [part for setting in settings for part in ("--set", setting)]
    arguments = ["--source", str(photos), "--model", bundle_uri, "--output", str(output), "--profile", "local"]
    assert main(["run", *arguments, *options]) == 1
    answer = capsys.readouterr()
    assert json.loads(answer.out.splitlines()[-1])["failed"] == 5
    assert "error: 5 of 6 images failed" in answer.err
    assert answer.err.index("3 images: the file is not an image") < answer.err.index("2 images: the file is empty")
    assert len(Finished(output, 1, answer.out, answer.err).rows()) == 6
    # A run that has nothing to do makes nothing good.
    assert main(["run", *arguments, *options]) == 1
    again = capsys.readouterr()
    assert json.loads(again.out.splitlines()[-1])["skipped"] == 6
    assert "error: 5 of 6 images failed" in again.err and "3 images: the file is not an image" in again.err


@pytest.fixture
def deletable(tmp_path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(4):
        (folder / f"{i}.png").write_bytes(GOOD["plain.png"])
    return folder


@pytest.mark.parametrize(
    ("remove", "words"),
    [
        (Path.unlink, "the file is gone"),
        (lambda path: path.write_bytes(b""), "the file is empty"),
        (lambda path: (path.unlink(), path.mkdir()), "this is a directory"),
    ],
    ids=["deleted", "emptied", "replaced by a folder"],
)
def test_a_file_that_changes_between_listing_and_reading_is_an_error_row(
    deletable, bundle_uri, tmp_path, config, remove: Callable, words
):
    task = make_task(str(deletable), bundle_uri, str(tmp_path / "out"), config)
    images = list_images(task.source, config).images
    remove(deletable / "2.png")
    batches = assign(images, plan(images, 1, config)).to_batches()
    rows = pa.Table.from_batches(task.results(batches)).to_pylist()
    errors = {Path(row["path"]).name: row["error"] for row in rows}
    assert len(rows) == 4 and words in errors.pop("2.png")
    assert set(errors.values()) == {None}


def test_a_file_deleted_before_its_picture_is_drawn_costs_its_picture_only(deletable, bundle_uri, tmp_path, config):
    """The results are published by then; a run must not fail for a picture."""
    task = make_task(str(deletable), bundle_uri, str(tmp_path / "out"), config)
    images = list_images(task.source, config).images
    (tmp_path / "out" / "_staging" / task.run).mkdir(parents=True)
    (record,) = list(task(assign(images, plan(images, 1, config)).to_batches()))
    (deletable / "2.png").unlink()
    (deletable / "3.png").write_bytes(b"no image any more")
    pictures = draw_sample(
        task.output, record["file"].to_pylist(), task.source, config.model_copy(update={"pictures": 4})
    )
    assert len(pictures) == 2


def test_one_file_that_cannot_be_read_does_not_change_the_reader_of_all(
    spark, deletable, bundle_uri, tmp_path, config, monkeypatch
):
    """Spark's own reader is for storage that tasks do not reach, and stops at a file that it may not read."""
    monkeypatch.setattr(readers, "local_slots", lambda spark: None)  # as on a cluster
    task = make_task(str(deletable), bundle_uri, str(tmp_path / "out"), config)
    images = list_images(task.source, config).images
    listed = assign(images, plan(images, 1, config))
    assert readers.choose_reader(spark, task.source, listed, config) == "files"
    Path(listed["path"][0].as_py()).unlink()
    assert readers.choose_reader(spark, task.source, listed, config) == "files"
